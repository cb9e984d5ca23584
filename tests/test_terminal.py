"""What is read while something runs: short lines with the time, above one bar; in a file, lines alone."""

import logging
import re
import threading
import time
from types import SimpleNamespace

import pytest
from tqdm.auto import tqdm

from ldm import terminal
from ldm.terminal import Lines, progress_bar, write_lines


class Terminal(list):
    """A stderr that keeps what is written, and says whether it is a terminal."""

    encoding = "utf-8"

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal

    def write(self, text):
        self.append(text)

    def flush(self):
        pass

    def shown(self):
        return "".join(self)


@pytest.fixture
def stderr(request, monkeypatch):
    made = Terminal(request.param)
    monkeypatch.setattr(terminal, "sys", SimpleNamespace(stderr=made))  # pytest puts its own into sys
    monkeypatch.setattr(terminal.log, "handlers", [handler := Lines()])
    monkeypatch.setattr(terminal.log, "propagate", False)
    monkeypatch.setattr(terminal.log, "level", logging.INFO)
    yield made
    handler.close()


@pytest.mark.parametrize("stderr", [True, False], indirect=True)
@pytest.mark.parametrize(
    ("level", "line"),
    [
        (logging.INFO, r"\d\d:\d\d:\d\d step 400: held-out loss 0\.412\n"),
        (logging.WARNING, r"\d\d:\d\d:\d\d WARNING: step 400: held-out loss 0\.412\n"),
    ],
)
def test_a_line_has_the_time_and_says_if_it_is_a_warning(stderr, level, line):
    terminal.log.log(level, "step %d: held-out loss %.3f", 400, 0.412)
    assert re.fullmatch(line, stderr.shown())


@pytest.mark.parametrize("stderr", [True], indirect=True)
def test_on_a_terminal_one_bar_is_shown_and_lines_stand_above_it(stderr):
    with progress_bar(4, "training", "step", delay=0) as bar:
        bar.update()
        with progress_bar(2, "sampling", "image", delay=0) as inner:
            inner.update(2)
        terminal.log.info("step 1: held-out loss 0.4")
        bar.update()
    assert "training" in stderr.shown()
    assert "sampling" not in stderr.shown()
    assert re.search(r"\r +\r\d\d:\d\d:\d\d step 1: held-out loss 0\.4\n", stderr.shown())  # the bar gives way
    assert stderr.shown().endswith("\r")  # and is gone in the end
    with progress_bar(2, "sampling", "image", delay=0) as alone:
        alone.update()
    assert "sampling" in stderr.shown()


@pytest.mark.parametrize("stderr", [True], indirect=True)
def test_what_a_bar_waits_for_before_it_moves_is_shown(stderr):
    with progress_bar(4, "hashing", "image", delay=1e-9) as bar:
        with progress_bar(2, "rendering", "image", delay=0) as inner:
            inner.update(2)
        bar.update()
        bar.refresh()
    assert stderr.shown().index("rendering") < stderr.shown().index("hashing")
    assert "\n" not in stderr.shown()


@pytest.mark.parametrize("stderr", [True], indirect=True)
def test_what_is_done_in_a_second_shows_no_bar(stderr):
    with progress_bar(4, "training", "step") as bar:
        bar.update(4)
    assert stderr.shown().strip() == ""


@pytest.mark.parametrize("stderr", [False], indirect=True)
def test_in_a_file_a_progress_is_a_line_from_time_to_time(stderr, monkeypatch):
    monkeypatch.setattr(terminal, "FILE_SECONDS", 0.0)
    with progress_bar(4, "training", "step", mininterval=0) as bar:
        bar.set_postfix_str("loss 0.3", refresh=False)
        bar.update(3)
    (line,) = [line for line in stderr.shown().splitlines() if "3 of 4" in line][:1]
    assert re.fullmatch(r"\d\d:\d\d:\d\d training: 3 of 4, 00:00 so far, 00:00 left, loss 0\.3", line)
    assert "\r" not in stderr.shown()


def test_libraries_are_heard_from_warnings_on(monkeypatch):
    root, own = logging.getLogger(), logging.getLogger("ldm")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(own, "level", own.level)
    write_lines()
    assert [type(handler) for handler in root.handlers] == [Lines]
    assert not logging.getLogger("some.library").isEnabledFor(logging.INFO)
    assert logging.getLogger("ldm.training.loop").isEnabledFor(logging.INFO)
    monkeypatch.setenv("RANK", "1")
    write_lines()
    assert not logging.getLogger("ldm.training.loop").isEnabledFor(logging.INFO)


@pytest.mark.parametrize("stderr", [False], indirect=True)
def test_a_line_and_a_bar_that_is_drawn_meanwhile_do_not_wait_for_each_other(stderr):
    drawing = threading.Event()

    def draw():  # as tqdm's monitor: under tqdm's lock, and a bar in a file is a line of the log
        with tqdm.get_lock():
            drawing.set()
            time.sleep(0.1)
            terminal.log.info("training: 3 of 4")

    def say():
        drawing.wait()
        terminal.log.info("step 3")

    threads = [threading.Thread(target=target, daemon=True) for target in (draw, say)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert [line.split(" ", 1)[1] for line in stderr.shown().splitlines()] == ["training: 3 of 4", "step 3"]
