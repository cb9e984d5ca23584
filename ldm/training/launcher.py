"""The flags of ``accelerate launch``: those that a run cannot follow are said, never silently left aside."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from ldm.config import LoopConfig

log = logging.getLogger(__name__)
UNSUPPORTED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Ways to shard a model that the launcher switches on by ``ACCELERATE_USE_...``; here each process has a whole one."""


def check_launcher(config: LoopConfig, num_processes: int) -> None:
    """Warn of flags that are not followed; `chosen_precision` handles `--mixed_precision`.

    Raises:
        RuntimeError: sharding is switched on; or several processes were asked for and there is one.

    """
    for kind in UNSUPPORTED:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false") == "true":
            raise RuntimeError(
                f"accelerate launch --use_{kind.lower()}: models are not sharded here, each process has a whole one; "
                "leave the flag out (or say so in `accelerate config`)"
            )
    flags = launch_flags()
    if num_processes == 1 and flags.get("num_processes", "1") not in ("0", "1"):
        raise RuntimeError(
            f"accelerate launch --num_processes {flags['num_processes']} has started one process: on CPU use "
            "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N"
        )
    steps = flags.get("gradient_accumulation_steps", str(config.gradient_accumulation_steps))
    if steps != str(config.gradient_accumulation_steps):
        log.warning(
            "accelerate launch --gradient_accumulation_steps %s is not followed: the config says "
            "loop.gradient_accumulation_steps: %d", steps, config.gradient_accumulation_steps,
        )  # fmt: skip


def launch_flags() -> dict[str, str]:
    """Return the flags of the ``accelerate launch`` that started this process; {} if none did, or none can be seen."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # no Linux
        return {}
    start = next(
        (place for place, word in enumerate(words) if Path(word).name in ("accelerate", "accelerate-launch")), None
    )
    return {} if start is None else _flags(words[start + 1 :])


def _flags(words: list[str]) -> dict[str, str]:
    """Return ``--name value`` and ``--name=value`` of a command line, up to the script."""
    found: dict[str, str] = {}
    before_script = words[: next((place for place, word in enumerate(words) if word.endswith(".py")), len(words))]
    for word, following in zip(before_script, [*before_script[1:], ""], strict=True):
        if match := re.fullmatch("--([a-z_-]+)(?:=(.*))?", word):
            found[match[1].replace("-", "_")] = following if match[2] is None else match[2]
    return found
