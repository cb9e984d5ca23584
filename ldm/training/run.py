"""One process of one run: its devices, its folder, and what it tells the world."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, parse_flag_from_env
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.config import LoopConfig
from ldm.hub import HubError
from ldm.models.network import set_attention_and_memory
from ldm.provenance import cores
from ldm.training.lock import FolderLock
from ldm.training.signals import Stopped, StopSignals
from ldm.training.trackers import refuse_missing_trackers, show_picture, start_trackers

log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")


class Run:
    """Accelerator, output folder, metrics and pictures of a run; built once, before any network."""

    def __init__(self, output_dir: str, seed: int, config: LoopConfig):
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO, stream=sys.stderr
        )
        for client in ("httpx", "httpx2"):
            logging.getLogger(client).setLevel(logging.WARNING)  # a line for each request, with signed addresses
        self.seed = seed
        self.config = config
        self.folder = Path(output_dir)
        refuse_missing_trackers(config.trackers)
        join_processes(config.process_timeout_seconds)
        self.accelerator = Accelerator(
            mixed_precision=same_everywhere(native_precision(config.mixed_precision)),
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(self.folder / "logs")),
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.accelerator.num_processes:
            raise RuntimeError(
                f"{launched} processes were launched but each sees {self.accelerator.num_processes}: on CPU use "
                "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
            )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        if not self.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        if self.device.type == "cpu":
            # accelerate launch leaves one thread to each process; share out the cores instead
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, cores() // local))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FolderLock(self.folder) if self.is_main else None
        self.stop = StopSignals()
        self.watch: Callable[[Mapping[str, float], int], None] | None = None
        """Called with all metrics and their step, in the first process, once they are written."""
        start_trackers(self.accelerator, config.trackers, self.folder)
        log.info(
            "%s, %d process(es), %d thread(s) each, %s",
            self.device,
            self.accelerator.num_processes,
            torch.get_num_threads(),
            {"no": "float32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
        )

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
                aside = path.with_suffix(".tmp")  # a kill must leave the old lines or the new ones, not none
                aside.write_text("".join(line for line in lines if _step_of(line) <= global_step), encoding="utf-8")
                aside.replace(path)

    def log_picture(self, name: str, picture: Image.Image, global_step: int) -> None:
        """Write a picture to ``<name>/step-N.png`` and to the trackers."""
        if not self.is_main:
            return
        path = self.folder / name / f"step-{global_step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        for tracker in self.accelerator.trackers:
            show_picture(tracker, name, picture, global_step)


def join_processes(timeout_seconds: float) -> None:
    """Start the process group if there are several processes; one that waits longer than this for another ends."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_seconds))


def same_everywhere(value: V) -> V:
    """Return the first process's value in every process."""
    return cast(V, broadcast_object_list([value])[0])


def native_precision(wanted: str) -> str:
    """Return `wanted`, or for "auto" bf16 where the device computes faster with it, else "no" (float32).

    A processor is asked and not believed: with AVX2 alone convolutions in bf16 ran ten times slower than in float32,
    with AVX512-BF16 on one maker's at 1.5 times the speed and on another's at 0.65.
    """
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    able = torch.cpu.get_capabilities()
    return "bf16" if (able.get("avx512_bf16") or able.get("amx_bf16")) and bf16_speed() > 1.2 else "no"


@functools.cache
def bf16_speed() -> float:
    """Return how many times faster this processor multiplies matrices in bf16 than in float32, measured once."""
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(7):  # in turn, and the best of each: other processes slow down some of them
        for dtype in seconds:
            matrix = torch.ones(1024, 1024, dtype=dtype)
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - began)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@contextlib.contextmanager
def finishing(run: Run) -> Iterator[Run]:
    """Close trackers and the process group and unlock the folder when the run ends, however it ends.

    A `HubError` ends it with exit code 1; SIGINT, SIGTERM and SIGUSR1 with 130, 143 and 138, the training saved: see
    `StopSignals`.
    """
    try:
        with run.stop.handled():
            try:
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
