"""Trainings in processes of their own, forked from one that has everything imported: warm, and killed for real."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from ldm.training import contrastive, loop, steps
from ldm.training.checkpoint import CheckpointStore

ROOT = Path(__file__).parent.parent
STEPS = 8
KILLED = -signal.SIGKILL
QUICK = (
    *("--loop.max_train_steps", STEPS, "--loop.save_every_steps", 1, "--loop.log_every_steps", 1),
    *("--loop.validate_every_steps", 4, "--loop.keep_checkpoints", 2, "--loop.trackers", "[]"),
    *("--loop.mixed_precision", "no", "--optim.warmup_steps", 2, "--validation.num_images", 2),
    *("--validation.loss_images", 4, "--validation.num_inference_steps", 1),
)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train_clip", "train_text2img", "train_vae", "tests.trainers"])


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a training, at a micro-batch of a step, in one of its processes."""

    do: Callable[[], None]
    step: int
    micro_step: int = 0
    rank: int = 0


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def asked_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def broken() -> None:
    raise ValueError("broken on purpose")


def loaders_killed() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def gone() -> None:
    os._exit(0)


def start(script: str, arguments: Sequence[object], log: Path, faults: Sequence[Fault] = (), **environment: object):
    """Start ``python SCRIPT ARGUMENTS`` in a warm process; its stderr and stdout go to `log`."""
    here = os.getcwd()
    os.chdir(ROOT)  # where the server that forks finds what it imports first
    try:
        forkserver.ensure_running()
        variables = {"LDM_CACHE": os.environ["LDM_CACHE"], **{key: str(value) for key, value in environment.items()}}
        words = [str(word) for word in arguments]
        process = context.Process(target=_run, args=(script, words, str(log), list(faults), variables))
        process.start()
    finally:
        os.chdir(here)
    return process


def start_several(
    world: int,
    script: str,
    arguments: Sequence[object],
    log: Path,
    faults: Sequence[Fault] = (),
    own: Sequence[Sequence[object]] = ((), ()),
):
    """Start a training of `world` processes, as torchrun would but without torchrun; `own`: arguments of each."""
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        start(
            script,
            (*arguments, *own[rank]),
            Path(f"{log}-{rank}"),
            faults,
            RANK=rank,
            LOCAL_RANK=rank,
            ACCELERATE_USE_CPU=1,
            **shared,
        )
        for rank in range(world)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ended(process: Any, seconds: float = 120) -> int:
    """Return the exit code of a process; it is killed, and TimeoutError raised, if it takes longer than this."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {seconds} s")
    return int(process.exitcode)


def run(script: str, arguments: Sequence[object], log: Path, faults: Sequence[Fault] = ()) -> None:
    """Run a training to its end."""
    assert ended(start(script, arguments, log, faults)) == 0, log.read_text()[-3000:]


def ledger(folder: Path) -> dict[int, list[list[Any]]]:
    """Return, by step, the [position, image, caption] of each sample trained on; of repetitions the last."""
    steps: dict[int, dict[int, list[Any]]] = {}
    for file in sorted(folder.glob("ledger-*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            for sample in row["samples"]:
                steps.setdefault(row["step"], {})[sample[0]] = sample
    return {step: [samples[position] for position in sorted(samples)] for step, samples in sorted(steps.items())}


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def saved_step(folder: Path) -> int:
    latest = CheckpointStore(folder / "checkpoints", 1).latest()
    return int(latest.name.removeprefix("step-")) if latest else 0


def wait_for(path: Path, text: str = "", seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        if time.monotonic() > end:
            raise TimeoutError(f"{path.name} does not say {text!r} after {seconds} s")
        time.sleep(0.01)


def _run(script: str, words: list[str], log: str, faults: list[Fault], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rank = int(environment.get("RANK", "0"))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # one thread: two trainings run side by side
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # the system's own, as in a training that a user starts
    sys.argv = [script, *words]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (sys.stdout, sys.stderr):
        os.dup2(file, output.fileno())
    folder = Path(words[words.index("--output_dir") + 1])
    for kind in (steps.DiffusionStep, steps.AutoencoderStep, contrastive.ContrastiveStep):
        _watch(kind, folder, rank, [fault for fault in faults if fault.rank == rank])
    runpy.run_path(script, run_name="__main__")


def _watch(kind: type, folder: Path, rank: int, faults: list[Fault]) -> None:
    """Let a step write down what it is given, and the faults happen."""
    losses, build = kind.losses, loop.Loop.__init__
    seen: list[int] = []
    training: list[Any] = []

    def built(self: Any, *arguments: Any, **keywords: Any) -> None:
        training.append(self)
        build(self, *arguments, **keywords)

    def watched(self: Any, batch: Any, global_step: int) -> dict[str, Any]:
        if not training:  # it is being rehearsed
            return losses(self, batch, global_step)
        for fault in faults:
            if (fault.step, fault.micro_step) == (global_step, seen.count(global_step)):
                fault.do()
        seen.append(global_step)
        samples = list(zip(batch.positions, batch.rows, batch.captions, strict=True))
        with (folder / f"ledger-{rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": global_step, "samples": samples}) + "\n")
        return losses(self, batch, global_step)

    kind.losses = watched
    loop.Loop.__init__ = built
