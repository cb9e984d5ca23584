"""One idea for the whole family: each system's stage, from its YAML, through the same objective, step and sampler."""

import pytest
import torch
import yaml

from ldm.config import DataConfig, LoopConfig, StageConfig
from ldm.config.file import load_config
from ldm.data.batches import Batch, CaptionedImages, PositionDataset, fixed_batch
from ldm.data.positions import generators
from ldm.models.network import build_network, image_layers_hash, unreached
from ldm.models.scheduler import build_scheduler
from ldm.stage import build_stage
from ldm.training.run import Run
from ldm.training.steps import DiffusionStep
from pipelines.sampling import both, denoise, guide, guided_output

from .table import table
from .test_batches import Shades
from .test_network import CAPTIONS
from .tiny_stages import CLASSES, PIXELS, save_parts, stages

NAMES = [
    "ddpm",
    "adm",
    "stable diffusion",
    "unclip prior",
    "unclip decoder",
    "unclip upsampler",
    "imagen",
    "imagen upsampler",
    "kandinsky decoder",
    "videoldm",
    "dit",
    "pixart",
]


FRAMES = {"videoldm": 3}
"""Frames of an item; the items of the others are images."""


def images(positions, frames=()):
    draws = generators(9, positions, "image")
    return torch.stack([torch.rand(*frames, 3, PIXELS, PIXELS, generator=draw) * 2 - 1 for draw in draws])


def batch(positions=range(4), name=None):
    positions = list(positions)
    labels = torch.tensor([position % CLASSES for position in positions])
    captions = [CAPTIONS[position % 3] for position in positions]
    frames = (FRAMES[name],) if name in FRAMES else ()
    return Batch(positions, positions, captions, images(positions, frames), None, labels)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(str(tmp_path_factory.mktemp("run")), 0, LoopConfig(trackers=(), mixed_precision="no"))
    torch.set_num_threads(1)
    return run


def build(name, parts, folder):
    """Return the stage of a system, as it is before any training, and its config."""
    file = folder / "stage.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "out", "data": {"image_size": PIXELS}} | stages(parts)[name]))
    config = load_config(StageConfig, ["--config", str(file)])
    return build_stage(config, CAPTIONS, lambda: images(range(40))), config


def moved(stage, run):
    """Return the step of a stage whose weights are away from the zero function."""
    step = DiffusionStep(stage, run, 0.9)
    torch.manual_seed(1)
    for parameter in stage.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return step


every_system = table("name", NAMES)


def test_the_table_is_whole(parts):
    assert list(stages(parts)) == NAMES


@every_system
def test_it_starts_as_the_zero_function(name, parts, run, tmp_path):
    made, config = build(name, parts, tmp_path)
    step = DiffusionStep(made, run, 0.9)
    x0 = step.x0(batch(name=name))
    output = made.model(torch.randn_like(x0), torch.full((4,), 500), step.inputs(batch(name=name), x0))
    width = x0.shape[1] * (1 if config.objective.variational_weight is None else 2)
    assert output.shape == (4, width, *x0.shape[2:])
    assert output.abs().max() == 0


@every_system
def test_it_leaves_the_zero_function_with_every_weight(name, parts, run, tmp_path):
    made, _ = build(name, parts, tmp_path)
    step = DiffusionStep(made, run, 0.9)
    trained = {one: p for one, p in made.model.named_parameters() if p.requires_grad}
    idle = set(unreached(made.model, [step.losses(batch(name=name), 0)["denoiser"]]))
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-3)
    before = {one: parameter.detach().clone() for one, parameter in trained.items()}
    for global_step in range(4):
        step.losses(batch(range(4 * global_step, 4 * global_step + 4), name), global_step)["denoiser"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [one for one, parameter in trained.items() if one not in idle and torch.equal(parameter, before[one])] == []


def test_frozen_image_layers_are_recorded_with_what_is_frozen(parts, run, tmp_path):
    made, _ = build("videoldm", parts, tmp_path)
    step, denoiser = DiffusionStep(made, run, 0.9), made.model.denoiser
    assert "denoiser" not in step.frozen
    denoiser.requires_grad_(False).temporal.requires_grad_(True)
    assert step.frozen["denoiser"] == image_layers_hash(denoiser)


@every_system
def test_the_objective_knows_whether_x0_is_on_a_grid(name, parts, tmp_path):
    made, config = build(name, parts, tmp_path)
    assert made.objective.grid_step == (2 / 255 if config.space.kind == "pixel" else 0)


@every_system
def test_the_prior_undoes_the_statistics_of_its_space(name, parts, tmp_path):
    made, _ = build(name, parts, tmp_path)
    if name == "unclip prior":  # as the pipelines of diffusers do, and every other space has none
        x0 = torch.randn(4, 16)
        torch.testing.assert_close(made.model.denoiser.post_process_latents(x0), made.space.decode(x0))
    else:
        assert made.space.statistics is None


@every_system
def test_every_trained_parameter_gets_a_gradient(name, parts, run, tmp_path):
    """In every step: otherwise several processes could not train it."""
    made, _ = build(name, parts, tmp_path)
    step = moved(made, run)
    loss = step.losses(batch(range(2), name), 0)["denoiser"]
    assert unreached(made.model, [loss]) == []
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)


@every_system
def test_a_loss_does_not_depend_on_how_the_batch_is_cut(name, parts, run, tmp_path):
    made, _ = build(name, parts, tmp_path)
    step = moved(made, run)
    with torch.no_grad():
        whole, *halves = (step.losses(batch(part, name), 0)["denoiser"] for part in (range(4), range(2), range(2, 4)))
    assert float(whole) == pytest.approx(float(sum(halves)) / 2, rel=1e-4)


@every_system
def test_remembered_encodings_change_no_loss_and_spare_the_pixels(name, parts, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    made, _ = build(name, parts, tmp_path)
    step = moved(made, run)
    images = CaptionedImages(Shades(num_frames=FRAMES.get(name)), DataConfig(image_size=PIXELS, flip=True))
    read = fixed_batch(PositionDataset(images, "train", 0), 4)
    assert any(read.mirrored)
    expected = step.losses(read, 0)["denoiser"]
    step.remember(images)
    encoded = images.encoded_images("latents", made.space.key, step.encode) if made.space.frozen else None
    looked_up = fixed_batch(PositionDataset(images, "train", 0, encoded, made.model.reads_pixels), 4)
    assert (looked_up.pixel_values is None) == (made.space.frozen and "low_res" not in made.model.conditioners)
    torch.testing.assert_close(step.losses(looked_up, 0)["denoiser"], expected, rtol=1e-5, atol=0)
    conditioners = made.model.conditioners
    kept = {"latents": made.space.frozen, "image-embeddings": "image" in conditioners}
    kept["captions"] = "text" in conditioners and conditioners["text"].frozen
    assert {kind for kind in kept if (tmp_path / "cache" / kind).exists()} == {kind for kind in kept if kept[kind]}


@every_system
def test_a_guided_step_is_guidance_of_two_separate_passes(name, parts, run, tmp_path):
    made, config = build(name, parts, tmp_path)
    step = moved(made, run)
    some = batch(name=name)
    x0 = step.x0(some)
    told = [made.model.conditions(step.inputs(some, x0, dropped=dropped)) for dropped in (True, False)]
    scheduler = build_scheduler(config.objective)
    scheduler.set_timesteps(3)
    x_t, timestep = torch.randn_like(x0), scheduler.timesteps[1]
    pairs = both(told[0].channels, told[1].channels), both(told[0].kwargs, told[1].kwargs)
    with torch.no_grad():
        once = guided_output(made.model.denoiser, scheduler, x_t, timestep, 3.0, *pairs)
        passes = []
        for dropped in (True, False):
            inputs = step.inputs(some, x0, dropped=dropped)
            passes.append(made.model(x_t, timestep.expand(4), inputs))
    width = x0.shape[1]
    torch.testing.assert_close(once, guide(*passes, 3.0, width)[:, :width], rtol=1e-4, atol=1e-4)
    guided = any(made.model.conditioner(name).dropout for name in made.model.conditioners)
    assert guided != torch.equal(passes[0], passes[1]), "what training drops, and nothing else, guidance compares"


@every_system
def test_it_samples_and_decodes(name, parts, run, tmp_path):
    made, config = build(name, parts, tmp_path)
    step = moved(made, run)
    some = batch(name=name)
    x0 = step.x0(some)
    told = made.model.conditions(step.inputs(some, x0, dropped=False))
    scheduler = build_scheduler(config.objective)
    scheduler.set_timesteps(3)

    def predict(x_t, timestep):
        return guided_output(made.model.denoiser, scheduler, x_t, timestep, 1.0, told.channels, told.kwargs)

    with torch.no_grad():
        sampled = denoise(predict, scheduler, torch.randn_like(x0), scheduler.timesteps)
    assert sampled.shape == x0.shape
    decoded = made.space.decode(sampled)
    assert decoded.isfinite().all()
    assert decoded.shape == (x0.shape if config.space.kind == "embedding" else some.pixel_values.shape)


@every_system
def test_what_is_saved_is_a_pretrained_denoiser_that_computes_the_same(name, parts, run, tmp_path):
    made, _ = build(name, parts, tmp_path)
    step = moved(made, run)
    made.model.denoiser.save_pretrained(tmp_path / "denoiser")
    again = build_network({"pretrained": str(tmp_path / "denoiser")}, "denoiser")
    some = batch(name=name)
    x0 = step.x0(some)
    told = made.model.conditions(step.inputs(some, x0, dropped=False))
    call = {"timestep": torch.full((4,), 500), **told.kwargs, "return_dict": False}
    x_t = torch.cat([x0, *told.channels], 1)
    with torch.no_grad():
        assert torch.equal(again.eval()(x_t, **call)[0], made.model.denoiser.eval()(x_t, **call)[0])
