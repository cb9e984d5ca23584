"""Snapshots of power-function averages during a training, from which one of any length is made afterwards."""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.files import put_in_place, written_aside
from ldm.training.averages import Average
from ldm.training.progress import Progress
from ldm.training.run import Run
from ldm.training.state import trained_state

log = logging.getLogger(__name__)
FOLDER = "snapshots"
_FILE = re.compile(r"step-(\d+)-[0-9.e-]+\.safetensors")
_HEADER_BYTES = 256
"""Allowance for a tensor's entry in the header of a file."""


@dataclass(frozen=True)
class Snapshot:
    """A power-function average as it stood at a step of a training."""

    path: Path
    global_step: int
    steps_taken: int
    """Those of the steps that changed the weights: the average's own time."""
    sigma_rel: float
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, and of which there is no average."""


class Snapshots:
    """``OUTPUT_DIR/snapshots/step-0000100-0.05.safetensors``: what is trained, averaged, one file a step and length.

    An event of the loop. Float32: float16, which Karras et al. 2024 keep, lost 2e-4 of a random walk, and 3e-3 for a
    length of 0.02, whose factors are large; a reconstruction from 32 snapshots lost less, at lengths up to 0.15.
    """

    def __init__(self, run: Run, progress: Progress, averages: Mapping[float, Average]):
        self.run, self.progress, self.averages = run, progress, averages
        self.folder = run.folder / FOLDER

    def forget_later(self) -> None:
        """Delete the snapshots of steps after the one that training stands at: it is about to take them again."""
        if self.run.is_main and self.folder.is_dir():
            for path in (*self.folder.glob("*.tmp"), *self.folder.glob(".tmp-*")):  # the second: of version 0.1.0
                path.unlink()
            for path in self.folder.glob("step-*"):
                if (match := _FILE.fullmatch(path.name)) and int(match[1]) > self.progress.global_step:
                    path.unlink()

    def __call__(self, global_step: int) -> None:
        """Write a file for each average, each put in place by one rename; one that fails is a warning."""
        steps_taken = self.progress.steps_taken
        if not self.run.is_main or not steps_taken:  # an average of no step is none
            return
        for sigma_rel, average in self.averages.items():
            path = self.folder / f"step-{global_step:07d}-{sigma_rel}.safetensors"
            about = {"global_step": str(global_step), "steps_taken": str(steps_taken), "sigma_rel": repr(sigma_rel)}
            frozen = [name for name, weight in average.original.named_parameters() if not weight.requires_grad]
            about["frozen"] = json.dumps(frozen)
            tensors = trained_state(average.module, average.original)
            try:
                with self.run.stop.held():
                    _write(path, tensors, about)
            except (OSError, SafetensorError) as error:
                needed = _size(tensors)
                log.warning("%s, which needs %d bytes, was not written: %s. Training goes on", path, needed, error)


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Return the snapshots of the training in `folder`, oldest first.

    Raises:
        ValueError: there are none, or a file is none.

    """
    found = [_read(path) for path in (folder / FOLDER).glob("step-*.safetensors")]
    if not found:
        raise ValueError(
            f"{folder / FOLDER} holds no snapshots: averages are kept during a training if snapshot_every_steps is set "
            "(50 snapshots are plenty), and cannot be made of one that is over"
        )
    return sorted(found, key=lambda snapshot: (snapshot.global_step, snapshot.sigma_rel))


def read_tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    """Return the tensors of a snapshot, on the CPU; raises ValueError if it cannot be read."""
    try:
        with safe_open(snapshot.path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    except (OSError, SafetensorError) as error:
        raise _bad(snapshot.path, error) from error


def _read(path: Path) -> Snapshot:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        steps, taken = int(about["global_step"]), int(about["steps_taken"])
        sigma_rel = float(about["sigma_rel"])
        if not (0 < taken <= steps and 0 < sigma_rel < math.inf):
            raise ValueError(f"steps {steps}, {taken} of them taken, length {sigma_rel}")
        frozen = tuple(json.loads(about.get("frozen", "[]")))  # version 0.1.0 trained whole networks
        return Snapshot(path, steps, taken, sigma_rel, frozen)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _bad(path, error) from error


def _bad(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is no snapshot ({error}); delete it, the others are enough if they are many")


def _write(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path.parent) as aside:
        if _size(tensors) > (free := shutil.disk_usage(path.parent).free):
            raise OSError(errno.ENOSPC, f"{free} bytes are free")
        # copied: the file format has neither tied weights nor layouts
        copies = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(copies, aside, about)
        put_in_place(aside, path)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes + len(name) + _HEADER_BYTES for name, tensor in tensors.items())
