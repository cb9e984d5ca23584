"""Checks of models of unknown origin, before they are loaded: their JSON may name weights, but no code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ldm.config.places import PLAIN_NAME, pinned
from ldm.files import read_object

LIBRARIES = ("diffusers", "transformers")


def checked_pipeline(model: str, trust_remote_code: bool) -> tuple[str, dict[str, str]]:
    """Return folder or Hub name of a pipeline that may be loaded, and on the Hub ``{"revision": COMMIT}``.

    The commit is the one that was checked, even if the branch moves meanwhile.

    Raises:
        ValueError: the pipeline comes with its own code and this is not trusted; or it names components of neither
            library, or files outside its folder.

    """
    name, revision = pinned(model)
    if (file := Path(name) / "model_index.json").is_file():
        read_object(file)
    index, _, commit = DiffusionPipeline.load_config(
        name, return_unused_kwargs=True, return_commit_hash=True, **revision
    )
    if not isinstance(index, dict):
        raise ValueError(f"{model}: model_index.json is a {type(index).__name__}; expected an object")
    folder = Path(name) if Path(name).is_dir() else None
    if (code := _code(index, folder)) and not trust_remote_code:
        raise ValueError(
            f"{model} comes with code of its own ({code}), which would run on this machine with all your rights; read "
            "it, and if you trust it, add --trust_remote_code true. Without it, use a model of diffusers' own classes"
        )
    if folder is None:
        return name, {"revision": commit} if commit else revision
    refuse_strange_components(folder)
    return name, {}


def refuse_strange_components(folder: Path) -> None:
    """Raise ValueError if a pipeline in a folder names components of neither library, or files outside the folder."""
    index = read_object(folder / "model_index.json")
    _code(index, folder)
    if (card := folder / "README.md").is_file() and ModelCard.load(card).data.get("prior"):
        # some of diffusers' classes load whatever pipeline the card names so
        raise ValueError(f"{card} names another pipeline as its prior, which would be loaded; take that line out")
    for part in (folder, *(folder / part for part in _components(index))):
        refuse_strange_shards(part)


def refuse_strange_shards(folder: str | Path) -> None:
    """Raise ValueError if an index of weights in `folder` names anything but safetensors files in it."""
    for index in sorted(Path(folder).glob("*.safetensors.index.json")):
        shards = read_object(index).get("weight_map", {})
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not (isinstance(shard, str) and PLAIN_NAME.fullmatch(shard) and shard.endswith(".safetensors")):
                raise ValueError(
                    f"{index} names {shard!r}; weights are read from safetensors files beside it and nothing else"
                )


@contextmanager
def own_code_refused(where: str, pretrained: str) -> Iterator[None]:
    """Turn transformers' refusal to run a model's code into our error, which names `where`; no option allows it."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{where}: {pretrained} comes with code of its own, which is never run; use a model of a class that "
            "transformers has itself"
        ) from error


def _components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return library and class of each component; ValueError for names that cannot be a folder's or a class's."""
    named = {
        name: value for name, value in index.items() if isinstance(value, list | tuple) and not name.startswith("_")
    }
    found = {}
    for name, value in named.items():
        if list(value) == [None, None]:
            continue
        plain = len(value) == 2 and all(isinstance(text, str) and PLAIN_NAME.fullmatch(text) for text in (name, *value))
        if not plain:
            raise ValueError(f"model_index.json: {name!r}: {list(value)}; expected a folder, its library and its class")
        found[name] = (value[0], value[1])
    return found


def _code(index: Mapping[str, Any], folder: Path | None) -> str | None:
    """Return the pipeline's own code that loading it would run, None if there is none; `folder` None: on the Hub.

    ValueError for a component whose library is neither one of `LIBRARIES` nor a file in the folder.
    """
    kind = index.get("_class_name")
    for name, (library, class_name) in _components(index).items():
        file = f"{name}/{library}.py"
        if folder is not None and (folder / file).is_file():
            return file
        if library in LIBRARIES or importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None:
            continue
        if folder is not None:
            raise ValueError(
                f"model_index.json: {name} is to be {class_name} of {library}, which is neither of "
                f"{' nor of '.join(LIBRARIES)}; only their classes are loaded, and code that lies in the model's folder"
            )
        return file
    return None if isinstance(kind, str) else f"the pipeline {kind}"
