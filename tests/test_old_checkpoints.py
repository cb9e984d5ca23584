"""Checkpoints of every released version are resumed by this one: tests/checkpoints/VERSION/{vae,stage}/step-2.

To add those of a release: ``python -m tests.test_old_checkpoints`` writes them for the version at hand.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import AutoencoderConfig, StageConfig
from ldm.config.file import tree_differences, with_defaults
from ldm.models.provenance import versions
from ldm.training.checkpoint import CheckpointStore

from .trainers import ROOT, STEPS, metrics, run

FOLDER = Path(__file__).parent / "checkpoints"
COMMON = (
    *("--loop.max_train_steps", STEPS, "--loop.save_every_steps", 2, "--loop.log_every_steps", 1, "--data.limit", 24),
    *("--loop.mixed_precision", "no", "--loop.trackers", "[]", "--optim.warmup_steps", 2, "--validation.num_images", 2),
    *("--validation.loss_images", 4, "--validation.num_inference_steps", 1, "--loop.keep_checkpoints", 9),
)
CONFIGS = {"vae": AutoencoderConfig, "stage": StageConfig}
GAN = "{adversarial: hinge, discriminator_start_step: 1, discriminator_channels: 4, discriminator_layers: 1}"
VAE = (
    *("--config", "configs/tiny/vae.yaml", *COMMON, "--autoencoder.block_out_channels", "[4, 8]"),
    *("--reconstruction", GAN),
)
STAGE = (
    *("--config", "configs/tiny/text2img.yaml", *COMMON, "--denoiser.block_out_channels", "[8, 8]"),
    *("--denoiser.cross_attention_dim", 8, "--conditioners.text.vocab_size", 520),
    *("--conditioners.text.encoder.hidden_size", 8, "--conditioners.text.encoder.intermediate_size", 8),
)


def train(kind, folder, vae):
    """Train the vae or the stage that the checkpoints are of, from wherever `folder` stands."""
    space = ("--space.autoencoder", vae / "model") if kind == "stage" else ()
    script, arguments = {"vae": ("train_vae.py", VAE), "stage": ("train_text2img.py", STAGE)}[kind]
    changed = ("--allow_config_change", "true", "--output_dir", folder)  # new fields, and other renderings of images
    run(script, (*arguments, *space, *changed), folder.with_suffix(".log"))


@pytest.mark.parametrize("version", sorted(path.name for path in FOLDER.iterdir()))
def test_r24_checkpoints_of_a_released_version_are_resumed(version, tmp_path):
    for kind in ("vae", "stage"):
        run_folder = tmp_path / kind
        shutil.copytree(FOLDER / version / kind, run_folder / "checkpoints")
        before = CheckpointStore.load(run_folder / "checkpoints" / "step-2")
        train(kind, run_folder, tmp_path / "vae")
        assert "resumed step-2 at step 2" in run_folder.with_suffix(".log").read_text()
        assert [row["step"] for row in metrics(run_folder) if "learning_rate" in row] == list(range(3, STEPS + 1))
        after = CheckpointStore.load(run_folder / "checkpoints" / f"step-{STEPS}")
        old, new = (checkpoint.state["record"]["config"] for checkpoint in (before, after))
        changes = [*tree_differences(with_defaults(old, CONFIGS[kind]), new)]
        assert not [change for change in changes if "not set" in change], (
            "a new field's default is what was done before"
        )
        for group, tensors in before.tensors.items():
            assert after.tensors[group].keys() == tensors.keys()
            assert not all(torch.equal(after.tensors[group][name], tensors[name]) for name in tensors), group


def test_r24_a_checkpoint_of_a_later_format_says_which_version_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.manifest.FORMAT", 2)
    path = CheckpointStore(tmp_path, 1).save(1, {"weights": {"w": torch.zeros(1)}}, {})
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="format 2, expected 1: use the version of ldm that wrote it"):
        CheckpointStore.load(path)


def test_the_newest_version_has_its_checkpoints():
    assert (FOLDER / versions()["ldm"]).is_dir()
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert load_file(next(file for file in files if file.name == "denoiser-weights.safetensors"))
    for state in FOLDER.rglob("state.json"):
        assert str(ROOT) not in json.dumps(json.loads(state.read_text()))


def write() -> None:
    """Write the checkpoints of this version."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["LDM_CACHE"] = str(place / "cache")
        for kind in ("vae", "stage"):
            train(kind, place / kind, place / "vae")
            target = FOLDER / versions()["ldm"] / kind / "step-2"
            shutil.copytree(place / kind / "checkpoints" / "step-2", target)


if __name__ == "__main__":
    write()
