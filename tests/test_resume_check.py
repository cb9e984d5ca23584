"""The proof of an exact resume finds what is not exact, and runs on a user's config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.training.resume_check import STEPS, differences

from .test_loop import train

ROOT = Path(__file__).parent.parent


def run(folder, **changes):
    train(folder, 2 * STEPS, save_every_steps=STEPS, validate_every_steps=STEPS, **changes)
    return folder


def test_equal_runs_have_no_differences(tmp_path):
    assert list(differences(run(tmp_path / "a"), run(tmp_path / "b"))) == []


def test_one_other_step_is_found_in_weights_optimiser_state_and_metrics(tmp_path):
    found = "\n".join(differences(run(tmp_path / "a"), run(tmp_path / "b", poison={3})))  # one step is skipped
    assert "main-weights: weight differs by" in found
    assert "main-average: weight differs by" in found
    assert "main-optimizer: " in found
    assert "state.json differs" in found
    assert "loss/main is" in found


def test_a_metric_that_was_logged_otherwise_is_found(tmp_path):
    for name in "ab":
        run(tmp_path / name)
    file = tmp_path / "b" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["loss/main"] += 1e-12
    file.write_text("\n".join(map(json.dumps, rows)))
    (found,) = differences(tmp_path / "a", tmp_path / "b")
    assert found.startswith("step 3: loss/main is")


@pytest.mark.slow
def test_the_tiny_autoencoder_proves_its_resume(tmp_path):
    command = [sys.executable, "train_vae.py", "--config", "configs/tiny/vae.yaml", "--resume_check", "true"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{STEPS} + {STEPS} steps equal {2 * STEPS}, to the bit" in done.stdout
