"""Killed at any moment, over and over, a run that saves every step loses one step at most."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from ldm.training.checkpoint import CheckpointStore

from .test_loop import train
from .test_signals import FOREVER, forked

KILLS = 30


@pytest.mark.slow
def test_r01_kill_during_save_thirty_times_loses_at_most_the_step_that_was_being_saved(tmp_path, caplog):
    draw = random.Random(0)
    furthest, left_behind = 0, 0
    for kill in range(KILLS):
        child = forked(lambda: train(tmp_path, FOREVER, save_every_steps=1, keep_checkpoints=1))
        end = time.monotonic() + 60
        while reached(tmp_path) <= furthest:
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        while kill % 2 and not saving(tmp_path):
            assert time.monotonic() < end
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        logged = reached(tmp_path)
        left_behind += saving(tmp_path)
        store = CheckpointStore(tmp_path / "checkpoints", 1)
        store.remove_leftovers()
        latest = store.latest()
        furthest = CheckpointStore.load(latest).global_step if latest else 0
        assert logged - 1 <= furthest <= logged + 1
        assert not saving(tmp_path)
    assert left_behind > 3, "some kills hit a save"
    assert not [record for record in caplog.records if "skipped" in record.message]


def test_r01_metrics_outlive_a_kill_while_a_resume_shortens_them(tmp_path, monkeypatch):
    train(tmp_path, 4, save_every_steps=2, keep_checkpoints=9)
    before = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints" / "step-4")

    def cut_short(path, text, **options):
        with path.open("w") as file:
            file.write(text[: len(text) // 2])
        os._exit(9)

    def killed():
        monkeypatch.setattr(Path, "write_text", cut_short)
        train(tmp_path, 4, save_every_steps=2, keep_checkpoints=9)

    os.waitpid(forked(killed), 0)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    train(tmp_path, 4, save_every_steps=2, keep_checkpoints=9)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def saving(folder):
    """Return whether a checkpoint is being written, or was when its writer died."""
    return any((folder / "checkpoints").glob(".tmp-*"))


def reached(folder):
    """Return the last step that was logged; the last line may be one that was being written."""
    try:
        whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return json.loads(whole[-1])["step"] if whole else 0
