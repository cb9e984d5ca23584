"""Being asked to stop: SIGTERM and SIGUSR1 end a run at the next safe moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")
PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Raised where a run was asked to stop; its exit code is 128 + the signal's number, as a shell would give it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class StopSignals:
    """Which signal has asked this process to stop, if any. A second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = 0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Raise `Stopped` from wherever a signal arrives inside this context, unless it is `held`."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows no handlers here: signals do what they did before
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        end_with_launcher()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait while a context lasts that must not be cut in two: only `received` tells of them."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)  # whatever is being written is written aside: nothing is harmed
        self.received = number
        if not self._held:
            raise Stopped(number)


def end_with_launcher() -> None:
    """Ask the system for a SIGTERM when the launcher dies, if one started this process (Linux only).

    A SIGTERM to a one-process ``accelerate launch`` ends the launcher and never reaches what it launched. Without a
    launcher nothing is asked for: a training that was started from a shell outlives it.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if any(launcher in command for launcher in LAUNCHERS):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)
