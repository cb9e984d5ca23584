"""The record of a model's training: ``training.json`` beside its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import __version__
from ldm.config import DataOptions
from ldm.config.places import on_hub, pinned, resolve
from ldm.files import read_object

log = logging.getLogger(__name__)
FILE = "training.json"
TRAINED_IMAGES = "trained_images.safetensors"
HASH_DIGITS = 16


@dataclass(frozen=True)
class Provenance:
    """A model's training: data, steps, hardware, versions. It is published with the model: no path, host or user."""

    data: str
    """Fingerprint of the images."""
    held_out_hash: str
    """Hash of the held-out images; see `ldm.data.splits`."""
    train_pictures: int
    global_step: int
    train_seconds: float
    images_per_second: float
    hardware: str
    versions: dict[str, str]
    networks: list[str] = field(default_factory=list)
    """Frozen networks that a loss or a condition used, those of the model's parts included: name and hash of the
    weights. The model was trained on their features, so they must not be used to evaluate it."""
    sigma_rel: float | None = None
    """Length of the power-function average of the weights; None: they are the training's own average."""
    data_options: DataOptions = field(default_factory=DataOptions)
    """Options with which the data were read, for evaluation; empty for older models, which did not record them."""

    def save(self, folder: str | Path) -> None:
        """Write ``training.json`` into the model's folder."""
        (Path(folder) / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_provenance(name: str | Path) -> Provenance | None:
    """Return the record of a model's training; None if there is none that we can read, as for models of others.

    `name` is a folder, ``package:NAME/FOLDER``, or ``user/name`` or ``user/name@revision`` on the Hub. A `Path` is
    always a folder of this machine. Nothing is raised: a warning is logged if the record is not ours, if it has
    unknown fields, or if the Hub could not be asked.
    """
    path = _file_of(name, FILE)
    if path is None:
        return None
    try:
        known, others = _known_values(read_object(path), Provenance)
        if missing := [one.name for one in fields(Provenance) if one.name not in known and _is_required(one)]:
            raise ValueError(f"{path}: {missing[0]} is missing or of another type")
    except (ValueError, OSError) as error:
        _warn_once(f"no record of ours, and not read: {error}")
        return None
    if others:
        _warn_once(
            f"{name}: fields of its {FILE} are unknown here or of another type, and left out: {', '.join(others)}"
        )
    return Provenance(**known)


@cache
def _warn_once(message: str) -> None:
    """Log a warning, each message once: a record is read several times."""
    log.warning(message)


def _file_of(name: str | Path, file: str) -> Path | None:
    """Return the path of a `file` beside a model, downloaded from the Hub if needed; None if there is none."""
    try:
        folder = Path(resolve(str(name)))
        if folder.exists():  # a component has the record of its pipeline
            return next((path for path in (folder / file, folder.parent / file) if path.is_file()), None)
    except (ImportError, OSError, ValueError):  # no such package or path: loading the model raises the error
        return None
    if isinstance(name, Path) or not on_hub(name):
        return None
    try:
        repository, revision = pinned(name)
        return Path(hf_hub_download(repository, file, revision=revision.get("revision")))
    except Exception as error:  # errors of the client, of its HTTP library, of the disk
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            _warn_once(f"{name}: its {file}, the record of its training images, was not checked: {_line(error)}")
        return None


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _known_values(found: dict[str, Any], kind: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the values that are fields of `kind`, a dataclass or TypedDict, and the names of the other values."""
    known: dict[str, Any] = {}
    others: list[str] = []
    hints = get_type_hints(kind)
    for key, value in found.items():
        hint = hints.get(key)
        if is_typeddict(hint) and isinstance(value, dict):
            known[key], inside = _known_values(value, hint)
            others += inside
        elif key in hints and _is_a(value, hint):
            known[key] = tuple(value) if get_origin(hint) is tuple else value
        else:
            others.append(repr(key)[:40])
    return known, others


def _is_required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _is_a(value: object, hint: Any) -> bool:
    """Return True if a value from JSON has the type of a field's annotation."""
    kind, arms = get_origin(hint), get_args(hint)
    if kind is UnionType:
        return any(_is_a(value, arm) for arm in arms)
    if kind is Literal:
        return value in arms
    if kind in (list, tuple):
        return isinstance(value, list) and all(_is_a(entry, arms[0]) for entry in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(entry, arms[1]) for entry in value.values())
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def image_keys(names: Iterable[str]) -> Tensor:
    """Return a key for each distinct name of an image, 64 bits of its hash, as int64 in ascending order.

    Two sets of a million different images share a key with a probability of 5e-8.
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


def read_trained_images(name: str | Path) -> Tensor | None:
    """Return the keys of a model's training images, None if there is no record; `name` is as in `read_provenance`."""
    path = _file_of(name, TRAINED_IMAGES)
    if path is None:
        return None
    try:
        keys = load_file(path)["keys"]
    except (SafetensorError, OSError, KeyError) as error:
        _warn_once(f"{path}: no record of ours, and not read: {_line(error)}")
        return None
    return keys


def trained_through(name: str, sha256: str) -> str:
    """Return the entry of `Provenance.networks` for a network."""
    return f"{name} {sha256[:HASH_DIGITS]}"


def versions() -> dict[str, str]:
    """Return the versions of ldm and of the libraries it computes with."""
    # our own version is not read from package metadata: a checkout that was never installed has none
    others = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"ldm": __version__, **others}
