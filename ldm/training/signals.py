"""Requests to stop: Ctrl-C (SIGINT), SIGTERM and SIGUSR1 end a run at the next safe moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed")
PR_SET_PDEATHSIG = 1
REPEAT_SECONDS = 0.2
"""A signal that follows so soon is the first one again: `timeout` signals a process and then its group."""
PASSED_ON_SECONDS = 5.0
"""Seconds, as above, under a launcher: it passes on what was sent to its whole group or job."""


class Stopped(SystemExit):
    """Raised where a run was asked to stop; its exit code is 128 + the signal's number, as a shell would give it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name
        self.reached = ""
        """The end of the line ``stopped by SIGINT``: the step that was saved."""


class StopSignals:
    """The signal that has asked this process to stop, if any. A second request ends it at once.

    One request can be several signals. On Ctrl-C the terminal signals the whole process group: the launcher may pass
    the signal on, and its own end sends one more. None of these may cut short the save that the first one began.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = 0
        self._waiting = False
        self._launched = False
        self._second_from = 0.0

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Raise `Stopped` from wherever a signal arrives inside this context, unless it is `held`."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows no handlers here: signals do what they did before
            return
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        if sys.platform == "linux":
            before[signal.SIGRTMIN] = signal.signal(signal.SIGRTMIN, self._lose_launcher)
            self._launched = end_with_launcher(signal.SIGRTMIN)
        try:
            with unwrapped():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let signals wait for the end of a context that must not be cut in two; meanwhile `received` tells of them."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._waiting and self.received is not None and not self._held:
            self._waiting = False
            raise Stopped(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = number
            self._second_from = now + (PASSED_ON_SECONDS if self._launched else REPEAT_SECONDS)
            self._waiting = self._held > 0
            if not self._waiting:
                raise Stopped(number)
        elif now > self._second_from:
            os._exit(128 + number)  # whatever is being written is written aside: nothing is harmed

    def _lose_launcher(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:  # otherwise both were sent the same request
            self._receive(signal.SIGTERM, frame)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the `Stopped` or KeyboardInterrupt that was made the cause of another error in place of that error.

    Before Python 3.12, whatever is raised while a class calls ``__set_name__`` becomes a RuntimeError: a signal in the
    import of a module with an enum would end the run like a fault.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, Stopped | KeyboardInterrupt):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Turn Ctrl-C into one line on stderr and exit code 130; also a decorator, for ``main``."""
    try:
        with unwrapped():
            yield
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        raise Stopped(signal.SIGINT) from None


def end_with_launcher(number: int) -> bool:
    """Return whether a launcher started this process; if so, ask the system for a signal when it dies (Linux only).

    A SIGTERM to a one-process ``accelerate launch`` ends the launcher and never reaches what it launched. Without a
    launcher nothing is asked for: a training that was started from a shell outlives it.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False
    if not any(launcher in command for launcher in LAUNCHERS):
        return False
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)
    return True
