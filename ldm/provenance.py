"""What a saved model says of its training: ``training.json`` beside its weights."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import __version__

FILE = "training.json"
TRAINED_IMAGES = "trained_images.safetensors"
HASH_DIGITS = 16


@dataclass(frozen=True)
class Provenance:
    """How a model came to be. Names no path, host or user: it travels with the model."""

    data: str
    """Fingerprint of the pictures."""
    held_out_hash: str
    """Hash of the pictures that were left out of training; see `ldm.data.splits`."""
    train_pictures: int
    global_step: int
    train_seconds: float
    images_per_second: float
    hardware: str
    versions: dict[str, str]
    networks: list[str] = field(default_factory=list)
    """Networks that a loss or a condition looked through, of the model's parts too: name and hash of the weights. What
    they see has been trained for, so that they must not measure it."""
    sigma_rel: float | None = None
    """Length of the power-function average that the weights are; None: they are the training's own average."""

    def save(self, folder: str | Path) -> None:
        """Write ``training.json`` into the model's folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_provenance(folder: str | Path) -> Provenance | None:
    """Return what the model in `folder` says of its training, None if it says nothing (a foreign model)."""
    for path in (Path(folder) / FILE, Path(folder).parent / FILE):  # a component's record is its pipeline's
        if path.is_file():
            return Provenance(**json.loads(path.read_text(encoding="utf-8")))
    return None


def image_keys(names: Iterable[str]) -> Tensor:
    """Return 64 bits of a hash of each distinct name of an image, int64 in ascending order: equal images, equal keys.

    A million images share a key with one of a million others by a chance of 5e-8.
    """
    digests = (blake2b(name.encode(), digest_size=8).digest() for name in set(names))
    keys = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(sorted(keys), dtype=torch.int64)


def in_both(one: Tensor, other: Tensor) -> Tensor:
    """Return the keys that are in both."""
    return one[torch.isin(one, other)]


def save_trained_images(folder: str | Path, keys: Tensor) -> None:
    """Write the keys of the images that a model was trained on, its parts included, into the model's folder."""
    save_file({"keys": keys}, Path(folder) / TRAINED_IMAGES)


def read_trained_images(folder: str | Path) -> Tensor | None:
    """Return the keys of the images that the model in `folder` was trained on, None if it does not say."""
    for path in (Path(folder) / TRAINED_IMAGES, Path(folder).parent / TRAINED_IMAGES):
        if path.is_file():
            return next(iter(load_file(path).values()), None)
    return None


def refuse_leak(folder: str | Path, held_out_hash: str, held_out: Tensor) -> None:
    """Raise ValueError if the model in `folder` was trained on an image that is held out here.

    A component that has seen held-out images would falsify every number measured on them. `held_out`: the keys of the
    images that are held out, `held_out_hash` a hash of them. A data set may have grown since, and another share may be
    held out: only the images count. A model of before they were recorded must have held out just the same ones; one
    that says nothing of its training passes.
    """
    trained, name = read_trained_images(folder), Path(folder).name
    if trained is not None:
        if leaks := len(in_both(trained, held_out)):
            raise ValueError(
                f"{name} was trained on {leaks} of the {len(held_out)} pictures that are held out here, which it would "
                "be measured on. Train it with the same data.held_out and data.held_out_percent, or hold out others"
            )
        return
    found = read_provenance(folder)
    if found is not None and found.held_out_hash != held_out_hash:
        raise ValueError(
            f"{name} was trained with other pictures held out (hash {found.held_out_hash[:8]}, here "
            f"{held_out_hash[:8]}), and its record, of an earlier version, does not say on which it was trained: it "
            "may have seen what is to be measured. Train it with the same data.held_out and data.held_out_percent"
        )


def trained_through(name: str, sha256: str) -> str:
    """Return how `Provenance.networks` names a network."""
    return f"{name} {sha256[:HASH_DIGITS]}"


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


def hardware() -> str:
    """Return the processor or the accelerator and how much of it is used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads, {torch.cpu.get_capabilities().get('cpu_name') or platform.processor()}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    # ours is not asked of pip: a checkout that was never installed trains too
    others = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"ldm": __version__, **others}
