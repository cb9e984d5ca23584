"""What is recorded of a training: in its checkpoints, to go on with the same; with its model, for others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any, cast

from ldm.config import AutoencoderConfig, DataConfig, DataOptions, StageConfig
from ldm.config_file import ConfigError, tree_differences
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.places import portable
from ldm.provenance import Provenance, hardware, read_provenance, versions
from ldm.training.progress import Progress

log = logging.getLogger(__name__)
MAY_CHANGE = (
    "output_dir",
    "doctor",
    "allow_config_change",
    "push_",
    "save_dtype",
    "snapshot_",  # a checkpoint without these averages is refused: they begin with the training
    "data.path",  # the fingerprint tells whether the pictures are the same
    "data.licence",
    "data.workers",
    "data.timeout_seconds",
    "data.cache",
    "loop.max_train_",
    "loop.gradient_accumulation_steps",
    "loop.gradient_checkpointing",
    "loop.xformers",
    "loop.log_every_steps",
    "loop.save_every_steps",
    "loop.keep_checkpoints",
    "loop.process_timeout_seconds",
    "loop.validate_every_steps",
    "loop.trackers",
    "validation.",
    "sampler",
)
"""What a run can be resumed with other values of: the weights it arrives at do not depend on it, or it is their end."""


def run_record(config: StageConfig | AutoencoderConfig, images: CaptionedImages) -> dict[str, Any]:
    """Return what decides where a training arrives: its config, without folders of this machine, and its pictures."""
    record = {
        "config": portable(asdict(config)),
        "pictures": {"fingerprint": images.source.fingerprint, "held_out_hash": images.splits.held_out_hash},
    }
    again: dict[str, Any] = json.loads(json.dumps(record))  # as it comes back from a checkpoint
    return again


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: bool) -> None:
    """Log what differs between two records; raise ConfigError for what may not, unless it is `allowed`."""
    changes = list(tree_differences(before.get("config", {}), now.get("config", {})))
    changes += tree_differences(before.get("pictures", {}), now.get("pictures", {}), "pictures")
    refused = [change for change in changes if not change.startswith(MAY_CHANGE)]
    if refused and not allowed:
        raise ConfigError(
            "output_dir holds a training that was started with other values, and the result would be neither's:\n  "
            + "\n  ".join(refused)
            + "\nSet them back, choose another output_dir, or go on with the new ones: --allow_config_change true"
        )
    for change in changes:
        log.warning("resumed with another value: %s", change)


def provenance(progress: Progress, train: PositionDataset, networks: Sequence[str], parts: Sequence[str]) -> Provenance:
    """Return the record of a training that stands at `progress`, on the split `train`.

    `networks` are those that it looks through itself; those that its pretrained `parts`, folders or Hub names, were
    trained through are added.
    """
    inherited = (found.networks for part in parts if (found := read_provenance(part)) is not None)
    return Provenance(
        data=train.images.source.fingerprint,
        held_out_hash=train.images.splits.held_out_hash,
        train_pictures=len(train),
        global_step=progress.global_step,
        train_seconds=round(progress.train_seconds, 1),
        images_per_second=round(progress.images_per_second, 1),
        hardware=hardware(),
        versions=versions(),
        networks=sorted({*networks, *chain.from_iterable(inherited)}),
        data_options=data_options(train.images.config),
    )


def data_options(config: DataConfig) -> DataOptions:
    """Return how the data are read, without folders of this machine."""
    read: dict[str, Any] = {name: getattr(config, name) for name in DataOptions.__annotations__}
    return cast(DataOptions, read | {"held_out": portable(config.held_out)})
