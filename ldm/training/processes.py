"""The processes of one run: joined, and of one mind."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

V = TypeVar("V")


def join_processes(timeout_seconds: float) -> None:
    """Start the process group if there are several processes; one that waits longer than this for another ends."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_seconds))


def same_everywhere(value: V) -> V:
    """Return the first process's value in every process."""
    return cast(V, broadcast_object_list([value])[0])


def faults_everywhere(fault: str | None) -> list[str]:
    """Return the faults of all processes, those without one left out; the same list in every process."""
    return [fault for fault in gather_object([fault]) if fault is not None]


def refuse_apart(what: str, value: object) -> None:
    """Raise RuntimeError in every process unless `value` is equal in all; `what` names it in the message."""
    values = gather_object([value])
    apart = [number for number, other in enumerate(values) if other != values[0]]
    if apart:
        raise RuntimeError(
            f"{what} of process {apart[0]} differ from those of process 0 ({len(apart)} of {len(values)} differ): all "
            "processes must read the same files; put output_dir and what the config names where all of them see it"
        )
