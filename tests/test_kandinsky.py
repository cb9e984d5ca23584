"""The stages of Kandinsky 2.2 sample what they were trained on, and joined they are diffusers' own pipeline."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline, KandinskyV22CombinedPipeline, UnCLIPScheduler
from diffusers.utils.logging import disable_propagation, enable_propagation
from transformers import CLIPImageProcessor

from ldm.config import ObjectiveConfig, SamplerConfig, SystemConfig
from ldm.config.file import load_config
from ldm.data.pixels import to_uint8
from ldm.doctor.agreement import gaussian_std
from ldm.errors import ConfigError
from ldm.evaluation.conditions import condition_by
from ldm.export.join import join
from ldm.models.clip import ImageEncoder
from ldm.models.pipeline import image_size, plain_call
from ldm.models.scheduler import build_scheduler
from ldm.objectives.denoising import Objective
from ldm.system import check_system, system_stages
from pipelines import PIPELINES
from pipelines.kandinsky import KandinskyPipeline
from pipelines.latent_decoder import LatentDecoderPipeline
from pipelines.sampling import both, denoise, guided_output

from . import tiny_pipeline
from .table import table
from .test_system import SCRIPTS
from .test_ten_stages import batch, parts, run  # noqa: F401 (parts, run: fixtures)
from .test_unclip import made_of, quiet, record_and_card, seeded
from .trainers import ROOT

STAGES = ("unclip prior", "kandinsky decoder")


@pytest.fixture(scope="module")
def made(parts, run, tmp_path_factory):  # noqa: F811
    """Each of `STAGES`; the prior is sampled by UnCLIPScheduler."""
    found = {name: made_of(name, parts, run, tmp_path_factory.mktemp("config")) for name in STAGES}
    known = ObjectiveConfig(path="cosine", prediction_type="sample")
    found["unclip prior"].pipe.register_modules(scheduler=build_scheduler(known, SamplerConfig("unclip")))
    return found


@pytest.fixture(scope="module")
def kandinsky(made):
    """The two stages as one pipeline."""
    prior, decoder = (made[name].pipe for name in STAGES)
    size = decoder.image_encoder.config.image_size
    return quiet(
        KandinskyPipeline(
            **{name: getattr(decoder, name) for name in ("unet", "scheduler", "movq")},
            prior_prior=prior.prior,
            prior_image_encoder=decoder.image_encoder,
            prior_text_encoder=prior.text_encoder,
            prior_tokenizer=prior.tokenizer,
            prior_scheduler=prior.scheduler,
            prior_image_processor=CLIPImageProcessor(
                size={"shortest_edge": size}, crop_size={"height": size, "width": size}
            ),
            num_inference_steps=3,
            guidance_scale=2.0,
            prior_num_inference_steps=4,
            prior_guidance_scale=3.0,
        )
    )


@pytest.fixture(scope="module")
def joined(made, tmp_path_factory):
    """The folder of the two stages, joined."""
    folder, stages = tmp_path_factory.mktemp("joined"), {}
    for number, name in enumerate(("prior", "decoder")):
        made[STAGES[number]].pipe.save_pretrained(folder / name)
        record_and_card(folder / name, number, [])
        stages[name] = str(folder / name)
    return join("KandinskyPipeline", stages, folder / "model", PIPELINES)


@table("guidance_scale", [1.0, 3.0])
def test_the_decoder_samples_with_the_conditions_and_the_null_of_training(guidance_scale, made):
    stage, _, step, pipe = made["kandinsky decoder"]
    some = batch(range(3))
    x0 = step.x0(some)
    null, given = (stage.model.conditions(step.inputs(some, x0, dropped=dropped)).kwargs for dropped in (True, False))
    rows = seeded(4, 5, 6)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in rows])
    told = both(null, given) if guidance_scale > 1 else given
    pipe.scheduler.set_timesteps(3)

    def predict(x_t, timestep):
        return guided_output(stage.model.denoiser, pipe.scheduler, x_t, timestep, guidance_scale, (), told)

    with torch.no_grad():
        drawn = denoise(predict, pipe.scheduler, noise, pipe.scheduler.timesteps, rows)
    call = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    images = some.pixel_values / 2 + 0.5
    latents = pipe(images, generator=seeded(4, 5, 6), output_type="latent", **call).images
    torch.testing.assert_close(latents, drawn, rtol=1e-3, atol=1e-3)
    one = pipe(images, generator=seeded(4, 5, 6), output_type="pt", **call).images
    torch.testing.assert_close(one, (stage.space.decode(drawn) / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=2e-3)
    embeds = stage.model.conditioner("image").encode(some.pixel_values)["image_embeds"]
    other = pipe(embeds, generator=seeded(4, 5, 6), output_type="pt", **call).images
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_the_decoder_is_asked_by_an_image(made):
    assert condition_by(made["kandinsky decoder"].pipe).keyword == "image"


LEARNED = ObjectiveConfig(path="linear", variational_weight=1.0)


@table("guidance", [(1.0, 1.0), (2.0, 3.0)])
@table("sampler", ["dpm_solver", "ddpm"])
def test_diffusers_own_pipeline_loads_the_folder_and_samples_the_same_images(
    guidance, sampler, joined, kandinsky, caplog, monkeypatch
):
    enable_propagation()
    try:
        stock = quiet(DiffusionPipeline.from_pretrained(joined))
    finally:
        disable_propagation()
    assert not caplog.records
    assert type(stock) is KandinskyV22CombinedPipeline
    own = build_scheduler(LEARNED, SamplerConfig(sampler))
    assert (sampler == "ddpm") == (own.config.get("variance_type") == "learned_range")
    monkeypatch.setattr(stock.decoder_pipe, "scheduler", own)
    monkeypatch.setattr(kandinsky, "scheduler", own)
    scale, prior_scale = guidance
    call = {"num_inference_steps": 3, "prior_num_inference_steps": 4, "output_type": "np"}
    call |= {"guidance_scale": scale, "prior_guidance_scale": prior_scale}
    for prompt in ("red", ["red", "green"]):
        one = stock(prompt, generator=seeded(7)[0], height=kandinsky.image_size, width=kandinsky.image_size, **call)
        other = kandinsky(prompt, generator=seeded(7)[0], **call)
        assert abs(one.images - other.images).max() < 2e-3


def test_the_folder_keeps_the_settings_of_a_call_for_our_own_class(joined, kandinsky, tmp_path):
    index = json.loads((joined / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyV22CombinedPipeline"
    own = {"custom_pipeline": str(joined), "trust_remote_code": True}
    loaded = quiet(DiffusionPipeline.from_pretrained(joined, **own))
    assert type(loaded).__name__ == "KandinskyPipeline"
    assert {f"_{name}" for name in loaded._own_settings} <= index.keys()
    loaded.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "model_index.json").read_text())
    assert {name: again[name] for name in index} == index
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is KandinskyV22CombinedPipeline
    call = {"generator": seeded(3)[0], "output_type": "pt", "guidance_scale": 2.0, "prior_guidance_scale": 3.0}
    call |= {"num_inference_steps": 3, "prior_num_inference_steps": 4}
    one = loaded("red", **call).images
    torch.testing.assert_close(one, kandinsky("red", **call | {"generator": seeded(3)[0]}).images, rtol=1e-3, atol=1e-3)


def test_each_image_depends_on_its_own_generator_only(kandinsky):
    call = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
    several = kandinsky(["red", "green"], generator=seeded(1, 2), **call).images
    alone = kandinsky("green", generator=seeded(2), **call).images
    torch.testing.assert_close(several[1:], alone, rtol=1e-3, atol=1e-3)


def test_images_and_prompts_are_mixed_by_the_weighted_sum_of_their_embeddings(kandinsky):
    image = to_uint8(batch(range(1)).pixel_values).numpy()[0]
    size = kandinsky.image_size
    image = torch.from_numpy(image).permute(2, 0, 1).float()[None] / 255
    encoder = ImageEncoder(kandinsky.image_encoder)
    torch.testing.assert_close(kandinsky.embed_image(image), encoder(2 * image - 1), rtol=1e-4, atol=1e-4)
    text = kandinsky.embed_prompt("red", 3, 2.0, generator=seeded(5)[0])
    mixed = 0.3 * text + 0.7 * kandinsky.embed_image(image)
    draws = seeded(5)[0]
    kandinsky.embed_prompt("red", 3, 2.0, generator=draws)
    call = {"num_inference_steps": 2, "output_type": "pt"}
    expected = kandinsky(image_embeds=mixed.expand(2, -1), generator=draws, **call).images
    prior = {"prior_num_inference_steps": 3, "prior_guidance_scale": 2.0}
    found = kandinsky.interpolate(["red", image], [0.3, 0.7], 2, generator=seeded(5)[0], **prior, **call).images
    assert found.shape == (2, 3, size, size)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    for given, weights, message in (
        (["red"], [0.5, 0.5], "weights: got 2 for 1 images and prompts"),
        (["red"], [1.0], "num_images: got 0"),
        ([], [], "weights: got 0 for 0 images and prompts"),
        ([image.expand(2, -1, -1, -1)], [1.0], r"images_and_prompts\[0\]: got"),
    ):
        with pytest.raises(ValueError, match=message):
            kandinsky.interpolate(given, weights, 0 if "num_images" in message else 1)


@table(
    ("changes", "message"),
    [
        ({"null_image_embeds": "zeros"}, "null_image_embeds: got 'zeros'; expected 'zero_picture'"),
        ({"encoder_hid_dim_type": "text_image_proj"}, "unet: is not conditioned on image embeddings alone"),
        ({"encoder_hid_dim": 5}, "unet: takes embeddings of width 5, and those of the image encoder have 16"),
        ({"in_channels": 3, "out_channels": 6}, "unet: takes 3 channels, and the latents of the movq have 4"),
        (
            {"out_channels": 4},
            "unet: has 4 output channels; expected 8, the pipelines of Kandinsky split off a learned",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message, made):
    pipe = made["kandinsky decoder"].pipe
    config = dict(pipe.unet.config)
    own = {name: value for name, value in changes.items() if name == "null_image_embeds"}
    pipe.unet.register_to_config(**{name: value for name, value in changes.items() if name not in own})
    try:
        with pytest.raises(ValueError, match=re.escape(message)):
            LatentDecoderPipeline(**pipe.components, **own)
    finally:
        pipe.unet.register_to_config(**{name: config[name] for name in changes if name in config})


def test_a_decoder_of_another_autoencoder_or_scheduler_is_refused(made):
    pipe = made["kandinsky decoder"].pipe
    with pytest.raises(ValueError, match=r"movq: got AutoencoderKL; expected a VQModel \(space.autoencoder\)"):
        LatentDecoderPipeline(**pipe.components | {"movq": tiny_pipeline.vae()})
    with pytest.raises(ValueError, match="scheduler: UnCLIPScheduler samples embeddings; expected another one"):
        LatentDecoderPipeline(**pipe.components | {"scheduler": UnCLIPScheduler()})


def test_what_a_call_cannot_use_is_refused(made, kandinsky):
    for call, message in (
        ({"prior_num_inference_steps": 1}, "prior_num_inference_steps: got 1; expected a whole number from 2 to 1000"),
        ({"image_embeds": torch.zeros(2, 5)}, r"image_embeds: got \(2, 5\); expected a tensor \(B, 16\)"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            kandinsky("red", **call)
    with pytest.raises(ValueError, match=r"image: got \(2, 5\); expected a tensor \(B, 16\)"):
        made["kandinsky decoder"].pipe(torch.zeros(2, 5))


def test_a_stock_pipeline_is_asked_for_images_of_the_size_of_training(joined):
    stock = quiet(DiffusionPipeline.from_pretrained(joined))
    size = image_size(stock)
    assert size == stock.unet.config.sample_size * 2
    assert plain_call(stock) == {"height": size, "width": size}


def test_a_prior_that_the_stock_pipeline_cannot_step_is_refused(made, joined, tmp_path):
    prior = made["unclip prior"].pipe
    kept = prior.scheduler
    prior.register_modules(scheduler=build_scheduler(ObjectiveConfig(path="cosine", prediction_type="sample")))
    prior.save_pretrained(tmp_path / "prior")
    prior.register_modules(scheduler=kept)
    record_and_card(tmp_path / "prior", 0, [])
    stages = {"prior": str(tmp_path / "prior"), "decoder": str(joined.parent / "decoder")}
    message = "prior: its scheduler is a DPMSolverMultistepScheduler; KandinskyV22CombinedPipeline needs UnCLIPSched"
    with pytest.raises(ConfigError, match=message):
        join("KandinskyPipeline", stages, tmp_path / "model", PIPELINES)


def test_stages_that_will_not_fit_are_refused_before_they_are_trained():
    config = load_config(SystemConfig, ["--config", str(ROOT / "configs/tiny/kandinsky/system.yaml")])
    check_system(config, system_stages(config, SCRIPTS, {}))
    for words, message in (
        ({"prior": ["--sampler.kind", "ddpm"]}, "prior does not fit: sampler.kind is ddpm, and KandinskyV22CombinedPi"),
        ({"decoder": ["--conditioners.image.null", "zeros"]}, "decoder does not fit: conditioners.image.null is zeros"),
        (
            {"decoder": ["--objective.variational_weight", "null"]},
            "decoder does not fit: objective.variational_weight is None, and KandinskyV22CombinedPipeline",
        ),
        (
            {"prior": ["--data.source", "imagefolder", "--data.path", "elsewhere"]},
            "prior and decoder do not fit: data.source is imagefolder in prior and openmoji in decoder",
        ),
        (
            {"decoder": ["--denoiser.encoder_hid_dim", "16"]},
            "prior and decoder do not fit: the width of the image embeddings is 32 in prior and 16 in decoder",
        ),
        (
            {"decoder": ["--conditioners.image.pretrained", "user/other"]},
            "prior and decoder do not fit: they use two CLIPs",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_system(config, system_stages(config, SCRIPTS, words))


@table("steps", [2, 25, 1000])
def test_the_scheduler_of_priors_samples_gaussian_data(steps):
    """Its step is to the next of the chosen timesteps, which it does not know by itself: see `step_options`."""
    config = ObjectiveConfig(path="cosine", prediction_type="sample")
    scheduler = build_scheduler(config, SamplerConfig(kind="unclip"))
    expected = gaussian_std(Objective(config), build_scheduler(config, SamplerConfig(kind="ddpm")), steps)
    assert gaussian_std(Objective(config), scheduler, steps) == pytest.approx(expected, abs=0.02)


def test_each_step_leads_to_the_next_of_the_chosen_timesteps():
    """As the loop of KandinskyV22PriorPipeline, whose scheduler otherwise goes back by one timestep of 1,000."""
    scheduler = build_scheduler(ObjectiveConfig(path="cosine", prediction_type="sample"), SamplerConfig(kind="unclip"))
    scheduler.set_timesteps(4)
    noise = torch.randn(2, 16, generator=seeded(0)[0])
    found = denoise(lambda x_t, timestep: 0.5 * x_t, scheduler, noise, scheduler.timesteps, seeded(1)[0])
    x_t, draw = noise, seeded(1)[0]
    for timestep, then in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        x_t = scheduler.step(0.5 * x_t, timestep, x_t, prev_timestep=then, generator=draw).prev_sample
    torch.testing.assert_close(found, x_t)
