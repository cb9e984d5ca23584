"""Training an autoencoder with its judge: what the stock example gets wrong, each with its test."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from ldm.config import LoopConfig, OptimConfig, ReconstructionConfig
from ldm.data.batches import Batch
from ldm.models.network import build_network
from ldm.training.autoencoding import measuring_distance
from ldm.training.loop import Loop
from ldm.training.run import Run
from ldm.training.steps import AutoencoderStep

AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONFIG = ReconstructionConfig(
    adversarial="hinge", discriminator_channels=8, discriminator_layers=2, discriminator_start_step=3
)
OPTIM = OptimConfig(learning_rate=1e-3)


def batch(first=0, count=2):
    draw = torch.Generator().manual_seed(first)
    positions = list(range(first, first + count))
    return Batch(positions, positions, [""] * count, torch.rand(count, 3, 16, 16, generator=draw) * 2 - 1, None)


def batches(start_step, *, micro_steps, rank, world):
    step = start_step
    while True:
        yield [batch(2 * step)]
        step += 1


def make_step(run, config=CONFIG):
    torch.manual_seed(0)
    return AutoencoderStep(build_network(AUTOENCODER, "autoencoder"), config, run, 0.9)


@pytest.fixture
def run(tmp_path):
    run = Run(str(tmp_path), 0, LoopConfig(trackers=(), mixed_precision="no"))
    torch.set_num_threads(1)
    return run


def gradients(step, name):
    return [p.grad for p in step.modules[name].parameters() if p.requires_grad]


def fit(run, folder, steps, config=CONFIG):
    run.folder = folder
    step = make_step(run, config)
    loop_config = LoopConfig(max_train_steps=steps, save_every_steps=steps, log_every_steps=1, trackers=())
    loop = Loop(step, OPTIM, loop_config, run, 1.0)
    loop.resume()
    folder.mkdir(exist_ok=True)
    loop.fit(batches)
    return step


def test_a_the_perceptual_term_has_a_gradient(run):
    config = ReconstructionConfig(l1_weight=0, l2_weight=0, kl_weight=0, perceptual="efficientnet_lite2")
    step = make_step(run, config)
    step.losses(batch(), 0)["autoencoder"].backward()
    # all but the error's scale, which is not learned here
    assert all(float(g.abs().max()) > 0 for g in gradients(step, "autoencoder"))


@pytest.mark.parametrize("adaptive", [True, False])
def test_b_no_loss_leaves_a_gradient_with_the_other(run, adaptive):
    step = make_step(run, replace(CONFIG, adaptive=adaptive))
    losses = step.losses(batch(), 3)
    losses["autoencoder"].backward()
    assert all(gradient is None for gradient in gradients(step, "discriminator"))
    before = [gradient.clone() for gradient in gradients(step, "autoencoder")]
    losses["discriminator"].backward()
    assert all(gradient is not None for gradient in gradients(step, "discriminator"))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(step, "autoencoder"), strict=True))


def test_c_every_trained_pass_goes_through_the_prepared_modules(run):
    step = make_step(run)
    calls = []
    step.forwards = {
        name: lambda *inputs, name=name, module=module: calls.append(name) or module(*inputs)
        for name, module in step.forwards.items()
    }
    step.losses(batch(), 3)
    assert calls == ["autoencoder", "discriminator"]  # once each: gradients are averaged over processes


def test_d_weights_averages_and_judge_stay_float32(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    run = Run(str(tmp_path), 0, LoopConfig(trackers=(), mixed_precision="bf16"))
    torch.set_num_threads(1)
    step = make_step(run)
    losses = step.losses(batch(), 3)
    modules = [*step.modules.values(), step.averages["autoencoder"].module]
    assert all(p.dtype == torch.float32 for module in modules for p in module.parameters())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    AcceleratorState._reset_state(reset_partial_state=True)


def test_e_a_resume_with_discriminator_is_exact(run, tmp_path):
    whole = fit(run, tmp_path / "whole", 8)
    fit(run, tmp_path / "parts", 5)
    resumed = fit(run, tmp_path / "parts", 8)
    for name in whole.modules:
        one, two = whole.modules[name].state_dict(), resumed.modules[name].state_dict()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    one, two = (s.averages["autoencoder"].module.state_dict() for s in (whole, resumed))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_f_before_its_start_the_discriminator_costs_nothing_and_after_it_every_step_trains_both(run, tmp_path):
    assert "discriminator" not in make_step(run).losses(batch(), 2)
    assert "discriminator" in make_step(run).losses(batch(), 3)
    start = make_step(run).modules["discriminator"].state_dict()

    def moved(steps):
        trained = fit(run, tmp_path / f"{steps}", steps)
        state = trained.modules["discriminator"].state_dict()
        return any(not torch.equal(state[key], start[key]) for key in start)

    assert not moved(3)
    assert moved(4)
    three, four = (fit(run, tmp_path / f"again-{n}", n).modules["autoencoder"].state_dict() for n in (3, 4))
    assert any(not torch.equal(three[key], four[key]) for key in three)


def test_the_discriminator_learns_to_tell_reconstructions(run, tmp_path):
    fit(run, tmp_path / "long", 60, replace(CONFIG, discriminator_start_step=0, adversarial_weight=0.0))
    rows = [json.loads(line) for line in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()]
    values = [row["loss/discriminator"] for row in rows]
    assert values[0] == pytest.approx(1, abs=0.1)  # logits near 0: both margins whole
    assert sum(values[-5:]) / 5 < 0.7
    assert {"loss/autoencoder", "loss/l1", "loss/kl", "loss/adversarial"} <= rows[-1].keys()


def test_a_learned_scale_follows_the_error(run, tmp_path):
    config = ReconstructionConfig(learned_logvar=True)
    run.folder = tmp_path
    step = make_step(run, config)
    loss = step.losses(batch(), 0)
    loss["autoencoder"].backward()
    # d/dlogvar (error / exp(logvar) + logvar) = 1 - error at logvar 0
    assert float(step.modules["autoencoder"].logvar.grad) == pytest.approx(1 - float(loss["l1"] + loss["l2"]), rel=1e-5)
    assert not make_step(run).modules["autoencoder"].logvar.requires_grad


def test_fp16_with_a_discriminator_is_refused(run, monkeypatch):
    monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")
    with pytest.raises(ValueError, match="use bf16"):
        make_step(run)


def test_images_too_small_for_the_measuring_network_are_measured_without_it():
    """Its last convolution sees 4 x 4 of an image of 16 pixels, and is 5 x 5."""
    assert measuring_distance(16) is None
    distance = measuring_distance(32)
    assert distance is not None
    assert distance(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)).item() > 0
