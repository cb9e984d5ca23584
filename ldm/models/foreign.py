"""Models of unknown origin: their JSON is read before they are loaded, and what it may name is weights, never code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ldm.config.places import PLAIN_NAME, pinned
from ldm.files import read_object

LIBRARIES = ("diffusers", "transformers")


def checked_pipeline(model: str, trust_remote_code: bool) -> tuple[str, dict[str, str]]:
    """Return folder or Hub name of a pipeline that may be loaded, and on the Hub ``{"revision": ...}``.

    The revision is that which was looked at: the commit, whatever happens to a branch meanwhile.

    Raises:
        ValueError: it comes with code of its own and that is not trusted; or it names components that are of neither
            library, or files that are not in it.

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
    for part in (folder, *(folder / part for part in _components(index))):
        refuse_strange_shards(part)
    return name, {}


def refuse_strange_shards(folder: str | Path) -> None:
    """Raise ValueError if an index of weights in `folder` names what is no safetensors file of that folder."""
    for index in sorted(Path(folder).glob("*.safetensors.index.json")):
        shards = read_object(index).get("weight_map", {})
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not (isinstance(shard, str) and PLAIN_NAME.fullmatch(shard) and shard.endswith(".safetensors")):
                raise ValueError(
                    f"{index} names {shard!r}; weights are read from safetensors files beside it and nothing else"
                )


@contextmanager
def own_code_refused(where: str, pretrained: str) -> Iterator[None]:
    """Say in our words that transformers refuses to run the code of a model; there is no option that would let it."""
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
    """Return library and class of each component; raises ValueError for names that are no folder's or no class's."""
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
    """Return which code of its own a pipeline would run, None if none; `folder` None: it is still on the Hub.

    Raises ValueError for a component of a library that is none of `LIBRARIES` and does not lie in the folder.
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
