"""The stages of unCLIP sample what they were trained on, and joined they are one pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.commands.join import stage_name
from ldm.conditioners.low_res import LowResConditioner
from ldm.config import DataConfig, ObjectiveConfig, SystemConfig
from ldm.config.file import load_config
from ldm.data.batches import CaptionedImages
from ldm.data.positions import generators
from ldm.errors import ConfigError
from ldm.evaluation.baselines import exchanged_captions
from ldm.evaluation.samples import EmbedSamples, ImageSamples
from ldm.export.hub import push
from ldm.export.join import JOINED, join
from ldm.export.kinds import KINDS, build_pipeline, kind_of
from ldm.export.systems import SYSTEMS
from ldm.models.pipeline import load_pipeline
from ldm.models.provenance import Provenance, read_provenance, read_trained_images, save_trained_images
from ldm.models.resolution import blurred, enlarged, shrunk
from ldm.models.scheduler import build_scheduler
from ldm.objectives.denoising import Objective
from ldm.system import check_system, system_stages
from ldm.training.checks import conditional_gain
from pipelines import PIPELINES
from pipelines.cascade import Sampling, ddim, sampled_embeds, slerp
from pipelines.sampling import both, denoise, guided_output
from pipelines.stages import TextEmbeds
from pipelines.unclip import UnCLIPPipeline
from pipelines.upsampler import UpsamplerPipeline

from .table import table
from .test_batches import Shades
from .test_conditioners import Some, tell
from .test_hub import hub  # noqa: F401 (a fixture)
from .test_system import SCRIPTS
from .test_ten_stages import batch, build, images, moved, parts, run  # noqa: F401 (parts, run: fixtures)
from .tiny_stages import ADM, PIXELS, PLAIN
from .trainers import ROOT

STAGES = ("unclip prior", "unclip decoder", "unclip upsampler")
OWN = ("PriorPipeline", "DecoderPipeline", "UpsamplerPipeline")


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Made(NamedTuple):
    """A stage of the table in tiny_stages.py, and what it becomes."""

    stage: Any
    config: Any
    step: Any
    pipe: Any


def made_of(name, parts, run, folder):  # noqa: F811
    """Build a stage with random weights, and its pipeline."""
    stage, config = build(name, parts, folder)
    step = moved(stage, run)
    kind = kind_of(stage, config.space.kind)
    return Made(stage, config, step, quiet(build_pipeline(kind, stage, stage.model, config, PIPELINES)))


@pytest.fixture(scope="module")
def made(parts, run, tmp_path_factory):  # noqa: F811
    """Each of `STAGES`."""
    return {name: made_of(name, parts, run, tmp_path_factory.mktemp("config")) for name in STAGES}


@pytest.fixture(scope="module")
def larger():
    """An upsampler of the decoder's images."""
    torch.manual_seed(5)
    blocks = {f"{way}_block_types": [f"Resnet{way.title()}sampleBlock2D"] * 2 for way in ("down", "up")}
    unet = UNet2DModel(**PLAIN | ADM | blocks | {"in_channels": 6, "sample_size": 2 * PIXELS, "add_attention": False})
    scheduler = build_scheduler(ObjectiveConfig(path="cosine"), clip_sample=True)
    return quiet(UpsamplerPipeline(unet.eval(), scheduler, PIXELS, 3))


@pytest.fixture(scope="module")
def unclip(made, larger):
    prior, decoder = (made[name][3] for name in STAGES[:2])
    shared = {name: getattr(decoder, name) for name in ("text_encoder", "tokenizer", "image_encoder")}
    schedulers = {"prior_scheduler": prior.scheduler, "decoder_scheduler": decoder.scheduler}
    pipe = UnCLIPPipeline(
        prior=prior.prior,
        decoder=decoder.unet,
        super_res=larger.unet,
        super_res_scheduler=larger.scheduler,
        small_size=PIXELS,
        prior_num_inference_steps=3,
        prior_guidance_scale=2.0,
        decoder_num_inference_steps=3,
        decoder_guidance_scale=2.0,
        super_res_num_inference_steps=3,
        **shared,
        **schedulers,
    )
    return quiet(pipe)


@pytest.fixture(scope="module")
def invertible(unclip):
    """The same pipeline, as if its decoder predicted v."""
    v = build_scheduler(ObjectiveConfig(path="cosine", prediction_type="v_prediction"), clip_sample=True)
    settings = {name: unclip.config[name] for name in unclip.config if name.endswith(("_steps", "_scale", "_size"))}
    return quiet(UnCLIPPipeline(**unclip.components | settings | {"decoder_scheduler": v}))


def called(name, pipe, some, **call):
    """Return what a stage's pipeline samples for a batch."""
    if "guidance_scale" not in pipe.config:
        call.pop("guidance_scale", None)
    shown = some.pixel_values / 2 + 0.5
    asked = {
        "unclip prior": {"prompt": some.captions},
        "unclip decoder": {"prompt": some.captions, "image": shown},
        "unclip upsampler": {"image": shown},
    }[name]
    if name != "unclip prior":
        call["output_type"] = "latent"
    output = pipe(**asked, **call)
    return output.image_embeds if name == "unclip prior" else output.images


@table("name", STAGES)
@table("guidance_scale", [1.0, 3.0])
def test_a_stages_pipeline_samples_with_the_conditions_and_the_null_of_training(name, guidance_scale, made):
    stage, _, step, pipe = made[name]
    some = batch(range(3))
    x0 = step.x0(some)
    null, given = (stage.model.conditions(step.inputs(some, x0, dropped=dropped)) for dropped in (True, False))
    guided = guidance_scale > 1 and name != "unclip upsampler"
    told = (both(null.channels, given.channels), both(null.kwargs, given.kwargs)) if guided else (
        given.channels, given.kwargs
    )  # fmt: skip
    scale = guidance_scale if guided else 1.0
    noise = torch.stack([torch.randn(x0.shape[1:], generator=one) for one in seeded(4, 5, 6)])
    pipe.scheduler.set_timesteps(3)

    def predict(x_t, timestep):
        return guided_output(stage.model.denoiser, pipe.scheduler, x_t, timestep, scale, *told)

    with torch.no_grad():
        drawn = denoise(predict, pipe.scheduler, noise, pipe.scheduler.timesteps, seeded(4, 5, 6))
    ours = called(name, pipe, some, num_inference_steps=3, guidance_scale=guidance_scale, generator=seeded(4, 5, 6))
    torch.testing.assert_close(ours, stage.space.decode(drawn), rtol=1e-3, atol=1e-3)
    alone = batch([1])
    one = called(name, pipe, alone, num_inference_steps=3, guidance_scale=guidance_scale, generator=seeded(5))
    torch.testing.assert_close(one[0], ours[1], rtol=1e-3, atol=1e-3)


def test_a_decoder_without_an_embedding_sees_the_null(made):
    stage, _, _, pipe = made["unclip decoder"]
    call = {"num_inference_steps": 2, "output_type": "latent"}
    null = stage.model.conditioner("image").null[None]
    ours = pipe("red", generator=seeded(1), **call).images
    same = pipe("red", image_embeds=null, generator=seeded(1), **call).images
    other = pipe("red", image_embeds=null + 1, generator=seeded(1), **call).images
    assert torch.equal(ours, same)
    assert not torch.equal(ours, other)


class Echo:
    """A prior whose estimate is what it is given."""

    config, dtype = SimpleNamespace(embedding_dim=4), torch.float32

    def __call__(self, x_t, timestep, **conditions):
        return (x_t,)

    def post_process_latents(self, x0):
        return x0


def test_each_candidate_is_guided_by_the_negative_prompt_of_its_text():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    torch.manual_seed(0)
    given, null = (TextEmbeds(torch.zeros(2, 3, 4), torch.randn(2, 4), torch.ones(2, 3)) for _ in range(2))
    seen = []

    class Told(Echo):
        def __call__(self, x_t, timestep, **conditions):
            seen.append(conditions["proj_embedding"])
            return (x_t,)

    both_at_once = sampled_embeds(Told(), scheduler, given, null, Sampling(2, 3.0), seeded(1, 2), 2)
    expected = torch.cat([null.pooled.repeat_interleave(2, 0), given.pooled.repeat_interleave(2, 0)])
    assert torch.equal(seen[0], expected)
    again = sampled_embeds(Told(), scheduler, given, null, Sampling(2, 3.0), seeded(1, 2), 2)
    assert torch.equal(both_at_once, again), "the sampler's own noise comes from the generators too"


def test_of_several_candidates_the_one_most_like_the_text_is_kept():
    torch.manual_seed(0)
    scheduler = build_scheduler(ObjectiveConfig(path="cosine", prediction_type="sample"))
    texts = TextEmbeds(torch.zeros(2, 3, 4), torch.randn(2, 4), torch.ones(2, 3, dtype=torch.bool))
    kept = sampled_embeds(Echo(), scheduler, texts, texts, Sampling(2), seeded(1, 2), 3)
    for row in range(2):
        one = TextEmbeds(*(tensor[row : row + 1] for tensor in texts))
        (generator,) = seeded(row + 1)
        several = [sampled_embeds(Echo(), scheduler, one, one, Sampling(2), [generator], 1) for _ in range(3)]
        likeness = F.cosine_similarity(torch.cat(several), texts.pooled[row : row + 1])
        assert likeness.std() > 0.01
        torch.testing.assert_close(kept[row], several[likeness.argmax()][0])


def test_the_joined_pipeline_is_its_stages_one_after_another(unclip, made, larger):
    prompts, one, other = ["red", "blue"], seeded(1, 2), seeded(1, 2)
    ours = unclip(prompts, generator=one, output_type="latent").images
    prior, decoder = (made[name][3] for name in STAGES[:2])
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": other}
    embeds = prior(prompts, **call).image_embeds
    small = decoder(prompts, image_embeds=embeds, output_type="pt", **call).images
    steps = larger(small, num_inference_steps=3, generator=other, output_type="latent").images
    torch.testing.assert_close(ours, steps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unclip.embed_prompt(prompts, generator=seeded(1, 2)), embeds, rtol=1e-3, atol=1e-3)
    up, alone = (of(small, generator=seeded(3, 4), output_type="pt").images for of in (unclip.upsample, larger))
    assert torch.equal(up, alone)
    given = unclip(prompts, image_embeds=embeds, generator=seeded(1, 2), output_type="latent").images
    assert given.shape == ours.shape == (2, 3, 2 * PIXELS, 2 * PIXELS)
    assert unclip.image_size == 2 * PIXELS


def test_great_circles():
    start, end = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 4.0, 0]])
    found = slerp(start, end, torch.tensor([0, 1 / 3, 0.5, 1]))
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([2, 2 + 2 / 3, 3, 4]))
    angles = torch.atan2(found[:, 1], found[:, 0])
    torch.testing.assert_close(angles, torch.pi / 2 * torch.tensor([0, 1 / 3, 0.5, 1]))
    torch.testing.assert_close(slerp(start, start, torch.tensor([0.3])), start)


def decoded(invertible, *asked, **call):
    """Return the small images of a call, which the upsampler is given."""
    seen = []

    def after_step(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])

    invertible(*asked, callback_on_step_end=after_step, output_type="latent", **call)
    return [one for one in seen if one.shape[-1] == PIXELS][-1]


@table("guidance_scale", [2.0])
def test_the_noise_of_an_image_gives_it_again(guidance_scale, invertible):
    """Up to the size of the steps: with more of them, nearer."""
    shown = images(range(2)) / 2 + 0.5
    call = {"prompt": "red", "guidance_scale": guidance_scale}
    errors = []
    for steps in (20, 100):
        latents = invertible.invert(shown, num_inference_steps=steps, **call)
        again = {"num_inference_steps": steps, "decoder_latents": latents, "eta": 0, **call}
        found = decoded(invertible, image=shown, **again)
        errors.append((found - 2 * shown + 1).abs().mean())
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 3
    assert latents.std() > 0.5


def test_the_three_manipulations(invertible):
    colours = [Image.new("RGB", (2 * PIXELS,) * 2, name) for name in ("red", "blue")]

    def call():
        return {"generator": seeded(4)[0], "output_type": "np"}

    embeds = [invertible._embeds_of("image", colour) for colour in colours]
    ends = [
        invertible(image=colour, decoder_latents=invertible.invert(colour), eta=0, **call()).images[0]
        for colour in colours
    ]
    for name, found in {
        "varied": invertible.variations(colours[0], 2, eta=0.0, generator=seeded(4, 4), output_type="np").images[:1],
        "between": invertible.interpolate(*colours, 3, **call()).images[[0, 2]],
        "turned": invertible.text_difference(colours[0], "red", "blue", 2, **call()).images[:1],
    }.items():
        np.testing.assert_allclose(found, ends[: len(found)], atol=1e-3, err_msg=name)
    half = (
        slerp(*embeds, torch.tensor([0.5])),
        slerp(*(invertible.invert(one).flatten(1) for one in colours), torch.tensor([0.5])),
    )
    middle = {"image_embeds": half[0], "decoder_latents": half[1].view(1, 3, PIXELS, PIXELS)}
    expected = invertible(**middle, eta=0, **call()).images
    np.testing.assert_allclose(invertible.interpolate(*colours, 3, **call()).images[1:2], expected, atol=1e-3)
    turned = invertible.text_difference(colours[0], "red", "blue", 2, **call()).images
    assert not np.allclose(turned[0], turned[1], atol=1e-3)


def test_variations_begin_with_the_noise_of_the_image_and_add_a_share(invertible):
    shown = images([0]) / 2 + 0.5
    start = {"image": shown, "decoder_latents": invertible.invert(shown)}
    none, again, half, whole, other = (
        decoded(invertible, eta=eta, generator=seeded(seed), **start)
        for eta, seed in ((0.0, 1), (0.0, 2), (0.5, 1), (1.0, 1), (1.0, 2))
    )
    assert torch.equal(none, again), "without a share the generator makes no difference"
    assert 0 < (half - none).abs().mean() < (whole - none).abs().mean()
    assert not torch.equal(whole, other)
    varied = invertible.variations(shown, 2, eta=0.5, generator=seeded(1, 2), output_type="pt").images
    expected = invertible(eta=0.5, generator=seeded(1), output_type="pt", **start).images
    torch.testing.assert_close(varied[:1], expected, rtol=1e-3, atol=1e-3)


def test_a_path_without_the_image_at_its_end_takes_all_of_the_noise():
    """Diffusers takes the root of 1 - alpha^2 - std^2, which rounds below 0."""
    config = ObjectiveConfig(path="cosine", prediction_type="v_prediction", zero_terminal_snr=True)
    scheduler = ddim(build_scheduler(config, clip_sample=True))
    scheduler.set_timesteps(40)
    noise = torch.randn(2, 3, 4, 4, generator=seeded(0)[0])
    drawn = denoise(lambda x_t, t: 0.5 * x_t, scheduler, noise, scheduler.timesteps, seeded(1)[0], eta=1.0)
    assert drawn.isfinite().all()


def test_a_share_of_noise_is_from_0_to_1(invertible):
    with pytest.raises(ValueError, match=re.escape("eta: got 2; expected a number from 0 (no noise) to 1")):
        invertible("a", eta=2)


@table(
    ("objective", "inverse", "what"),
    [
        ({"path": "cosine"}, False, "goes astray with predicted noise where alpha ends at 5e-05"),
        ({"path": "cosine", "prediction_type": "sample"}, True, "goes astray with predicted images"),
        ({"path": "flow", "prediction_type": "sample"}, False, "goes astray with the flow path"),
        ({"path": "linear"}, True, None),
        ({"path": "cosine", "prediction_type": "sample"}, False, None),
        ({"path": "cosine", "prediction_type": "v_prediction"}, True, None),
    ],
)
def test_what_ddim_without_clipping_cannot_sample_is_refused(objective, inverse, what):
    scheduler = build_scheduler(ObjectiveConfig(**objective))
    with nullcontext() if what is None else pytest.raises(ValueError, match=what):
        ddim(scheduler, inverse)


def test_prompts_of_another_number_than_images_are_refused(invertible):
    with pytest.raises(ValueError, match="prompt: got 2 for 1 image embeddings; expected as many"):
        invertible.invert(Image.new("RGB", (8, 8)), prompt=["a", "b"])


@table(
    ("call", "message"),
    [
        ({"prompt": 3}, "prompt: got int; expected a string"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "negative_prompt: got 3 for 2 prompts; expected one"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"prompt": "a", "prior_num_inference_steps": 2000}, "prior_num_inference_steps: got 2000"),
        ({"prompt": "a", "super_res_num_inference_steps": 0.5}, "super_res_num_inference_steps: got 0.5"),
        ({"prompt": "a", "guidance_scale": -1}, "guidance_scale: got -1"),
        ({"prompt": "a", "image": 3}, "image: got int; expected an image of PIL"),
        ({"prompt": "a", "image_embeds": torch.zeros(1, 3)}, "image_embeds: got (1, 3); expected a tensor (B, 16)"),
        ({"image_embeds": torch.full((1, 16), torch.nan)}, "image_embeds: NaN or infinity"),
        ({"prompt": ["a", "b"], "image_embeds": torch.zeros(3, 16)}, "prompt: got 2 for 3 image embeddings"),
        ({"prompt": "a", "generator": seeded(1, 2)}, "generator: got a list of 2 for 1 images"),
        ({"prompt": "a", "output_type": "gif"}, "output_type: got 'gif'"),
        ({"prompt": "a", "num_candidates": 0}, "num_candidates: got 0"),
        ({"prompt": "a", "decoder_latents": torch.zeros(2, 3, 16, 16)}, "decoder_latents: got (2, 3, 16, 16); expecte"),
        ({"decoder_latents": torch.full((1, 3, 16, 16), torch.inf)}, "decoder_latents: NaN or infinity"),
    ],
)
def test_a_call_that_cannot_be_is_refused(call, message, unclip):
    with pytest.raises(ValueError, match=re.escape(message)):
        unclip(**call)


def test_parts_that_do_not_fit_are_refused_by_their_names(unclip, made):
    found = {name: getattr(unclip, name) for name in unclip.components}
    decoder = made["unclip decoder"][3]
    with pytest.raises(ValueError, match="decoder: samples images of 16 pixels, and super_res was trained on those of"):
        UnCLIPPipeline(**found, small_size=8)
    with pytest.raises(ValueError, match="unet: takes 3 channels; an upsampler takes 6"):
        UpsamplerPipeline(UNet2DModel(**PLAIN | ADM), DDPMScheduler(), 4)
    plain = decoder.unet.config.addition_embed_type
    decoder.unet.register_to_config(addition_embed_type="text")
    with pytest.raises(ValueError, match="decoder: is conditioned on no image embeddings"):
        UnCLIPPipeline(**found, small_size=PIXELS)
    decoder.unet.register_to_config(addition_embed_type=plain)


# ---- joined folders ----


@pytest.fixture(scope="module")
def finished(made, larger, tmp_path_factory):
    """The model folders of three finished stages."""
    folder = tmp_path_factory.mktemp("finished")
    pipes = {"prior": made["unclip prior"][3], "decoder": made["unclip decoder"][3], "upsampler": larger}
    for number, (name, pipe) in enumerate(pipes.items()):
        pipe.save_pretrained(folder / name)
        networks = [] if name == "upsampler" else ["CLIP 0123"]
        record_and_card(folder / name, number, networks)
    return folder


def record_and_card(folder, number, networks):
    """Write what a finished stage has beside its weights."""
    name = folder.name
    Provenance("data", "held", 10, 100, 60.0, 5.0, "a machine", {"ldm": "1"}, networks).save(folder)
    save_trained_images(folder, torch.tensor([number, 7]))
    text = f"# Title of {name}\n\nAbout {name}.\n\n## How good it is\n\nloss {number}\n\n## Data\n\nShades.\n"
    ModelCard(f"---\nlicense: mit\n---\n\n{text}").save(folder / "README.md")


def copied(finished, to):
    shutil.copytree(finished, to)
    return {name: str(to / name) for name in ("prior", "decoder", "upsampler")}


@pytest.mark.slow
def test_finished_stages_are_joined_into_one_folder(finished, unclip, tmp_path):
    stages = {name: str(finished / name) for name in ("upsampler", "prior", "decoder")} | {"clip": str(tmp_path)}
    folder = join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "UnCLIPPipeline"]
    assert (index["small_size"], index["super_res_num_inference_steps"]) == (PIXELS, 3)
    code = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
again = sys.argv[1] + "-again"
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, custom_pipeline=again, trust_remote_code=True)
call = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}
image = pipe("red", guidance_scale=2.0, generator=torch.Generator().manual_seed(1), output_type="pt", **call).images
torch.save(image, sys.argv[2])
assert not any(name.split(".")[0] in ("ldm", "pipelines") for name in sys.modules)
"""
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = ["-P", "-c", code, str(folder), str(tmp_path / "image.pt")]
    subprocess.run([sys.executable, *words], cwd=tmp_path, env=environ, check=True, timeout=200)
    call = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    call |= {"guidance_scale": 2.0, "prior_guidance_scale": 3.0, "output_type": "pt"}
    expected = unclip("red", generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(torch.load(tmp_path / "image.pt", weights_only=True), expected, rtol=1e-3, atol=1e-3)
    record = read_provenance(folder)
    assert (record.global_step, record.train_seconds, record.images_per_second) == (300, 180.0, 5.0)
    assert record.networks == ["CLIP 0123"]
    assert read_trained_images(folder).tolist() == [0, 1, 2, 7]
    card = (folder / "README.md").read_text()
    assert "in 3 minutes" in card
    for number, name in enumerate(("prior", "decoder", "upsampler")):
        assert f"### {name}: Title of {name}\n\nAbout {name}.\n\nloss {number}\n" in card
    written = (folder / "README.md").stat().st_mtime_ns
    join("UnCLIPPipeline", stages, folder, PIPELINES)
    assert (folder / "README.md").stat().st_mtime_ns == written, "joined from the same stages: it stays"
    (tmp_path / "stages").mkdir()
    others = copied(finished, tmp_path / "stages" / "new")
    weights = next(Path(others["prior"], "prior").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    join("UnCLIPPipeline", others, folder, PIPELINES)
    assert (folder / "README.md").stat().st_mtime_ns != written


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def other_text(stages):
    weights = next(Path(stages["decoder"], "text_encoder").glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)


@table(
    ("damage", "message"),
    [
        (
            lambda stages: change(Path(stages["prior"], "prior", "config.json"), embedding_dim=8),
            "prior and decoder do not fit: the width of the image embeddings is 8 in prior and 16 in decoder",
        ),
        (
            lambda stages: change(Path(stages["upsampler"], "model_index.json"), small_size=8),
            "decoder and upsampler do not fit: the size of the small images is 16 in decoder and 8 in upsampler",
        ),
        (other_text, "prior and decoder do not fit: they were trained with different components text_encoder"),
        (
            lambda stages: change(Path(stages["decoder"], "training.json"), networks=["CLIP 4567"]),
            "do not fit: they were trained on embeddings of two CLIPs",
        ),
        (
            lambda stages: change(Path(stages["upsampler"], "training.json"), held_out_hash="other"),
            "prior and upsampler do not fit: other images were held out in each",
        ),
        (lambda stages: stages.pop("prior"), "needs a stage that is saved as PriorPipeline, and none of decoder, ups"),
        (
            lambda stages: stages.update(second=stages["prior"]),
            "second and prior are both saved as PriorPipeline; expected one of them",
        ),
        (
            lambda stages: change(Path(stages["prior"], "model_index.json"), prior=["evil", "Prior"]),
            "prior is to be Prior of evil, which is neither of diffusers nor of transformers",
        ),
        (
            lambda stages: change(Path(stages["prior"], "model_index.json"), **{"../up": ["diffusers", "VQModel"]}),
            "model_index.json: '../up'",
        ),
        (
            lambda stages: Path(stages["decoder"], "training.json").unlink(),
            "has no record of a training; expected a trained stage",
        ),
        (lambda stages: Path(stages["decoder"], "README.md").unlink(), "has no README.md, which is written last"),
        (lambda stages: shutil.rmtree(Path(stages["decoder"], "unet")), "has no unet of diffusers or transformers"),
        (
            lambda stages: change(Path(stages["prior"], "tokenizer", "tokenizer_config.json"), model_max_length=3),
            "prior and decoder do not fit: they were trained with different components tokenizer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_names_of_two_stages(damage, message, finished, tmp_path):
    stages = copied(finished, tmp_path / "stages")
    damage(stages)
    with pytest.raises(ValueError, match=re.escape(message)):
        join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_a_folder_of_something_else_is_never_replaced(finished, tmp_path):
    stages = {name: str(finished / name) for name in ("prior", "decoder", "upsampler")}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="is there already and was not joined; delete it or name another folder"):
        join("UnCLIPPipeline", stages, tmp_path / "mine", PIPELINES)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"
    (tmp_path / ".tmp-model").mkdir()
    (tmp_path / ".tmp-model" / "half").touch()  # a join that was killed
    join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


def test_the_order_of_the_stages_and_how_a_tokenizer_was_last_called_change_nothing(finished, tmp_path):
    stages = copied(finished, tmp_path / "stages")
    tokens = Path(stages["decoder"], "tokenizer", "tokenizer.json")
    change(
        tokens,
        padding=None,
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
    )
    one = join("UnCLIPPipeline", stages, tmp_path / "one", PIPELINES)
    two = join("UnCLIPPipeline", dict(reversed(stages.items())), tmp_path / "two", PIPELINES)
    for file in ("README.md", "training.json", "model_index.json"):
        assert (one / file).read_text().replace("one", "two") == (two / file).read_text().replace("one", "two")
    change(Path(stages["decoder"], "scheduler", "scheduler_config.json"), variance_type="fixed_large")
    join("UnCLIPPipeline", stages, tmp_path / "one", PIPELINES)
    found = json.loads((tmp_path / "one" / "decoder_scheduler" / "scheduler_config.json").read_text())
    assert found["variance_type"] == "fixed_large", "another scheduler is another stage"


def test_without_a_list_of_trained_images_there_is_none_in_the_joined_folder(finished, tmp_path):
    stages = copied(finished, tmp_path / "stages")
    Path(stages["prior"], "trained_images.safetensors").unlink()
    folder = join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    assert read_trained_images(folder) is None, "the hash of what was held out is then compared"


@table(
    ("place", "name"),
    [
        ("/home/zaphod/runs/prior/model", "prior"),
        ("/home/zaphod/model", "stage"),
        ("zaphod/my-prior", "my-prior"),
        ("zaphod/model", "model"),
        ("./out/decoder", "decoder"),
    ],
)
def test_the_name_of_a_stage_tells_of_no_folder(place, name):
    assert stage_name(place) == name


def test_no_code_of_a_stage_is_joined(finished, tmp_path):
    stages = copied(finished, tmp_path / "stages")
    for place in (Path(stages["prior"], "pipeline.py"), Path(stages["prior"], "prior", "evil.py")):
        place.write_text("raise SystemExit('ran')")
    folder = join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    assert sorted(path.name for path in folder.rglob("*.py")) == ["pipeline.py"]
    assert "SystemExit" not in (folder / "pipeline.py").read_text()


def other_decoder(folder):
    """Put the decoder of another size in the place of the joined one."""
    unet = UNet2DConditionModel.from_pretrained(folder / "decoder")
    UNet2DConditionModel(**{**unet.config, "sample_size": PIXELS // 2}).save_pretrained(folder / "decoder")


@table(
    ("damage", "message"),
    [
        (other_decoder, "decoder: samples images of 8 pixels, and super_res was trained on those of 16"),
        (lambda folder: change(folder / "model_index.json", prior=["evil", "Prior"]), "prior is to be Prior of evil"),
        (lambda folder: change(folder / "model_index.json", **{"../up": ["diffusers", "VQModel"]}), "'../up'"),
        (lambda folder: shutil.rmtree(folder / "super_res"), "no file named config.json"),
    ],
)
def test_a_joined_folder_that_was_changed_is_refused_when_it_is_loaded(damage, message, finished, tmp_path):
    folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "model"
    join(
        "UnCLIPPipeline", {name: str(finished / name) for name in ("upsampler", "prior", "decoder")}, folder, PIPELINES
    )
    assert type(load_pipeline(str(folder), trust_remote_code=True)).__name__ == "UnCLIPPipeline"
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_pipeline(str(folder), trust_remote_code=False)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        load_pipeline(str(folder), trust_remote_code=True)


def test_no_code_of_a_component_is_run(finished, tmp_path):
    stages = {name: str(finished / name) for name in ("upsampler", "prior", "decoder")}
    folder = join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    (folder / "text_encoder" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    loaded = load_pipeline(str(folder), trust_remote_code=True)
    assert type(loaded.text_encoder).__name__ == "CLIPTextModelWithProjection"
    assert not (tmp_path / "ran").exists()


def test_a_joined_folder_is_pushed_whole_and_joined_again_from_the_hub(hub, finished, tmp_path):  # noqa: F811
    stages = {name: str(finished / name) for name in ("prior", "decoder", "upsampler")}
    folder = join("UnCLIPPipeline", stages, tmp_path / "model", PIPELINES)
    push(folder, "me/unclip")
    files = hub.repositories["me/unclip"].files
    assert {"model_index.json", "pipeline.py", "README.md", "training.json", "trained_images.safetensors"} <= set(files)
    assert set(files) == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != JOINED
    }
    push(finished / "prior", "me/prior")
    again = join("UnCLIPPipeline", stages | {"prior": "me/prior"}, tmp_path / "again", PIPELINES)
    assert json.loads((again / JOINED).read_text()) == json.loads((folder / JOINED).read_text())


def test_a_system_names_a_pipeline_that_there_is():
    with pytest.raises(ConfigError, match="pipeline: got Nothing; choose from UnCLIPPipeline"):
        join("Nothing", {}, Path("x"), PIPELINES)
    assert SYSTEMS.keys() <= PIPELINES.keys()
    known = {kind.stock or kind.own for kind in KINDS}
    assert all(system.components.keys() <= known for system in SYSTEMS.values())
    words = ["--output_dir", "x", "--stages", "{model: a.yaml}", "--pipeline", "UnCLIPPipeline"]
    with pytest.raises(ConfigError, match="stages: got model, which is the folder of the joined pipeline"):
        load_config(SystemConfig, words)


@table(
    ("words", "message"),
    [
        (
            {"decoder": ["--denoiser.sample_size", "8"]},
            "decoder and upsampler do not fit: the size of the small images is 8 in decoder and 16 in upsampler",
        ),
        (
            {"prior": ["--denoiser.embedding_dim", "8"]},
            "prior and decoder do not fit: the width of the image embeddings is 8 in prior and 32 in decoder",
        ),
        (
            {"decoder": ["--conditioners.image.pretrained", "user/clip"]},
            "prior and decoder do not fit: they use two CLIPs, conditioners.text.pretrained is out/tiny/clip/model and "
            "conditioners.image.pretrained is user/clip",
        ),
        ({"prior": ["--conditioners.text.train", "true"]}, "prior does not fit: it trains a text encoder of its own"),
        (
            {"decoder": ["--conditioners.text.max_length", "20"]},
            "prior and decoder do not fit: conditioners.text.max_length is 24 in prior and 20 in decoder",
        ),
        (
            {"upsampler": ["--conditioners.low_res", "null"]},
            "pipeline: UnCLIPPipeline needs a stage that is saved as UpsamplerPipeline, and none of prior, decoder",
        ),
    ],
)
def test_stages_that_will_not_fit_are_refused_before_they_are_trained(words, message):
    config = load_config(SystemConfig, ["--config", str(ROOT / "configs/tiny/dalle2/system.yaml")])
    check_system(config, system_stages(config, SCRIPTS, {}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_system(config, system_stages(config, SCRIPTS, words))


def test_a_warning_of_other_lists_of_held_out_captions(caplog):
    config = load_config(SystemConfig, ["--config", str(ROOT / "configs/tiny/dalle2/system.yaml")])
    check_system(config, system_stages(config, SCRIPTS, {}))
    assert not caplog.records
    same = {"decoder": ["--conditioners.image.pretrained", "./out/tiny/clip/model"]}
    check_system(config, system_stages(config, SCRIPTS, same))
    words = {"upsampler": ["--data.held_out", "{}"]}
    check_system(config, system_stages(config, SCRIPTS, words))
    assert "decoder and upsampler name other files of held-out captions" in caplog.text


# ---- what the stages are trained on ----


def test_a_blur_has_its_standard_deviation_and_keeps_plain_colours():
    impulse = torch.zeros(3, 1, 31, 31)
    impulse[:, :, 15, 15] = 1
    found = blurred(impulse, torch.tensor([0.0, 1.0, 1.5]), 7)[:, 0]
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(3))
    offsets = torch.arange(31.0) - 15
    for image, deviation in zip(found, (0.0, 1.0, 1.5), strict=True):
        for axis in (0, 1):
            assert float((image.sum(axis) * offsets.square()).sum()) == pytest.approx(deviation**2, rel=0.02, abs=1e-6)
    plain = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blurred(plain, torch.tensor([2.0]), 4), plain)


def test_each_small_image_has_a_blur_of_its_own_and_none_without():
    conditioner = LowResConditioner(8, 0, blur=2.0)
    same = images([1]).expand(20, -1, -1, -1)
    told = tell(conditioner, Some(pixel_values=same), 20)["images"]
    sharp = enlarged(shrunk(same[:1], 8), PIXELS)
    spread = (told - told.mean((2, 3), keepdim=True)).square().mean((1, 2, 3))
    assert spread.max() < (sharp - sharp.mean((2, 3), keepdim=True)).square().mean() * 1.001
    assert spread.max() > 2 * spread.min()
    without = tell(LowResConditioner(8, 0), Some(pixel_values=same), 20)["images"]
    torch.testing.assert_close(without, sharp.expand(20, -1, -1, -1))


def test_the_small_image_of_a_crop_is_as_small_as_that_of_the_whole():
    whole, crop = LowResConditioner(8, 0, whole_size=16), images([3])[:, :, 4:12, 4:12]
    told = tell(whole, Some(pixel_values=crop), 1)["images"]
    torch.testing.assert_close(told, enlarged(shrunk(crop, 4), 8))


def test_a_regression_is_sampled_in_one_step():
    last = {"prediction_type": "sample", "zero_terminal_snr": True, "timestep_density": "last"}
    config = ObjectiveConfig(path="cosine", **last)
    objective, scheduler = Objective(config), build_scheduler(config)
    x0, wanted = torch.randn(4, 6), torch.randn(4, 6)
    noise, levels = objective.draw(x0, generators(0, range(4), "noise"))
    assert levels.tolist() == [1] * 4
    assert objective.density.levels == (1.0,)
    seen = []

    def predict(x_t, timesteps):
        seen.append((x_t, timesteps))
        return wanted

    loss = objective.loss_at(predict, x0, noise, levels)
    torch.testing.assert_close(loss, (wanted - x0).square().mean(1))
    scheduler.set_timesteps(1)
    torch.testing.assert_close(denoise(predict, scheduler, noise, scheduler.timesteps), wanted)
    (trained, at), (sampled, now) = seen
    torch.testing.assert_close(trained, noise, rtol=0, atol=1e-6)
    torch.testing.assert_close(sampled, noise, rtol=0, atol=1e-3)
    assert at.tolist() == [999] * 4 == [int(now)] * 4, "the network is asked where it was trained"
    for wrong in (last | {"prediction_type": "epsilon"}, last | {"zero_terminal_snr": False}):
        with pytest.raises(ConfigError, match="last: predicts x0 from pure noise; set prediction_type"):
            Objective(ObjectiveConfig(path="cosine", **wrong))


@table("name", ["unclip decoder", "unclip upsampler"])
def test_the_gain_of_a_stage_is_from_all_its_conditions(name, made):
    """Of the right images and captions over those of others; x0 stays."""
    _, _, step, _ = made[name]
    some = batch(range(6))
    some = replace(some, moments=step.encode(some.pixel_values))
    step.averaged.load_state_dict(step.stage.model.state_dict())
    found = conditional_gain(step, some, [0.5])
    captions = exchanged_captions(some.captions) if name == "unclip decoder" else some.captions
    rolled = replace(some, pixel_values=some.pixel_values.roll(-1, 0), captions=captions)
    expected = step.held_out_losses(rolled, [0.5]) - step.held_out_losses(some, [0.5])
    assert found.mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.mean != 0


def test_samples_are_ranked_among_the_true_ones(made):
    stage, data = made["unclip prior"][0], CaptionedImages(Shades(), DataConfig(image_size=PIXELS))
    embeds = EmbedSamples(data, stage.space, PIXELS)
    places = np.array(embeds.places)
    true = stage.space.image_encoder(torch.stack([data.pixel_values(row) for row in range(len(places))])).numpy()
    assert (embeds.ranks(true, places) == 0).all()
    np.testing.assert_array_equal(embeds.shown(true[:3]), embeds.true(range(3)))
    assert embeds.ranks(true.copy()[::-1][: len(places)], places).max() > 0
    assert embeds.fault(true) is None
    assert embeds.fault(true[:, :3]).startswith("denoiser.embedding_dim: embeddings of width 3 are sampled; set it to")
    assert embeds.difference(true, true) == 0
    small = ImageSamples(data, stage.space, PIXELS // 2)
    assert small.true([0]).shape == (1, PIXELS // 2, PIXELS // 2, 3)
    assert small.fault(small.true([0])) is None
    assert small.fault(embeds.true([0])).startswith("denoiser.sample_size: images are sampled at 16 x 16 pixels, and d")
