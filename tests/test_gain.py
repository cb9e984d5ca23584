"""What captions are worth: the same losses as training's, and nothing where the text is not used."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from ldm.config import ObjectiveConfig
from ldm.evaluation.gain import LEVELS, conditions_of, denoising_losses, losses_with_and_without
from ldm.models.scheduler import build_scheduler, schedule_of
from ldm.objectives.denoising import Objective
from ldm.objectives.schedule import FlowSchedule, build_schedule
from pipelines.transformer import TransformerPipeline
from tests.tiny_pipeline import PIXELS, pipeline, seeds, transformer

from .table import table

SOUND = [
    ObjectiveConfig(path="flow", prediction_type="flow_prediction"),
    ObjectiveConfig(path="flow", prediction_type="sample"),
    ObjectiveConfig(path="linear", prediction_type="epsilon"),
    ObjectiveConfig(path="scaled_linear", prediction_type="v_prediction", zero_terminal_snr=True),
    ObjectiveConfig(path="cosine", prediction_type="sample", num_train_timesteps=100),
]
CAPTIONS = [f"image {number}" for number in range(6)]


def images(count=6):
    return torch.rand(count, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5)) * 2 - 1


def called(config):
    return f"{config.path}-{config.prediction_type}"


@table("config", SOUND)
def test_the_path_of_a_sampling_scheduler_is_that_of_training(config):
    schedule, prediction_type = schedule_of(build_scheduler(config))
    u = torch.linspace(0, 1, 33)
    expected = build_schedule(config)
    assert prediction_type == config.prediction_type
    torch.testing.assert_close(schedule.timesteps(u), expected.timesteps(u))
    for ours, theirs in zip(*(s.alpha_sigma(s.timesteps(u), torch.float64) for s in (schedule, expected)), strict=True):
        # diffusers keeps betas in float32, and never quite 0 at the end
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_schedulers_of_others_are_understood_or_refused():
    assert isinstance(schedule_of(FlowMatchEulerDiscreteScheduler())[0], FlowSchedule)
    assert schedule_of(DDIMScheduler())[1] == "epsilon"
    with pytest.raises(ValueError, match="prediction_type 'velocity'"):
        schedule_of(DDIMScheduler(prediction_type="velocity"))


@table("config", SOUND)
def test_losses_are_those_of_the_objective(config):
    pipe = pipeline(scheduler=build_scheduler(config))
    pipe.vae.register_to_config(shift_factor=1.5)  # which pipelines of this kind never look at
    pixel_values = images()
    found = denoising_losses(pipe, pixel_values, CAPTIONS, seed=3)
    with torch.no_grad():
        x0 = pipe.vae.encode(pixel_values).latent_dist.mode() * pipe.vae.config.scaling_factor
        embeds = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[0]
        noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in seeds(*range(3, 9))])

        def predict(x_t, timesteps):
            return pipe.unet(x_t, timesteps, encoder_hidden_states=embeds).sample

        expected = [Objective(config).loss_at(predict, x0, noise, level).numpy() for level in LEVELS]
    np.testing.assert_allclose(found, expected, rtol=2e-3)  # float32 betas, as above


def test_a_stock_pipeline_gives_the_same():
    ours = pipeline(scheduler=build_scheduler(SOUND[0]))
    stock = StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    np.testing.assert_allclose(
        denoising_losses(stock, images(), CAPTIONS, 0), denoising_losses(ours, images(), CAPTIONS, 0), rtol=1e-5
    )


def test_a_transformer_is_told_what_it_is_told_in_training():
    parts = pipeline(scheduler=build_scheduler(SOUND[0])).components
    shared = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    pipe = TransformerPipeline(**shared, transformer=transformer())
    found = denoising_losses(pipe, images(), CAPTIONS, seed=3)
    seen = pipe.tokenizer(CAPTIONS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        x0 = pipe.vae.encode(images()).latent_dist.mode() * pipe.vae.config.scaling_factor
        told = {
            "encoder_hidden_states": pipe.text_encoder(seen.input_ids)[0],
            "encoder_attention_mask": seen.attention_mask,
        }
        noise = torch.stack([torch.randn(x0.shape[1:], generator=draw) for draw in seeds(*range(3, 9))])

        def predict(x_t, timesteps):
            return pipe.transformer(x_t, timestep=timesteps, **told).sample

        expected = [Objective(SOUND[0]).loss_at(predict, x0, noise, level).numpy() for level in LEVELS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_captions_that_are_not_read_are_worth_nothing_and_those_that_are_change_the_loss(monkeypatch):
    pipe = pipeline(scheduler=build_scheduler(SOUND[0]))
    right, wrong = losses_with_and_without(pipe, images(), CAPTIONS, 0)
    assert (right != wrong).all(), "nobody keeps a caption"
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, *more: encode(["the same"] * len(prompt), *more))
    right, wrong = losses_with_and_without(pipe, images(), CAPTIONS, 0)
    np.testing.assert_allclose(right, wrong, rtol=1e-6)


def test_a_loss_does_not_depend_on_the_other_images(monkeypatch):
    pipe = pipeline(scheduler=build_scheduler(SOUND[0]))
    whole = denoising_losses(pipe, images(), CAPTIONS, 0)
    monkeypatch.setattr("ldm.evaluation.gain.CHUNK", 4)
    np.testing.assert_allclose(denoising_losses(pipe, images(), CAPTIONS, 0), whole, rtol=1e-5)


def test_equal_captions_are_never_exchanged():
    pipe = pipeline(scheduler=build_scheduler(SOUND[0]))
    with pytest.raises(ValueError, match="of 6 captions"):
        losses_with_and_without(pipe, images(), ["a"] * 4 + ["b", "c"], 0)


class Latents(SimpleNamespace):
    def encode_prompt(self):
        """Encode."""


def reads(**config):
    return SimpleNamespace(config={"cross_attention_dim": 8} | config)


@table(
    "pipe",
    [
        SimpleNamespace(components={"vae": None, "unet": reads()}),
        Latents(components={"unet": reads()}),
        Latents(components={"vae": None, "unet": reads(addition_embed_type="text_time")}),
        Latents(components={"vae": None, "unet": reads(cross_attention_dim=None)}),
        Latents(components={"vae": None, "transformer": reads()}),
    ],
)
def test_pipelines_whose_denoiser_is_not_known_are_refused(pipe):
    with pytest.raises(ValueError, match=f"got a {type(pipe).__name__}; expected a pipeline with an autoencoder and"):
        losses_with_and_without(pipe, images(), CAPTIONS, 0)
    assert conditions_of(Latents(components={"vae": None, "unet": reads()}))(1) == {"encoder_hidden_states": 1}
