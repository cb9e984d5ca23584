"""The codebook of a VQModel: its loss, its dead codes, and its scale; the Gaussian's scale is in test_network.py."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers import VQModel

from ldm.config import LoopConfig, OptimConfig, ReconstructionConfig, SpaceConfig
from ldm.data.batches import Batch
from ldm.doctor.overfit import restored
from ldm.models.autoencoder import decode, fold_statistics, posterior_moments, reconstruct
from ldm.models.bottleneck import BOTTLENECKS, bottleneck_of
from ldm.models.network import AUTOENCODERS
from ldm.spaces import build_space
from ldm.training.loop import Loop
from ldm.training.run import Run
from ldm.training.steps import AutoencoderStep

from .table import table

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "num_vq_embeddings": 12,
}
CONFIG = ReconstructionConfig(revive_after_steps=2)


def movq(norm_type="spatial", seed=0):
    """A VQModel whose codes are as far apart as its latents."""
    torch.manual_seed(seed)
    found = VQModel(**BLOCKS, norm_type=norm_type)
    torch.nn.init.normal_(found.quantize.embedding.weight, std=0.3)
    for name, parameter in found.decoder.named_parameters():
        if "conv_y" in name or "conv_b" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return found


def batch(first=0, count=4):
    draw = torch.Generator().manual_seed(first)
    positions = list(range(first, first + count))
    return Batch(positions, positions, [""] * count, torch.rand(count, 3, 8, 8, generator=draw) * 2 - 1, None)


@pytest.fixture
def run(tmp_path):
    torch.set_num_threads(1)
    return Run(str(tmp_path), 0, LoopConfig(trackers=(), mixed_precision="no"))


def step_of(run, config=CONFIG, seed=0):
    return AutoencoderStep(movq(seed=seed), config, run, 0.9)


def test_the_loss_brings_codes_to_latents_and_latents_by_a_quarter_to_codes():
    vq = movq()
    BOTTLENECKS["VQModel"].prepare(vq)
    pixel_values = batch().pixel_values
    latents = vq.encode(pixel_values).latents.detach().requires_grad_()
    vq.encode = lambda images: type("Encoded", (), {"latents": latents})
    codes = vq.quantize.embedding.weight
    _, terms, seen = bottleneck_of(vq).reconstruct(vq, pixel_values, torch.zeros(4, 4, 4, 4), CONFIG)
    terms["codebook"].backward()
    with torch.no_grad():
        rows = latents.movedim(1, -1).flatten(0, 2)
        nearest = (rows[:, None] - codes).square().sum(-1).argmin(1)
        assert torch.equal(nearest, seen["indices"].flatten())
        error = rows - codes[nearest]
        assert float(terms["codebook"]) == pytest.approx(1.25 * float(error.square().mean()), rel=1e-5)
        of_latents = 0.25 * 2 * error / error.numel()
        torch.testing.assert_close(latents.grad.movedim(1, -1).flatten(0, 2), of_latents)
        of_codes = torch.zeros_like(codes).index_add(0, nearest, -2 * error / error.numel())
        torch.testing.assert_close(codes.grad, of_codes)


def test_codes_are_decoded_and_their_gradient_is_that_of_the_latents():
    vq = movq()
    pixel_values = batch().pixel_values
    latents = vq.encode(pixel_values).latents.detach().requires_grad_()
    vq.encode = lambda images: type("Encoded", (), {"latents": latents})
    reconstruction, _, _ = bottleneck_of(vq).reconstruct(vq, pixel_values, torch.zeros(4, 4, 4, 4), CONFIG)
    reconstruction.square().sum().backward()
    codes = vq.quantize(latents)[0].detach().requires_grad_()
    torch.testing.assert_close(reconstruction, vq.decode(latents).sample)
    vq.decode(codes, force_not_quantize=True).sample.square().sum().backward()
    torch.testing.assert_close(latents.grad, codes.grad)


@torch.no_grad()
def test_a_share_of_the_images_is_decoded_from_the_latents_as_they_are():
    vq, pixel_values = movq(), batch().pixel_values
    noise = torch.zeros(4, 4, 4, 4)
    noise[:, 0, 0, 0] = torch.tensor(
        [-1.0, -0.1, 0.1, 1.0]
    )  # of the normal distribution 0.16, 0.46, 0.54, 0.84 are less
    latents = vq.encode(pixel_values).latents
    of_codes, of_latents = (vq.decode(latents, force_not_quantize=as_they_are).sample for as_they_are in (False, True))
    for share, from_codes in ((0.0, 0), (0.5, 2), (0.6, 3), (1.0, 4)):
        config = replace(CONFIG, codebook_share=share)
        found, _, _ = bottleneck_of(vq).reconstruct(vq, pixel_values, noise, config)
        torch.testing.assert_close(found[:from_codes], of_codes[:from_codes])
        torch.testing.assert_close(found[from_codes:], of_latents[from_codes:])


def test_a_code_that_is_not_used_is_moved_to_a_latent_of_the_step_in_the_average_too(run):
    step = step_of(run)
    trained, averaged = step.modules["autoencoder"].autoencoder, step.averaged
    before = trained.quantize.embedding.weight.detach().clone()
    seen = []
    for number in range(3):
        step.losses(batch(4 * number), number)
        step.after_step()
        seen.append(step._newest[1][0][1])
        moved = (trained.quantize.embedding.weight != before).any(1)
        if number == 0:
            assert not moved.any()
            used = seen[0]["indices"].unique()
            assert 0 < len(used) < 12, "some codes are used"
            assert step.memory["unused_steps"].tolist() == [0 if code in used else 1 for code in range(12)]
        if number == 1:
            kept = torch.cat([one["indices"].flatten() for one in seen]).unique()
            assert moved.tolist() == [code not in kept for code in range(12)]
            rows = seen[1]["latents"].movedim(1, -1).flatten(0, 2)
            codes = trained.quantize.embedding.weight[moved]
            assert ((codes[:, None] == rows).all(-1).any(1)).all()
            assert len(codes.unique(dim=0)) == len(codes), "each to another one"
            assert torch.equal(averaged.quantize.embedding.weight[moved], codes)
            assert int(step.memory["unused_steps"].max()) < 2, "they have as long as any other to be used"


def test_revival_does_not_depend_on_micro_batches_and_processes(run, monkeypatch):
    whole = batch()
    halves = [
        Batch(whole.positions[some], whole.rows[some], whole.captions[some], whole.pixel_values[some], None)
        for some in (slice(2), slice(2, 4))
    ]

    def revived(parts, gather=lambda tensors: tensors):
        monkeypatch.setattr(run.accelerator, "gather", gather)
        step = step_of(run)
        for number in range(2):
            for part in parts:
                step.losses(part, number)
            step.after_step()
        return step.modules["autoencoder"].autoencoder.quantize.embedding.weight

    def other_order(tensors):
        positions, seen = tensors
        return positions.flip(0), {name: tensor.flip(0) for name, tensor in seen.items()}

    expected = revived([whole])
    torch.testing.assert_close(revived(halves), expected)
    assert torch.equal(revived([whole], gather=other_order), expected)


def test_without_revival_nothing_is_kept_and_no_code_moves(run):
    step = step_of(run, replace(CONFIG, revive_after_steps=None))
    weight = step.modules["autoencoder"].autoencoder.quantize.embedding.weight
    before = weight.detach().clone()
    for number in range(4):
        step.losses(batch(), number)
        step.after_step()
    assert torch.equal(weight, before)
    assert step.memory == {}


def fit(run, folder, steps):
    def batches(start_step, *, micro_steps, rank, world):
        for step in range(start_step, 100):
            yield [batch(4 * step)]

    run.folder = folder
    step = step_of(run)
    config = LoopConfig(max_train_steps=steps, save_every_steps=steps, log_every_steps=1, trackers=())
    loop = Loop(step, OptimConfig(learning_rate=1e-3), config, run, 1.0)
    loop.resume()
    folder.mkdir(exist_ok=True)
    loop.fit(batches)
    return step


def test_a_resume_is_exact(run, tmp_path):
    whole = fit(run, tmp_path / "whole", 8)
    fit(run, tmp_path / "parts", 3)
    resumed = fit(run, tmp_path / "parts", 8)
    assert torch.equal(whole.memory["unused_steps"], resumed.memory["unused_steps"])
    for one, two in (
        (whole.modules["autoencoder"], resumed.modules["autoencoder"]),
        (whole.averaged, resumed.averaged),
    ):
        state = two.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_an_examination_gives_the_memory_back(run):
    step = step_of(run)
    with restored(step):
        step.losses(batch(), 0)
        step.after_step()
        assert step.memory["unused_steps"].any()
    assert not step.memory["unused_steps"].any()


@table("norm_type", ["spatial", "group"])
@torch.no_grad()
def test_folded_latents_have_unit_scale_and_the_same_codes_and_reconstructions(norm_type):
    vq = movq(norm_type)
    vq.quant_conv.bias += torch.tensor([3.0, -1.0, 0.0, 1.0])
    images = batch(count=16).pixel_values
    latents = vq.encode(images).latents
    vq.quantize.embedding.weight.copy_(latents.movedim(1, -1).flatten(0, 2)[:12])
    indices, quantised = vq.quantize(latents)[2][2], vq.decode(latents).sample
    as_they_are = vq.decode(latents, force_not_quantize=True).sample
    fold_statistics(vq, latents.double().mean((0, 2, 3)), latents.double().std((0, 2, 3), correction=0))
    folded, std = posterior_moments(vq, images)
    assert vq.config.scaling_factor == 1
    assert std.abs().max() == 0
    torch.testing.assert_close(folded.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert float(folded.square().mean()) == pytest.approx(1, abs=1e-4)
    assert len(indices.unique()) > 8
    assert torch.equal(vq.quantize(folded)[2][2], indices)
    torch.testing.assert_close(vq.decode(folded).sample, quantised, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(vq.decode(folded, force_not_quantize=True).sample, as_they_are, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(reconstruct(vq, images), as_they_are.clamp(-1, 1), atol=4e-6, rtol=1e-5)


@torch.no_grad()
def test_the_scale_in_a_config_is_folded_so_that_pipelines_that_do_not_read_it_decode_the_same(tmp_path):
    vq, images = movq(), batch().pixel_values
    vq.save_pretrained(tmp_path / "movq")
    latents = vq.encode(images).latents
    space = build_space(SpaceConfig(autoencoder=str(tmp_path / "movq")))
    x0 = space.moments(images).mean
    torch.testing.assert_close(x0, 0.18215 * latents)
    space.autoencoder.save_pretrained(tmp_path / "exported")
    exported = VQModel.from_pretrained(tmp_path / "exported")
    expected = vq.decode(latents, force_not_quantize=True).sample
    torch.testing.assert_close(exported.decode(x0, force_not_quantize=True).sample, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decode(exported, x0), expected, atol=1e-5, rtol=1e-4)


def test_the_use_of_codes_is_their_number_and_perplexity():
    vq = copy.deepcopy(movq())
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(100 + torch.arange(12.0)[:, None].expand(12, 4))
        vq.quantize.embedding.weight[:3] = torch.tensor([0.0, 1, 2])[:, None]
    values = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 2])  # shares 3/4, 1/8, 1/8
    latents = values.view(2, 1, 2, 2).expand(2, 4, 2, 2)
    vq.encode = lambda part: type("Encoded", (), {"latents": part})
    found = bottleneck_of(vq).measures(vq, torch.split(latents, 1))
    assert found["codes_used"] == 3
    assert found["perplexity"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.125))))


def test_every_class_of_autoencoders_has_a_bottleneck():
    assert set(AUTOENCODERS) == BOTTLENECKS.keys() == {"AutoencoderKL", "VQModel", "VideoAutoencoder"}
