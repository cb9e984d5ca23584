"""``ldm join``: the models of finished stages as the folder of one pipeline."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import ldm
from ldm.config.places import on_hub, portable
from ldm.export.join import join as join_folders


def join(pipeline: str, stages: list[str], to: str) -> Path:
    """Write the folder `to`, a pipeline with the models of finished stages, and return it.

    What does not fit together is refused: widths, sizes, components that must be equal, images held out.

    Args:
        pipeline: Name of the pipeline's class, such as UnCLIPPipeline.
        stages: Folder or Hub name of each stage's model, in any order.
        to: Folder to write. One that was joined from the same models stays as it is.

    """
    named: dict[str, str] = {}
    for place in stages:
        name = stage_name(place)
        named[name if name not in named else f"{name}-{len(named) + 1}"] = place
    return join_folders(pipeline, named, Path(to), pipeline_classes())


def stage_name(place: str) -> str:
    """Return a name for a stage by its place, without the folders of this machine: that of the training's folder."""
    path = PurePath(place)
    if path.name == "model" and not on_hub(place):
        path = path.parent
    return PurePath(portable(str(path))).name or "stage"


def pipeline_classes() -> dict[str, Any]:
    """Return our pipelines' classes by name; ImportError without a checkout, in which their source is."""
    checkout = Path(ldm.__file__).parents[1]
    if not (checkout / "pipelines").is_dir():
        raise ImportError("the pipelines' source is not installed with ldm: join models in a checkout of it")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))
    classes: dict[str, Any] = import_module("pipelines").PIPELINES
    return classes
