"""Trackers of a run: started so that they tell no host, user or path, and shown images."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from accelerate import Accelerator, tracking
from PIL import Image

WANDB_SETTINGS = {
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "host": "localhost",
    "username": "user",
}
"""Without them it records host, user, paths, the command line and the git remote."""


def refuse_missing_trackers(trackers: Sequence[str]) -> None:
    """Raise ImportError if a tracker's package is not installed; accelerate would go on without a word."""
    available = {str(tracker) for tracker in tracking.get_available_trackers()}
    if missing := [name for name in trackers if name not in available]:
        raise ImportError(
            f"loop.trackers: {' and '.join(missing)} not installed; pip install {' '.join(missing)}, or leave out what "
            "is missing (--loop.trackers '[tensorboard]')"
        )


def start_trackers(accelerator: Accelerator, trackers: Sequence[str], folder: Path) -> None:
    """Start the trackers of a run in `folder`, after which the run is called."""
    if not trackers:
        return
    settings: dict[str, dict[str, Any]] = {
        "wandb": {"name": folder.name, "dir": str(folder), "settings": WANDB_SETTINGS},
        "trackio": {"name": folder.name},
    }
    with _on_localhost("tensorboard" in trackers):
        accelerator.init_trackers("ldm", init_kwargs=settings)


def show_image(tracker: Any, name: str, image: Image.Image, global_step: int) -> None:
    """Log an image, of any mode, to one tracker."""
    if tracker.name == "tensorboard":
        pixels = np.asarray(image.convert("RGB"))
        tracker.writer.add_image(name, pixels, global_step, dataformats="HWC")
    else:  # wandb and trackio have a class of one name, whose objects are logged as numbers are
        package = importlib.import_module(tracker.name)
        tracker.log({name: package.Image(image)}, step=global_step)


@contextmanager
def _on_localhost(wanted: bool) -> Iterator[None]:
    """Let TensorBoard believe, if `wanted`, that the host is called localhost: the name goes into that of its file."""
    if not wanted:
        yield
        return
    module: Any = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    socket = module.socket
    module.socket = SimpleNamespace(gethostname=lambda: "localhost")
    try:
        yield
    finally:
        module.socket = socket
