"""The place of a network or tokenizer, named by its own folder or by a pipeline's that has it as a component."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ldm.config.places import on_hub, pinned

INDEX = "model_index.json"


def find_component(
    pretrained: str, names: Sequence[str], revision: str | None = None, subfolder: str | None = None
) -> tuple[str, dict[str, str]]:
    """Return a model's folder or Hub name, and the keywords ``subfolder`` and ``revision`` of `from_pretrained`.

    `names` are diffusers' names for a component of this kind. If `pretrained` is a pipeline, in a folder or on the
    Hub, its component is found in ``model_index.json`` (or, in a folder without one, by the subfolders), and
    ``subfolder`` is its name. Otherwise the folder itself holds the model. A given `subfolder` is taken as it is.
    ``revision`` is returned if it is given, alone or as ``user/name@revision``.

    Raises:
        ValueError: the pipeline has none of these components, or several.

    """
    place, keywords = pinned(pretrained)
    if revision is not None:
        keywords["revision"] = revision
    if subfolder is not None:
        return place, keywords | {"subfolder": subfolder}
    index = _index(place, keywords)
    inside = names if index is None else _components(index)
    found = [name for name in names if name in inside and (index is not None or Path(place, name).is_dir())]
    if len(found) == 1:
        return place, keywords | {"subfolder": found[0]}
    if found or index is not None:
        raise ValueError(
            f"{pretrained} is a pipeline of {', '.join(sorted(inside))}; expected one with exactly one of "
            f"{', '.join(names)}, or name the folder of the component itself"
        )
    return place, keywords


def _index(place: str, keywords: dict[str, str]) -> dict[str, Any] | None:
    """Return the ``model_index.json`` of a folder or Hub repository, None if it has none."""
    path = Path(place, INDEX)
    if on_hub(place):
        try:
            path = Path(hf_hub_download(place, INDEX, revision=keywords.get("revision")))
        except EntryNotFoundError:  # also offline, if the cached model is no pipeline
            return None
    if not path.is_file():
        return None
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return index


def _components(index: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and value and value[0] is not None and not name.startswith("_")
    ]
