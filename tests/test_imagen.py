"""The stages of Imagen sample what they were trained on, and joined they are one pipeline."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from diffusers.utils.logging import disable_propagation, enable_propagation
from PIL import Image

from benchmarks.unseen_words import PROMPTS, seen_words
from ldm.conditioners.low_res import LowResConditioner
from ldm.config import DataConfig, ObjectiveConfig, SamplerConfig, SystemConfig
from ldm.config.file import load_config
from ldm.data.pixels import to_uint8
from ldm.data.sources import build_source
from ldm.errors import ConfigError
from ldm.evaluation.conditions import condition_by
from ldm.export.join import join
from ldm.models.resolution import shrunk, shrunk_image
from ldm.models.scheduler import build_scheduler
from ldm.system import check_system, system_stages
from pipelines import PIPELINES
from pipelines.imagen import ImagenPipeline
from pipelines.prompted_pixels import PromptedPixelPipeline
from pipelines.sampling import both, denoise, guided_output
from pipelines.stages import checked_level
from pipelines.super_resolution import SuperResolutionPipeline

from .table import table
from .test_system import SCRIPTS
from .test_ten_stages import batch, parts, run  # noqa: F401 (parts, run: fixtures)
from .test_unclip import made_of, quiet, record_and_card, seeded
from .tiny_stages import IMAGEN, PIXELS
from .trainers import ROOT

STAGES = ("imagen", "imagen upsampler")
LEVEL = 300


@pytest.fixture(scope="module")
def made(parts, run, tmp_path_factory):  # noqa: F811
    """Each of `STAGES`."""
    return {name: made_of(name, parts, run, tmp_path_factory.mktemp("config")) for name in STAGES}


@pytest.fixture(scope="module")
def fitting(made):
    """The pipelines of two stages that fit: the super-resolution takes images of the base's size."""
    base, larger = (made[name].pipe for name in STAGES)
    own = {key: larger.config[key] for key in larger._own_settings} | {"small_size": PIXELS}
    return base, quiet(SuperResolutionPipeline(**larger.components | own))


@pytest.fixture(scope="module")
def imagen(fitting):
    """The two stages as one pipeline."""
    base, larger = fitting
    shared = {name: getattr(base, name) for name in ("text_encoder", "tokenizer", "unet", "scheduler")}
    noising = larger.image_noising_scheduler
    own = {"super_res": larger.unet, "super_res_scheduler": larger.scheduler, "image_noising_scheduler": noising}
    return quiet(ImagenPipeline(**shared, **own))


@table("name", STAGES)
@table("guidance_scale", [1.0, 3.0])
def test_a_stages_pipeline_samples_with_the_conditions_and_the_null_of_training(name, guidance_scale, made):
    """The small image of a sample is the one of training, at a fixed level of the noise on it."""
    stage, _, step, pipe = made[name]
    some = batch(range(3))
    x0 = step.x0(some)
    given, null = (step.inputs(some, x0, dropped=dropped) for dropped in (False, True))
    rows = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    noise = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in rows])
    call = {"guidance_scale": guidance_scale}
    if name == "imagen upsampler":
        # the noise of the sampler comes first, then that on the small image, as in IFSuperResolutionPipeline
        augmentation = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in rows])
        small = shrunk(some.pixel_values, PIXELS // 4)
        levels = torch.full((3,), LEVEL)
        conditioner = stage.model.conditioner("low_res")
        alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in conditioner.schedule.alpha_sigma(levels))
        sharp = LowResConditioner(PIXELS // 4, 0).inputs(some, x0, [False] * 3, rows)["images"]
        told = {"images": alpha * sharp + sigma * augmentation, "levels": levels}
        given, null = (one | {"low_res": told} for one in (given, null))
        call |= {"image": small / 2 + 0.5, "noise_level": LEVEL}
    null, given = (stage.model.conditions(one) for one in (null, given))
    guided = guidance_scale > 1
    told = (both(null.channels, given.channels), both(null.kwargs, given.kwargs)) if guided else (
        given.channels, given.kwargs
    )  # fmt: skip
    pipe.scheduler.set_timesteps(3)

    def predict(x_t, timestep):
        return guided_output(stage.model.denoiser, pipe.scheduler, x_t, timestep, guidance_scale, *told)

    with torch.no_grad():
        drawn = denoise(predict, pipe.scheduler, noise, pipe.scheduler.timesteps, rows)
    call |= {"num_inference_steps": 3, "generator": seeded(4, 5, 6), "output_type": "latent"}
    ours = pipe(some.captions, **call).images
    torch.testing.assert_close(ours, drawn, rtol=1e-3, atol=1e-3)


def test_the_joined_pipeline_is_its_stages_one_after_another(imagen, fitting):
    prompts, one, other = ["red", "blue"], seeded(1, 2), seeded(1, 2)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    ours = imagen(
        prompts, super_res_num_inference_steps=2, super_res_guidance_scale=1.5, noise_level=7, generator=one, **call
    ).images
    base, larger = fitting
    small = base(prompts, generator=other, **call).images
    call |= {"num_inference_steps": 2, "guidance_scale": 1.5}
    expected = larger(prompts, small, noise_level=7, generator=other, **call).images
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert imagen.image_size == PIXELS
    up, alone = (of(["a", "b"], small, generator=seeded(3, 4), **call).images for of in (imagen.upsample, larger))
    assert torch.equal(up, alone)
    with pytest.raises(ValueError, match="prompt: got 3 for 2 images; expected as many"):
        imagen.upsample(["a"] * 3, small)


@table(
    ("call", "message"),
    [
        ({"prompt": 3}, "prompt: got int; expected a string"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "negative_prompt: got 3 for 2 prompts; expected one"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"super_res_num_inference_steps": 2000}, "super_res_num_inference_steps: got 2000"),
        ({"super_res_guidance_scale": -1}, "super_res_guidance_scale: got -1"),
        ({"noise_level": 1000}, "noise_level: got 1000; expected a whole number from 0 to 999"),
        ({"noise_level": 0.5}, "noise_level: got 0.5"),
        ({"generator": seeded(1, 2)}, "generator: got a list of 2 for 1 images"),
        ({"output_type": "gif"}, "output_type: got 'gif'"),
    ],
)
def test_a_call_that_cannot_be_is_refused(call, message, imagen):
    with pytest.raises(ValueError, match=re.escape(message)):
        imagen(**{"prompt": "a"} | call)


def test_parts_that_do_not_fit_are_refused_by_their_names(imagen):
    found = dict(imagen.components)
    with pytest.raises(ValueError, match="super_res: takes 3 channels; expected 6"):
        ImagenPipeline(**found | {"super_res": found["unet"]})
    keys = {name: value for name, value in IMAGEN.items() if name != "_class_name"} | {"in_channels": 6}
    with pytest.raises(ValueError, match="super_res: is not conditioned on the level of the noise on the small image"):
        ImagenPipeline(**found | {"super_res": UNet2DConditionModel(**keys)})
    wider = UNet2DConditionModel(**keys | {"in_channels": 3, "encoder_hid_dim": 8})
    with pytest.raises(ValueError, match="unet: takes states of width 8, and those of T5EncoderModel have 16"):
        PromptedPixelPipeline(**{name: found[name] for name in ("tokenizer", "text_encoder", "scheduler")}, unet=wider)


@table(("name", "stock"), zip(STAGES, (IFPipeline, IFSuperResolutionPipeline), strict=True))
def test_plain_diffusers_loads_a_stage(name, stock, made, tmp_path, caplog):
    folder, ours = tmp_path / name / "model", made[name].pipe
    ours.save_pretrained(folder)
    enable_propagation()
    try:
        assert type(DiffusionPipeline.from_pretrained(folder)) is stock
    finally:
        disable_propagation()
    assert not caplog.records, "what only our class knows is passed over in silence"
    again = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    own = {key: ours.config[key] for key in ours._own_settings}
    assert {key: again.config[key] for key in own} == own
    assert own["num_inference_steps"] == ours.config["num_inference_steps"]


def test_a_small_image_is_of_the_size_of_training_wherever_it_comes_from(made):
    """A call takes larger ones, and shrinks them; validation gives small ones, which the stock class takes too."""
    _, _, step, pipe = made["imagen upsampler"]
    assert pipe.config.small_size == PIXELS // 4
    large = [Image.fromarray(one) for one in to_uint8(batch(range(2)).pixel_values).numpy()]
    small = [shrunk_image(one, PIXELS // 4) for one in large]
    call = {"num_inference_steps": 2, "output_type": "pt"}
    one, other = (pipe(["a", "b"], shown, generator=seeded(1, 2), **call).images for shown in (large, small))
    torch.testing.assert_close(one, other, atol=0.02, rtol=0)
    assert step.given_sizes == {"prompt": None, "image": PIXELS // 4}
    values, whole = (
        torch.stack([torch.from_numpy(np.array(one)) for one in shown]).permute(0, 3, 1, 2) / 127.5 - 1
        for shown in (small, large)
    )
    torch.testing.assert_close(values, shrunk(whole, PIXELS // 4), atol=1e-6, rtol=0)


def test_a_level_that_was_not_trained_on_is_refused(made):
    pipe = made["imagen upsampler"].pipe
    assert checked_level(pipe, None) == 100
    for levels, usual in ((50, 49), (1000, 100)):
        pipe.register_to_config(noise_timesteps=levels)
        assert checked_level(pipe, None) == usual
        with pytest.raises(
            ValueError, match=f"noise_level: got {levels}; expected a whole number from 0 to {levels - 1}"
        ):
            checked_level(pipe, levels)


def test_a_pipeline_that_needs_two_conditions_is_called_from_python(made):
    with pytest.raises(ValueError, match="SuperResolutionPipeline needs prompt and image for each image; call it from"):
        condition_by(made["imagen upsampler"].pipe)


def test_finished_stages_are_joined_into_one_folder(made, fitting, imagen, tmp_path):
    stages = {}
    for number, pipe in enumerate(fitting):
        folder = tmp_path / f"stage{number}"
        pipe.save_pretrained(folder)
        record_and_card(folder, number, [])
        stages[f"stage{number}"] = str(folder)
    folder = join("ImagenPipeline", stages, tmp_path / "model", PIPELINES)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "ImagenPipeline"]
    assert (index["noise_timesteps"], index["super_res_num_inference_steps"]) == (1000, 20)
    own = {"custom_pipeline": str(folder), "trust_remote_code": True}
    loaded = quiet(DiffusionPipeline.from_pretrained(folder, **own))
    call = {"num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "pt"}
    call |= {"guidance_scale": 2.0, "super_res_guidance_scale": 1.5}
    again, first = (pipe("red", generator=seeded(3), **call).images for pipe in (loaded, imagen))
    torch.testing.assert_close(again, first, rtol=1e-3, atol=1e-3)
    made["imagen upsampler"].pipe.save_pretrained(tmp_path / "other")
    record_and_card(tmp_path / "other", 1, [])
    message = "stage0 and other do not fit: the size of the small images is 16 in stage0 and 4 in other"
    with pytest.raises(ConfigError, match=message):
        join(
            "ImagenPipeline", {"stage0": stages["stage0"], "other": str(tmp_path / "other")}, tmp_path / "x", PIPELINES
        )


def test_stages_that_will_not_fit_are_refused_before_they_are_trained():
    config = load_config(SystemConfig, ["--config", str(ROOT / "configs/tiny/imagen/system.yaml")])
    check_system(config, system_stages(config, SCRIPTS, {}))
    for words, message in (
        (
            {"base": ["--conditioners.text.pretrained", "user/other"]},
            "base and super_resolution do not fit: they use two text encoders, conditioners.text.pretrained is user/ot",
        ),
        (
            {"super_resolution": ["--conditioners.low_res.image_size", "8"]},
            "base and super_resolution do not fit: the size of the small images is 16 in base and 8 in super_r",
        ),
        ({"super_resolution": ["--conditioners.text", "null"]}, "needs a stage that is saved as IFSuperResolutionPipe"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_system(config, system_stages(config, SCRIPTS, words))


# ---- dynamic thresholding ----


@table("kind", ["dpm_solver", "ddim", "ddpm"])
def test_dynamic_thresholding_is_the_definition_for_each_image(kind):
    """Saharia et al. 2022, section 2.3: x0 is clipped at its own quantile, if that is above 1, and divided by it."""
    config = ObjectiveConfig(path="cosine", prediction_type="sample")
    scheduler = build_scheduler(config, SamplerConfig(kind, thresholding=0.9), clip_sample=True)
    assert not scheduler.config.clip_sample, "one limit, not two"
    scheduler.set_timesteps(1)
    x_t, x0 = torch.randn(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    x0 *= torch.tensor([0.1, 1.0, 5.0]).view(3, 1, 1, 1)
    limit = torch.quantile(x0.abs().flatten(1), 0.9, dim=1).clamp(min=1).view(3, 1, 1, 1)
    assert limit.flatten()[0] == 1 < limit.flatten()[1] < limit.flatten()[2]
    # the only step ends at the estimate of the image
    (found,) = scheduler.step(x0, scheduler.timesteps[0], x_t, return_dict=False)[:1]
    torch.testing.assert_close(found, x0.clamp(-limit, limit) / limit, rtol=1e-3, atol=1e-3)
    plain = build_scheduler(config, SamplerConfig(kind, thresholding=0.9), clip_sample=True)
    plain.register_to_config(sample_max_value=1.0)
    plain.set_timesteps(1)
    (clipped,) = plain.step(x0, plain.timesteps[0], x_t, return_dict=False)[:1]
    torch.testing.assert_close(clipped, x0.clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_latents_are_not_thresholded():
    with pytest.raises(ConfigError, match=r"sampler\.thresholding: limits pixels; leave it out in this space.kind"):
        build_scheduler(ObjectiveConfig(), SamplerConfig(thresholding=0.995), clip_sample=False)


def test_small_images_get_the_noise_of_the_path_that_the_level_is_of():
    conditioner = LowResConditioner(8, 1000)
    alpha, sigma = conditioner.schedule.alpha_sigma(torch.tensor([0, 250, 999]))
    bar = conditioner.noising_scheduler.alphas_cumprod[[0, 250, 999]].double()
    torch.testing.assert_close(alpha.double(), bar.sqrt(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sigma.double(), (1 - bar).sqrt(), rtol=1e-3, atol=1e-4)


# ---- words that occur in no caption ----


def test_the_prompts_have_words_of_no_caption_and_mean_images_that_there_are():
    source = build_source(DataConfig(source="openmoji"))
    captions = [caption for row in range(len(source)) for caption in source.captions(row)]
    seen, lists = seen_words(captions), {name: json.loads((ROOT / file).read_text()) for name, file in PROMPTS.items()}
    assert len(lists["test"]) >= 60
    assert not lists["test"].keys() & lists["validation"].keys()
    for targets in lists.values():
        assert not [prompt for prompt in targets if seen_words([prompt]) <= seen]
        assert not set(targets.values()) - set(captions)
