"""A run that is asked to stop leaves a checkpoint of the step it has reached, and one folder takes one run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldm.training.checkpoint import CheckpointStore
from ldm.training.lock import FolderLock
from ldm.training.loop import Loop

from .test_loop import lines, train, weights

ROOT = Path(__file__).parent.parent
FOREVER = 10**9


def forked(work):
    """Run `work` in a child that starts warm; return its process number."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            work()
            code = 0
        except SystemExit as error:
            code = error.code
        finally:
            os._exit(code)
    return child


def wait_for(path, text="", seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.01)
    raise TimeoutError(path)


def exit_code(child, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise TimeoutError(f"the run did not stop in {seconds} s")


def last_step(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def saved_step(folder):
    return int(CheckpointStore(folder / "checkpoints", 1).latest().name.removeprefix("step-"))


def saves_take(monkeypatch, marker, seconds, after_step=0):
    """Let each save of a later step than `after_step` write `marker` and then wait."""
    save = CheckpointStore.save

    def slow(self, global_step, tensors, state):
        if global_step > after_step:
            marker.write_text("now")
            time.sleep(seconds)
        return save(self, global_step, tensors, state)

    monkeypatch.setattr(CheckpointStore, "save", slow)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_r21_a_signal_during_training_saves_the_step_reached_and_resuming_goes_on_exactly(number, code, tmp_path):
    settings = {"save_every_steps": FOREVER}

    def until_stopped():
        train(tmp_path / "stopped", FOREVER, max_train_steps=FOREVER, **settings)

    child = forked(until_stopped)
    wait_for(tmp_path / "stopped" / "metrics.jsonl", '"step": 5')
    os.kill(child, number)
    assert exit_code(child) == code
    step = saved_step(tmp_path / "stopped")
    assert step == last_step(tmp_path / "stopped") >= 5


def test_r21_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def stop_at_4(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, _, _ = train(tmp_path / "whole", 9)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", 9, events=[(2, stop_at_4)])
    assert stopped.value.code == 143
    assert saved_step(tmp_path / "stopped") == 4
    again, _, _ = train(tmp_path / "stopped", 9)
    assert (weights(again) == weights(whole)).all()
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_r21_a_signal_interrupts_a_validation(tmp_path):
    def validate(step):
        (tmp_path / "validating").write_text("now")
        time.sleep(600)

    child = forked(lambda: train(tmp_path, 100, events=[(5, validate)], save_every_steps=1000))
    wait_for(tmp_path / "validating", "now")
    os.kill(child, signal.SIGTERM)
    assert exit_code(child, 30) == 143
    assert saved_step(tmp_path) == 5


def test_r21_a_signal_during_a_save_waits_for_its_end(tmp_path, monkeypatch):
    saves_take(monkeypatch, tmp_path / "saving", 0.5)
    child = forked(lambda: train(tmp_path, FOREVER, save_every_steps=7))
    wait_for(tmp_path / "saving", "now")
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143
    assert saved_step(tmp_path) == 7


def test_r21_a_second_signal_ends_the_run_at_once_and_harms_nothing(tmp_path, monkeypatch):
    saves_take(monkeypatch, tmp_path / "stuck", 600, after_step=3)
    child = forked(lambda: train(tmp_path, FOREVER, save_every_steps=3))
    wait_for(tmp_path / "stuck", "now")
    os.kill(child, signal.SIGTERM)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first signal waits for the save"
    os.kill(child, signal.SIGTERM)
    assert exit_code(child, 10) == 143
    assert saved_step(tmp_path) == 3


def test_a_signal_before_the_first_step_ends_the_run_without_a_checkpoint(tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "_resume", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, 9)
    assert stopped.value.code == 143
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, 4)
    assert signal.getsignal(signal.SIGTERM) == before


def test_r21_a_signal_to_the_launcher_reaches_the_trainer_and_leaves_no_orphan(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.test_loop import train\n"
        f"Path({str(tmp_path / 'trainer')!r}).write_text(str(os.getpid()))\n"
        f"every = {{'save_every_steps': {FOREVER}}}\n"
        f"train(Path({str(tmp_path / 'run')!r}), {FOREVER}, **every)\n"
    )
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as out:
        launcher = subprocess.Popen(launch, stdout=out, stderr=out, env=environment)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 3', 120)
    trainer = int((tmp_path / "trainer").read_text())
    assert trainer != launcher.pid
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(60)
    end = time.monotonic() + 30
    while Path(f"/proc/{trainer}").exists() and "Z" not in Path(f"/proc/{trainer}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the trainer outlives its launcher"
        time.sleep(0.05)
    assert saved_step(tmp_path / "run") == last_step(tmp_path / "run")


def test_r23_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(tmp_path):
    def first():
        train(tmp_path, FOREVER, save_every_steps=FOREVER)

    child = forked(first)
    wait_for(tmp_path / "metrics.jsonl", '"step": 1')
    with pytest.raises(RuntimeError, match=f"process {child} trains in this folder"):
        train(tmp_path, 3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = FolderLock(tmp_path)  # a killed run leaves no stale lock
    lock.release()
