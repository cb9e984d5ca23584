"""A run that is asked to stop leaves a checkpoint of the step it has reached, and one folder takes one run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_text2img
import train_vae
from ldm.commands import cli
from ldm.training import signals
from ldm.training.checkpoint import CheckpointStore
from ldm.training.lock import lock_folder
from ldm.training.loop import Loop

from . import trainers
from .test_loop import lines, train, weights
from .test_processes import alive, children
from .test_resume import VAE

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


def wait_until_gone(process, seconds=30):
    end = time.monotonic() + seconds
    while alive(process):
        assert time.monotonic() < end, f"process {process} is still there"
        time.sleep(0.02)


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_r21_r27_a_signal_during_training_saves_the_step_reached_and_resuming_goes_on_exactly(number, code, tmp_path):
    settings = {"save_every_steps": FOREVER}

    def until_stopped():
        train(tmp_path / "stopped", FOREVER, max_train_steps=FOREVER, **settings)

    child = forked(until_stopped)
    wait_for(tmp_path / "stopped" / "metrics.jsonl", '"step": 5')
    os.kill(child, number)
    assert exit_code(child) == code
    step = saved_step(tmp_path / "stopped")
    assert step == last_step(tmp_path / "stopped") >= 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r21_r27_a_stopped_and_resumed_run_equals_an_uninterrupted_one(number, code, tmp_path):
    def stop_at_4(step):
        if step == 4:
            os.kill(os.getpid(), number)

    whole, _, _ = train(tmp_path / "whole", 9)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "stopped", 9, events=[(2, stop_at_4)])
    assert stopped.value.code == code
    assert saved_step(tmp_path / "stopped") == 4
    again, _, _ = train(tmp_path / "stopped", 9)
    assert (weights(again) == weights(whole)).all()
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r21_r27_a_signal_interrupts_a_validation(number, code, tmp_path):
    def validate(step):
        (tmp_path / "validating").write_text("now")
        time.sleep(600)

    child = forked(lambda: train(tmp_path, 100, events=[(5, validate)], save_every_steps=1000))
    wait_for(tmp_path / "validating", "now")
    os.kill(child, number)
    assert exit_code(child, 30) == code
    assert saved_step(tmp_path) == 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r21_r27_a_signal_during_a_save_waits_for_its_end_and_its_repeats_belong_to_it(
    number, code, tmp_path, monkeypatch
):
    saves_take(monkeypatch, tmp_path / "saving", 0.5)
    child = forked(lambda: train(tmp_path, FOREVER, save_every_steps=7))
    wait_for(tmp_path / "saving", "now")
    for _ in range(2):  # as `timeout` does: to the process and to its group
        os.kill(child, number)
        time.sleep(0.02)
    assert exit_code(child) == code
    assert saved_step(tmp_path) == 7


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_r21_r27_a_second_signal_ends_the_run_at_once_and_harms_nothing(number, code, tmp_path, monkeypatch):
    saves_take(monkeypatch, tmp_path / "stuck", 600, after_step=3)
    child = forked(lambda: train(tmp_path, FOREVER, save_every_steps=3))
    wait_for(tmp_path / "stuck", "now")
    os.kill(child, number)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the first signal waits for the save"
    os.kill(child, number)
    assert exit_code(child, 10) == code
    assert saved_step(tmp_path) == 3


class Asks:
    """A part of a class that stops this process while the class is made, as members of an enum run code then."""

    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


@pytest.mark.parametrize("when", ["before the loop", "between steps"])
def test_r21_r27_a_signal_while_a_class_is_made_is_no_other_error(when, tmp_path, monkeypatch):
    """Before Python 3.12 it becomes a RuntimeError, whose cause it is: an import of a module with an enum is enough."""

    def made(*arguments):
        type("Made", (), {"part": Asks()})

    if when == "before the loop":
        monkeypatch.setattr(Loop, "resume", made)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, 9, events=[(3, made)])
    assert stopped.value.code == 130
    if when == "between steps":
        assert saved_step(tmp_path) == 3


@pytest.mark.parametrize("sent", ["to the launcher", "to its process group"])
def test_r21_r27_the_end_of_the_launcher_cuts_no_save_short(sent, tmp_path, monkeypatch):
    """Ctrl-C ends the launcher at once and asks the trainer to stop; the launcher's end does not ask again."""
    saves_take(monkeypatch, tmp_path / "saving", 0.5)
    monkeypatch.setattr(signals, "LAUNCHERS", (Path("/proc/self/cmdline").read_bytes(),))  # forks look alike

    def launch():
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        trainer = forked(lambda: train(tmp_path, FOREVER, save_every_steps=7))
        (tmp_path / "trainer").write_text(str(trainer))
        os.waitpid(trainer, 0)

    launcher = forked(launch)
    wait_for(tmp_path / "saving", "now")
    if sent == "to the launcher":
        os.kill(launcher, signal.SIGTERM)
    else:
        os.killpg(launcher, signal.SIGINT)
    os.waitpid(launcher, 0)
    wait_until_gone(int((tmp_path / "trainer").read_text()))
    assert saved_step(tmp_path) == 7


@pytest.mark.parametrize(
    ("more", "when", "line"),
    [
        ((), "1 process(es)", "stopped by SIGINT"),
        (("--doctor",), "learning 8 images by heart", "stopped by SIGINT"),
        (("--data.workers", 2), '"step": 3', "stopped by SIGINT at step"),
    ],
    ids=["before the loop", "in the doctor", "beside loaders"],
)
def test_r27_ctrl_c_is_one_line_and_leaves_no_process_and_nothing_half_written(more, when, line, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = (*VAE, *more, "--loop.max_train_steps", FOREVER, "--output_dir", run)
    process = trainers.start("train_vae.py", arguments, log)
    wait_for(run / "metrics.jsonl" if "step" in when else log, when)
    loaders = children(process.pid)
    os.kill(process.pid, signal.SIGINT)
    code, said = trainers.ended(process), log.read_text()
    assert code == 130, said[-3000:]
    assert said.count("stopped by") == said.count(line) == 1
    assert "Traceback" not in said
    for loader in loaders:
        wait_until_gone(loader)
    saved = list(run.rglob("step-*/manifest.json"))
    assert bool(saved) == ("goes on from there" in said)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize("module", [train_vae, train_text2img, cli])
def test_r27_ctrl_c_outside_of_a_run_is_one_line_and_130(module, monkeypatch, capsys):
    def interrupted(*given, **more):
        raise KeyboardInterrupt

    def wrapped(*given, **more):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(sys, "argv", ["ldm", "--help"])
    monkeypatch.setattr(module, "overview" if module is cli else "load_config", interrupted)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    monkeypatch.setattr(module, "overview" if module is cli else "load_config", wrapped)
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 130


def test_a_signal_before_the_first_step_ends_the_run_without_a_checkpoint(tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "resume", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, 9)
    assert stopped.value.code == 143
    assert not list(tmp_path.glob("checkpoints/step-*"))


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, 4)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
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
    wait_until_gone(trainer)
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
    lock_folder(tmp_path).release()  # a killed run leaves no stale lock


def test_r23_a_lock_is_its_processs_own_and_not_that_of_processes_it_leaves_behind(tmp_path):
    def locking():
        lock = lock_folder(tmp_path)
        (tmp_path / "left behind").write_text(str(forked(lambda: time.sleep(60))))
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} trains in this folder"):
            lock_folder(tmp_path)
        (tmp_path / "ready").touch()
        time.sleep(60)
        lock.release()

    child = forked(locking)
    wait_for(tmp_path / "ready")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock_folder(tmp_path).release()
    os.kill(int((tmp_path / "left behind").read_text()), signal.SIGKILL)
