"""The record of a training: in its checkpoints, to go on with the same; with its model, for others."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ldm.config import DataConfig, DataOptions, RunConfig
from ldm.config.file import tree_differences, with_defaults
from ldm.config.places import portable
from ldm.data.batches import CaptionedImages
from ldm.errors import ConfigError
from ldm.machine import hardware
from ldm.models.provenance import Provenance, image_keys, in_both, read_provenance, read_trained_images, versions
from ldm.models.text_encoder import tokenizer_from_json, tokenizer_hash, tokenizer_json
from ldm.training.checkpoint import Checkpoint
from ldm.training.progress import Progress

log = logging.getLogger(__name__)
MAY_CHANGE = (
    "config.output_dir",
    "config.doctor",
    "config.allow_config_change",
    "config.push_",
    "config.save_dtype",
    "config.snapshot_",  # a checkpoint without these averages is refused: they begin with the training
    "config.data.path",
    "config.data.licence",
    "config.data.workers",
    "config.data.timeout_seconds",
    "config.data.cache",
    "config.loop.max_train_",
    "config.loop.gradient_accumulation_steps",
    "config.loop.gradient_checkpointing",
    "config.loop.xformers",
    "config.loop.log_every_steps",
    "config.loop.save_every_steps",
    "config.loop.keep_checkpoints",
    "config.loop.process_timeout_seconds",
    "config.loop.validate_every_steps",
    "config.loop.trackers",
    "config.validation.",
    "config.sampler",
)
"""Fields that a run can be resumed with other values of: the weights it arrives at do not depend on them."""
DECIDED_BY = {
    "captions": ("config.data.source", "config.data.split", "config.data.image_column", "config.data.caption_column"),
    "classes": ("config.data.class_column",),
    "networks": ("config.space.autoencoder", "config.space.image_encoder", "config.conditioners.image.pretrained"),
    "precision": ("config.loop.mixed_precision",),
    "tokenizer": ("config.conditioners.text.pretrained", "config.clip.pretrained"),
}
"""Values that only say where something is: facts of these names say whether it is the same."""
GROUP = "record"
"""Name of the record's tensors in a checkpoint."""


class RecordedStep(Protocol):
    """A training step, as a record sees it."""

    @property
    def frozen(self) -> Mapping[str, str]:
        """Return a hash of each network that the training looks through and does not change."""

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that the trained weights belong to, None without one."""


@dataclass(frozen=True)
class RunRecord:
    """All that decides where a training arrives, besides its weights; a part of every checkpoint."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON: the config without folders of this machine, and hashes of everything that it only names."""
    tokenizer: str | None = None
    """JSON, see `tokenizer_json`. The weights of a text encoder belong to its token numbers."""
    trained_images: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Keys of the images that were trained on up to here, see `image_keys`."""
    held_out_images: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    train_images: int = 0
    """Number of images in the training split."""
    config_class: type[RunConfig] = RunConfig
    """The class of the config, whose defaults stand for what an earlier version did not write."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's ``state.json`` holds of it."""
        return {"record": self.facts, "tokenizer": self.tokenizer}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint's tensors hold of it."""
        return {GROUP: {"trained_images": self.trained_images}} if len(self.trained_images) else {}

    def going_on_from(self, saved: Checkpoint, allowed: bool) -> RunRecord:
        """Return the record of a training that goes on from `saved`: the images of both are those trained on.

        Logs what differs; ConfigError for what may not, unless it is `allowed`.
        """
        before = saved.tensors.get(GROUP, {}).get("trained_images", self.trained_images[:0])
        leaks = len(in_both(before, self.held_out_images))
        changes = [f"images that were trained on and are held out now: {leaks}"] if leaks else []
        facts = saved.state.get("record", self.facts)
        if "config" in facts:
            facts = {**facts, "config": with_defaults(facts["config"], self.config_class)}
        if (tokenizer := recorded_tokenizer(saved.state)) is not None:  # another version may hash the same otherwise
            facts = {**facts, "tokenizer": tokenizer_hash(tokenizer)}
        refuse_changes(facts, self.facts, allowed, changes)
        trained = torch.unique(torch.cat([before, self.trained_images]))
        return replace(self, trained_images=trained, tokenizer=saved.state.get("tokenizer") or self.tokenizer)


def recorded_tokenizer(state: Mapping[str, Any]) -> Any | None:
    """Return the tokenizer that a checkpoint's ``state.json`` holds, None if it holds none."""
    text = state.get("tokenizer")
    return None if text is None else tokenizer_from_json(text)


def run_record(config: RunConfig, images: CaptionedImages, step: RecordedStep, precision: str) -> RunRecord:
    """Return the record of a training of `step` on `images` in `precision`."""
    source, train, tokenizer = images.source, images.splits["train"], step.tokenizer
    facts = {
        "config": portable(asdict(config)),
        "pictures": {"fingerprint": source.fingerprint, "held_out_hash": images.splits.held_out_hash},
        "captions": _digest(source.captions(row) for row in train),
        "classes": None if images.config.class_column is None else _digest(map(source.class_label, train)),
        "networks": dict(step.frozen),
        "precision": precision,
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }
    return RunRecord(
        facts=json.loads(json.dumps(facts)),  # as it comes back from a checkpoint
        tokenizer=None if tokenizer is None else tokenizer_json(tokenizer),
        trained_images=image_keys(images.names("train")),
        held_out_images=image_keys(images.names("validation", "test")),
        train_images=len(train),
        config_class=type(config),
    )


def _digest(rows: Iterable[Any]) -> str:
    """Return a hash of JSON values, in their order."""
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: bool, changes: Sequence[str] = ()
) -> None:
    """Log what differs between the facts of two records; raise ConfigError for what may not, unless it is `allowed`.

    changes: others, which may not. A fact that the earlier record does not hold, because an earlier version wrote it,
    is not compared, and one line says so.
    """
    unknown = sorted(now.keys() - before.keys())
    if "captions" in unknown:  # it named images by their paths and times
        before = {**before, "pictures": {**before.get("pictures", {}), "fingerprint": now["pictures"]["fingerprint"]}}
        unknown.append("content of the images")
    if unknown and before:
        log.warning("the checkpoint is of an earlier version and does not say: %s; not compared", ", ".join(unknown))
    may_change = MAY_CHANGE + tuple(chain.from_iterable(DECIDED_BY[fact] for fact in DECIDED_BY if fact in before))
    found = [change for change in tree_differences(before, now) if re.split("[.:]", change)[0] not in unknown]
    refused = [*changes, *(change for change in found if not change.startswith(may_change))]
    if refused and not allowed:
        raise ConfigError(
            "output_dir holds a training that was started with other values, and the result would be neither's:\n  "
            + "\n  ".join(map(_plain, refused))
            + "\nSet them back, choose another output_dir, or go on with the new ones: --allow_config_change true"
        )
    for change in (*changes, *found):
        if not change.startswith("config.allow_config_change"):  # it is what allows the others
            log.warning("resumed with another value: %s", _plain(change))


def _plain(change: str) -> str:
    """Return a line on a field of the config as the config names it."""
    return change.removeprefix("config.")


def provenance(
    progress: Progress, record: RunRecord, data: DataConfig, networks: Sequence[str], parts: Sequence[str]
) -> Provenance:
    """Return what a model says of its training, which stands at `progress` and has this record, on `data`.

    `networks` are those that it looks through itself; those that its pretrained `parts`, folders or Hub names, were
    trained through are added.
    """
    inherited = (found.networks for part in parts if (found := read_provenance(part)) is not None)
    return Provenance(
        data=record.facts["pictures"]["fingerprint"],
        held_out_hash=record.facts["pictures"]["held_out_hash"],
        train_pictures=record.train_images,
        global_step=progress.global_step,
        train_seconds=round(progress.train_seconds, 1),
        images_per_second=round(progress.images_per_second, 1),
        hardware=hardware(),
        versions=versions(),
        networks=sorted({*networks, *chain.from_iterable(inherited)}),
        data_options=data_options(data),
    )


def all_trained_images(own: Tensor, parts: Sequence[str]) -> Tensor:
    """Return the keys of the images that a model was trained on, itself (`own`) or in one of its pretrained `parts`."""
    inherited = (found for part in parts if (found := read_trained_images(part)) is not None)
    keys: Tensor = torch.unique(torch.cat([own, *inherited]))
    return keys


def data_options(config: DataConfig) -> DataOptions:
    """Return how the data are read, without folders of this machine."""
    read: dict[str, Any] = {name: getattr(config, name) for name in DataOptions.__annotations__}
    return cast(DataOptions, read | {"held_out": portable(config.held_out)})
