"""One process of one run: its devices, its folder, and what it tells the world."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from filelock import FileLock
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.config import LoopConfig
from ldm.errors import HubError
from ldm.machine import cores
from ldm.models.network import set_attention_and_memory
from ldm.training.launcher import check_launcher
from ldm.training.lock import lock_folder
from ldm.training.precision import chosen_precision
from ldm.training.processes import join_processes, same_everywhere
from ldm.training.resume import saved_state
from ldm.training.signals import Stopped, StopSignals
from ldm.training.trackers import refuse_missing_trackers, show_image, start_trackers

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")
CHECKPOINTS = "checkpoints"
"""Folder in a run's folder."""


class Run:
    """Accelerator, output folder, metrics and images of a run; built once, before any network."""

    def __init__(self, output_dir: str, seed: int, config: LoopConfig):
        """Join the processes of the run; nothing is written before `open`.

        Raises:
            ImportError: a tracker is not installed.
            RuntimeError: the launcher started other processes than the config or the devices allow.

        """
        self.seed = seed
        self.config = config
        self.folder = Path(output_dir)
        refuse_missing_trackers(config.trackers)
        join_processes(config.process_timeout_seconds)
        self.saved = saved_state(self.folder / CHECKPOINTS)
        """``state.json`` of the checkpoint that the run goes on from, {} for a new run."""
        recorded = self.saved.get("record", {}).get("precision")
        self.accelerator = Accelerator(
            mixed_precision=same_everywhere(chosen_precision(config.mixed_precision, recorded)),
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(self.folder / "logs")),
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise RuntimeError(
                f"{launched} processes were launched but each sees {self.accelerator.num_processes}: on CPU use "
                "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
            )
        check_launcher(config, launched)
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.lock: FileLock | None = None
        self.stop = StopSignals()
        self.watch: Callable[[Mapping[str, float], int], None] | None = None
        """Called with all metrics and their step, in the first process, once they are written."""

    def open(self) -> None:
        """Make the folder and lock it, share out the cores, start the trackers.

        Raises:
            RuntimeError: another process trains in the folder.

        """
        if self.device.type == "cpu":
            # accelerate launch leaves one thread to each process; share out the cores instead
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, cores() // local))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            self.lock = lock_folder(self.folder)
        start_trackers(self.accelerator, self.config.trackers, self.folder)
        log.info(
            "%s, %d process(es), %d thread(s) each, %s",
            self.device,
            self.accelerator.num_processes,
            torch.get_num_threads(),
            {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
        )

    @property
    def precision(self) -> str:
        """Return what is computed in: no (float32), bf16 or fp16."""
        return str(self.accelerator.mixed_precision)

    def stop_if_asked(self) -> None:
        """Raise `Stopped` in every process if a signal has asked any of them to stop."""
        asked = self.stop.received or 0
        if self.accelerator.num_processes > 1:
            asked = int(self.accelerator.gather(torch.tensor([asked], device=self.device)).max())
        if asked:
            raise Stopped(asked)

    def agreed(self, value: V) -> V:
        """Return the first process's value in every process: clocks differ, and all must do the same."""
        return same_everywhere(value)

    def prepare(self, module: M) -> M:
        """Return the module as it is called in training: autocast, and gradients averaged over processes."""
        return cast(M, self.accelerator.prepare_model(module))

    def switch(self, network: nn.Module) -> None:
        """Switch on what the config asks for of memory and attention; see `set_attention_and_memory`."""
        set_attention_and_memory(
            network, gradient_checkpointing=self.config.gradient_checkpointing, xformers=self.config.xformers
        )

    def attention(self) -> AbstractContextManager[None]:
        """Return the context of forward and backward.

        On CPU without the fused attention kernel, whose backward took a third of a step at these sizes.
        """
        if self.device.type == "cpu":
            return cast(AbstractContextManager[None], sdpa_kernel(SDPBackend.MATH))
        return contextlib.nullcontext()

    def log_metrics(self, metrics: Mapping[str, float], global_step: int) -> None:
        """Write metrics to ``metrics.jsonl`` and to the trackers."""
        if not self.is_main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": global_step, **metrics}) + "\n")
        self.accelerator.log(dict(metrics), step=global_step)
        if self.watch is not None:
            self.watch(metrics, global_step)

    def log_alarm(self, name: str, sentence: str, global_step: int) -> None:
        """Warn, and write the alarm to ``alarms.jsonl``."""
        if not self.is_main:
            return
        log.warning("%s: %s", name, sentence)
        with (self.folder / "alarms.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": global_step, "alarm": name, "sentence": sentence}) + "\n")

    def forget_metrics_after(self, global_step: int) -> None:
        """Drop the lines, of metrics and alarms, that a resumed run is about to write again."""
        for path in (self.folder / "metrics.jsonl", self.folder / "alarms.jsonl"):
            if self.is_main and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                kept = [line for line in lines if _step_of(line) <= global_step]
                if len(kept) < len(lines):
                    aside = path.with_suffix(".tmp")  # a kill must leave the old lines or the new ones, not none
                    aside.write_text("".join(kept), encoding="utf-8")
                    aside.replace(path)

    def log_image(self, name: str, image: Image.Image, global_step: int) -> None:
        """Write an image to ``<name>/step-N.png`` and to the trackers."""
        if not self.is_main:
            return
        path = self.folder / name / f"step-{global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        for tracker in self.accelerator.trackers:
            show_image(tracker, name, image, global_step)


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Run]:
    """Open the run; close trackers and the process group and unlock the folder when it ends, however it ends.

    A `HubError` ends it with exit code 1; SIGINT, SIGTERM and SIGUSR1 with 130, 143 and 138, the training saved: see
    `StopSignals`.
    """
    try:
        with run.stop.handled():
            try:
                run.open()
                yield run
            finally:
                run.accelerator.end_training()
                if run.lock is not None:
                    run.lock.release()
    except HubError as error:
        sys.exit(str(error))
    except Stopped as stopped:
        if run.is_main:
            log.warning("stopped by %s%s", stopped.name, stopped.reached)
        raise


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return sys.maxsize  # a line cut short by a kill
