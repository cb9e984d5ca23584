"""No image that is measured on was trained on, and no network measures a model that it taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.data.batches import CaptionedImages
from ldm.errors import ConfigError
from ldm.models.provenance import HASH_DIGITS, image_keys, in_both, read_provenance, read_trained_images


def refuse_leaks(parts: Sequence[str | None], images: CaptionedImages) -> None:
    """Raise ConfigError if one of `parts`, folders or Hub names, was trained on images that are held out here."""
    held_out = image_keys(images.names("validation", "test"))
    for part in filter(None, parts):
        try:
            refuse_leak(part, images.splits.held_out_hash, held_out)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def refuse_leak(folder: str | Path, held_out_hash: str, held_out: Tensor) -> None:
    """Raise ValueError if the model in `folder` was trained on an image that is held out here.

    A component that has seen held-out images would falsify every number measured on them. `held_out`: the keys of the
    images that are held out, `held_out_hash` a hash of them. A data set may have grown since, and another share may be
    held out: only the images count. A model of before they were recorded must have held out just the same ones; one
    that says nothing of its training passes.
    """
    found, name = read_provenance(folder), Path(folder).name
    if found is None:
        return
    if (trained := read_trained_images(folder)) is None and found.held_out_hash != held_out_hash:
        raise ValueError(
            f"{name} was trained with other images held out (hash {found.held_out_hash[:8]}, here "
            f"{held_out_hash[:8]}), and its record, of an earlier version, does not say on which it was trained: it "
            "may have seen what is to be measured. Train it with the same data.held_out and data.held_out_percent"
        )
    if trained is not None and (leaks := len(in_both(trained, held_out))):
        raise ValueError(
            f"{name} was trained on {leaks} of the {len(held_out)} images that are held out here, which it would be "
            "measured on. Train it with the same data.held_out and data.held_out_percent, or hold out others"
        )


def refuse_teacher(folder: str | Path, name: str, sha256: str) -> None:
    """Raise ValueError if the model in `folder` was trained through the network that is to measure it.

    A foreign model says nothing and passes, and so does one of before this was recorded.
    """
    found = read_provenance(folder)
    if found is not None and any(one.endswith(f" {sha256[:HASH_DIGITS]}") for one in found.networks):
        raise ValueError(
            f"{Path(folder).name} was trained through {name}, which would grade its own pupil; measure with another "
            "network"
        )
