"""A training that was killed, once or twice, and resumed in a new process is the training that was not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.training.checkpoint import CheckpointStore
from ldm.training.resume_check import STEPS as HALF
from ldm.training.resume_check import differences

from .trainers import KILLED, QUICK, STEPS, Fault, ended, killed, ledger, loaders_killed, run, start

VAE = ("--config", "configs/tiny/vae.yaml", *QUICK, "--data.limit", 26)
STAGE = ("--config", "configs/tiny/text2img.yaml", *QUICK, "--data.limit", 26)
EPOCH = 3
"""Steps: 24 images in batches of 8; two of 26 are held out."""

GAN = "{adversarial: hinge, adversarial_weight: 0.5, discriminator_start_step: 2, discriminator_channels: 8}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """An autoencoder and a text encoder to train with."""
    folder = tmp_path_factory.mktemp("parts")
    run("train_vae.py", (*VAE, "--output_dir", folder / "vae"), folder / "log")
    run("train_text2img.py", (*STAGE, *space(folder), "--output_dir", folder / "stage"), folder / "log")
    return folder


def space(parts):
    return "--space.autoencoder", parts / "vae" / "model"


def frozen_text(parts):
    return "--conditioners.text", f"{{pretrained: {parts / 'stage' / 'model'}, train: false, dropout: 0.5}}"


def test_the_comparison_below_is_the_one_of_resume_check():
    assert STEPS == 2 * HALF


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "more"),
    [
        pytest.param([(3, 0), (4, 0)], (), id="epoch-end-and-after-it"),
        pytest.param([(5, 0), (5, 0), (7, 0)], ("--data.cache", "false"), id="no-cache-thrice"),
        pytest.param(
            [(4, 3)],
            ("--loop.gradient_accumulation_steps", 4, "--data.workers", 2, "--data.flip", "true"),
            id="mid-epoch-inside-accumulation-workers",
        ),
        pytest.param(
            [(6, 0)],
            ("--denoiser.dropout", 0.3, "--optim.optimizer", "muon"),
            id="dropout-layers-muon",
        ),
        pytest.param([(5, 0)], frozen_text, id="frozen-text"),
        pytest.param(
            [(5, 0)],
            ("--snapshot_every_steps", 2, "--loop.save_every_steps", 3),
            id="power-function-averages-saved-two-steps-before",
        ),
    ],
)
def test_r04_a_killed_and_resumed_stage_equals_one_that_was_not(kills, more, parts, tmp_path):
    more = more(parts) if callable(more) else more
    assert differences_by_kills("train_text2img.py", (*STAGE, *space(parts), *more), kills, tmp_path) == []


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        pytest.param([(3, 0), (6, 0)], ("--reconstruction", GAN), id="discriminator"),
        pytest.param([(1, 0)], ("--reconstruction", GAN), id="before-the-discriminator-starts", marks=pytest.mark.slow),
        pytest.param(
            [(5, 0)],
            ("--data.workers", 2, "--reconstruction.learned_logvar", "true"),
            id="workers-logvar",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_r04_a_killed_and_resumed_autoencoder_equals_one_that_was_not(kills, more, tmp_path):
    assert differences_by_kills("train_vae.py", (*VAE, *more), kills, tmp_path) == []


def test_r05_over_kills_every_image_is_trained_on_exactly_once_an_epoch(tmp_path):
    for step in (2, 3, 4, 7):
        killing = [Fault(killed, step)]
        process = start("train_vae.py", (*VAE, "--output_dir", tmp_path / "run"), tmp_path / "log", killing)
        assert ended(process) == KILLED
    run("train_vae.py", (*VAE, "--output_dir", tmp_path / "run"), tmp_path / "log")
    trained = ledger(tmp_path / "run")
    for first in (0, EPOCH):
        images = [image for step in range(first, first + EPOCH) for _, image, _ in trained[step]]
        assert len(images) == len(set(images)) == 24
    assert [position for samples in trained.values() for position, _, _ in samples] == list(range(8 * STEPS))


def test_r06_what_is_exported_is_the_average_and_validating_changes_nothing(parts, tmp_path):
    """`parts` validated at steps 4 and 8; here is a training that never does before its end."""
    arguments = (*STAGE, *space(parts), "--loop.validate_every_steps", 1000)
    run("train_text2img.py", (*arguments, "--output_dir", tmp_path / "run"), tmp_path / "log")
    one, two = (CheckpointStore.load(f / "checkpoints" / f"step-{STEPS}") for f in (parts / "stage", tmp_path / "run"))
    for group in one.tensors:
        assert all(torch.equal(one.tensors[group][name], two.tensors[group][name]) for name in one.tensors[group])
    (exported,) = (parts / "stage" / "model" / "unet").glob("*.safetensors")
    for name, tensor in load_file(exported).items():
        assert torch.equal(tensor, one.tensors["denoiser-average"][f"denoiser.{name}"])
    assert not torch.equal(tensor, one.tensors["denoiser-weights"][f"denoiser.{name}"])


@pytest.mark.slow
def test_r18_a_training_whose_loader_process_dies_ends_and_is_resumed_exactly(tmp_path):
    arguments = (*VAE, "--data.workers", 2)
    dying = [Fault(loaders_killed, 4)]
    assert ended(start("train_vae.py", (*arguments, "--output_dir", tmp_path / "run"), tmp_path / "log", dying)) == 1
    assert "The loader process was at image " in (tmp_path / "log").read_text()
    run("train_vae.py", (*arguments, "--output_dir", tmp_path / "run"), tmp_path / "log")
    run("train_vae.py", (*arguments, "--output_dir", tmp_path / "whole"), tmp_path / "log-whole")
    assert list(differences(tmp_path / "whole", tmp_path / "run")) == []


def differences_by_kills(script, arguments, kills, folder):
    """Train, train with kills at (step, micro-step); return whatever differs, the samples of each step included."""
    whole = start(script, (*arguments, "--output_dir", folder / "whole"), folder / "log")
    log = folder / "log-killed"
    for kill in kills:
        fault = Fault(killed, *kill)
        assert ended(start(script, (*arguments, "--output_dir", folder / "killed"), log, [fault])) == KILLED
    run(script, (*arguments, "--output_dir", folder / "killed"), log)
    assert ended(whole) == 0, (folder / "log").read_text()[-3000:]
    assert log.read_text().count("resumed step-") == len(kills)
    trained, again = (ledger(folder / name) for name in ("whole", "killed"))
    assert list(trained) == list(range(STEPS))
    steps = [step for step in trained.keys() | again.keys() if trained.get(step) != again.get(step)]
    one, two = (exported(folder / name / "model") for name in ("whole", "killed"))
    assert one.keys() == two.keys() != set()
    return [
        *differences(folder / "whole", folder / "killed"),
        *(f"samples of step {step}" for step in sorted(steps)),
        *(f"exported {name}" for name in one if not torch.equal(one[name], two[name])),
    ]


def exported(model):
    """Return every tensor of a model folder, by its file and name."""
    files = {file.relative_to(model): load_file(file) for file in model.rglob("*.safetensors")}
    return {f"{file}: {name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}
