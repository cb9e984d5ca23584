"""Checks that an evaluation is fair: no held-out image was trained on, and no network measures a model it taught."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.data.batches import CaptionedImages
from ldm.errors import ConfigError
from ldm.models.provenance import HASH_DIGITS, image_keys, in_both, read_provenance, read_trained_images


def refuse_leaks(parts: Sequence[str], images: CaptionedImages) -> None:
    """Raise ConfigError if one of `parts`, folders or Hub names of models, was trained on images held out here."""
    held_out = image_keys(images.names("validation", "test"))
    for part in parts:
        try:
            refuse_leak(part, images.splits.held_out_hash, held_out)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def refuse_leak(folder: str | Path, held_out_hash: str, held_out: Tensor) -> None:
    """Raise ValueError if the model in `folder` was trained on an image that is held out here.

    A component that has seen held-out images would falsify every number measured on them. `held_out` are the keys of
    the images that are held out, and `held_out_hash` is a hash of them. Only the images count: the data set may have
    grown since, or another share of it may be held out. A model from before trained images were recorded must have held
    out exactly the same ones. A model without a record of its training passes.
    """
    found, name = read_provenance(folder), Path(folder).name
    if found is None:
        return
    if (trained := read_trained_images(folder)) is None and found.held_out_hash != held_out_hash:
        raise ValueError(
            f"{name} was trained with other images held out (hash {found.held_out_hash[:8]}, here "
            f"{held_out_hash[:8]}). Its record is of an earlier version and does not list the training images, so it "
            "may have been trained on images that are held out here. Train it with the same data.held_out and "
            "data.held_out_percent"
        )
    if trained is not None and (leaks := len(in_both(trained, held_out))):
        raise ValueError(
            f"{name} was trained on {leaks} of the {len(held_out)} images that are held out here, so it "
            "cannot be measured on them. Train it with the same data.held_out and data.held_out_percent, or hold out "
            "others"
        )


def refuse_teacher(folder: str | Path, name: str, sha256: str) -> None:
    """Raise ValueError if the model in `folder` was trained through the network that is to measure it.

    A model without such a record passes: one of another project, or from before this was recorded.
    """
    found = read_provenance(folder)
    if found is not None and any(one.endswith(f" {sha256[:HASH_DIGITS]}") for one in found.networks):
        raise ValueError(
            f"{Path(folder).name} was trained through {name}, which cannot measure it fairly; choose another --network"
        )
