"""What a saved model says of its training: ``training.json`` beside its weights."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from ldm import __version__

FILE = "training.json"
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


def refuse_leak(folder: str | Path, held_out_hash: str) -> None:
    """Raise ValueError if the model in `folder` was trained with other pictures held out than those of the hash.

    A component that has seen the held-out pictures would falsify every number measured on them. A foreign model
    says nothing and passes.
    """
    found = read_provenance(folder)
    if found is not None and found.held_out_hash != held_out_hash:
        raise ValueError(
            f"{Path(folder).name} was trained with other pictures held out (hash {found.held_out_hash[:8]}, here "
            f"{held_out_hash[:8]}): it may have seen what is to be measured. Train it with the same data.held_out"
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
