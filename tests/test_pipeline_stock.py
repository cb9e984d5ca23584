"""All that `StableDiffusionPipeline` takes and does: ours at the same seed, or left out on a page, with the reason."""

import copy
import inspect
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import FLOW, LENGTH, WIDTH, arrays, seeds, text_encoder

from .table import table

PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"
STOCK, OURS = StableDiffusionPipeline, TextToImagePipeline
DDIM, EULER, HEUN = tiny_pipeline.scheduler(), EulerDiscreteScheduler(), HeunDiscreteScheduler()
FLOWING = DPMSolverMultistepScheduler(**FLOW)
FALLING = [900, 500, 100, 20]


def left_out():
    """Return the names in the first column of the page's table of what is left out."""
    table = PAGE.read_text(encoding="utf-8").split("## Left out", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if line[:1] == "|")))


def drawn_by_both(call, scheduler=DDIM, before=lambda pipe: None, **changes):
    parts = tiny_pipeline.parts(scheduler=scheduler, **changes)
    pipes = OURS(**copy.deepcopy(parts)), STOCK(**copy.deepcopy(parts))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        before(pipe)
    return [arrays(pipe, **copy.deepcopy(call)) for pipe in pipes]


def embeds(seed):
    return torch.randn(1, LENGTH, WIDTH, generator=seeds(seed)[0])


def halved(pipe, step, timestep, tensors):
    return {name: tensor / 2 for name, tensor in tensors.items()}


CALLS = {
    "prompt": [{"prompt": ["a cat", "two"]}],
    "height": [{"height": 24, "width": 8}],  # the stock class looks at one of them only if it is given both
    "width": [{"width": 24, "height": 16}],
    "num_inference_steps": [{"num_inference_steps": 2}],
    "timesteps": [
        ({"timesteps": FALLING}, DPMSolverMultistepScheduler()),
        ({"timesteps": FALLING}, EULER),
        ({"timesteps": FALLING}, HEUN),
    ],
    "sigmas": [
        ({"sigmas": [14.6, 3.0, 0.5, 0.03, 0.0]}, EULER),
        ({"sigmas": np.array([0.9, 0.5, 0.1])}, UniPCMultistepScheduler(**FLOW)),
    ],
    "guidance_scale": [{"guidance_scale": 7.5}, {"guidance_scale": 1.0}],
    "negative_prompt": [{"negative_prompt": "bad"}],
    "num_images_per_prompt": [{"num_images_per_prompt": 2}],
    "eta": [{"eta": 0.5}, {"eta": 1.0, "prompt": ["a", "b"], "generator": seeds(1, 2)}],
    "generator": [{"generator": seeds(3)[0]}],
    "latents": [{"latents": torch.randn(1, 4, 8, 8, generator=seeds(5)[0])}],
    "prompt_embeds": [{"prompt": None, "prompt_embeds": embeds(1)}],
    "negative_prompt_embeds": [{"negative_prompt_embeds": embeds(2)}],
    "output_type": [{"output_type": "latent"}, {"output_type": "pt"}],
    "return_dict": [],  # another result by design: a tuple of the images alone, see the page
    "cross_attention_kwargs": [{"cross_attention_kwargs": {}}],
    "guidance_rescale": [{"guidance_rescale": 0.7}, {"guidance_rescale": 1.0, "prompt": ["a cat", "two"]}],
    "clip_skip": [{"clip_skip": 1}, {"clip_skip": 2, "negative_prompt": "bad"}, {"clip_skip": 0}],
    "callback_on_step_end": [{"callback_on_step_end": halved}],
    "callback_on_step_end_tensor_inputs": [
        {
            "callback_on_step_end": halved,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"],
        }
    ],
}
CASES = [(name, case) for name, cases in CALLS.items() for case in cases]


@pytest.fixture(autouse=True)
def stock_finds_the_layer_norm(monkeypatch):
    """The stock class looks for it where transformers 4 had it."""
    monkeypatch.setattr(type(text_encoder()), "text_model", property(lambda encoder: encoder), raising=False)


@pytest.mark.slow
@table(("name", "case"), CASES)
def test_every_argument_of_a_call_draws_what_the_stock_pipeline_draws(name, case):
    call, scheduler = case if isinstance(case, tuple) else (case, DDIM)
    ours, stock = drawn_by_both(call, scheduler)
    np.testing.assert_allclose(ours, stock, atol=1e-5)


def test_every_argument_is_in_that_table_or_left_out_with_the_reason():
    wanted = set(inspect.signature(STOCK.__call__).parameters) - {"self", "kwargs"}
    taken = set(inspect.signature(OURS.__call__).parameters)
    assert wanted & taken == set(CALLS)
    missing = {name for name in dir(STOCK) if not name.startswith("_") and not hasattr(OURS, name)}
    assert left_out() == (wanted - taken) | missing


OWN = {
    *("clip_skip", "cross_attention_kwargs", "do_classifier_free_guidance", "guidance_rescale", "guidance_scale"),
    *("interrupt", "num_timesteps", "encode_prompt", "save_config", "to_json_string", "model_cpu_offload_seq"),
    "extract_init_dict",
}
"""Public names of the stock class that are written anew: its properties, `encode_prompt`, what is saved."""


def test_every_method_is_diffusers_own_or_left_out():
    shared = [name for name in dir(STOCK) if not name.startswith("_") and hasattr(OURS, name)]
    for name in shared:
        ours, stock = (getattr(getattr(cls, name), "__func__", getattr(cls, name)) for cls in (OURS, STOCK))
        assert (ours is stock or ours == stock) == (name not in OWN or name == "model_cpu_offload_seq"), name
    assert set(shared) >= OWN


METHODS = {
    "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "freeu off": lambda pipe: (pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), pipe.disable_freeu()),
    "fused": lambda pipe: pipe.fuse_qkv_projections(),
    "unfused": lambda pipe: (pipe.fuse_qkv_projections(), pipe.unfuse_qkv_projections()),
    "tiles": lambda pipe: pipe.vae.enable_tiling(),
    "slices": lambda pipe: (pipe.vae.enable_slicing(), pipe.enable_attention_slicing()),
}


@table("name", METHODS)
def test_switches_do_what_they_do_to_the_stock_pipeline(name):
    blocks = {"block_out_channels": (8, 16, 16), "sample_size": 16}  # FreeU changes the first two of three
    blocks |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")}
    call = {"prompt": ["a cat", "two"], "steps": 2}
    ours, stock = drawn_by_both(call, before=METHODS[name], unet=tiny_pipeline.unet(**blocks))
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    plain = drawn_by_both(call, unet=tiny_pipeline.unet(**blocks))[0]
    assert (np.abs(ours - plain).max() > 1e-3) == (name in ("freeu", "tiles"))


def test_the_layers_that_clip_skip_leaves_out_are_the_last_ones():
    pipe = tiny_pipeline.pipeline()
    ids = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    encoder = copy.deepcopy(pipe.text_encoder)
    for skipped in (0, 1, 2):
        encoder.encoder.layers = pipe.text_encoder.encoder.layers[: 2 - skipped]
        embeds = pipe.encode_prompt("a cat", None, 1, False, clip_skip=skipped)[0]
        torch.testing.assert_close(embeds, encoder(ids)[0])
    with pytest.raises(ValueError, match="clip_skip: got 3; the text encoder has 2 layers"):
        arrays(pipe, clip_skip=3)
    with pytest.raises(ValueError, match="clip_skip: BertModel has no final_layer_norm"):
        arrays(tiny_pipeline.pipeline(text_encoder=text_encoder("bert")), clip_skip=1)


class TunerLayer:
    """What peft's layers have in common, as far as diffusers looks."""


class Adapted(TunerLayer, torch.nn.Linear):
    """A linear layer with an addition of a scale, as peft's LoRA layers are; peft is no dependency."""

    scale = 1.0
    active_adapters = ("default",)

    def scale_layer(self, scale):
        self.scale *= scale

    def unscale_layer(self, scale):
        self.scale /= scale

    def set_scale(self, adapter, scale):
        self.scale = scale

    def forward(self, x):
        return super().forward(x) + self.scale * x.roll(1, -1)[..., : self.out_features]


@table("scale", [0.0, 0.3, 1.0])
def test_the_scale_of_lora_layers_is_that_of_the_call(scale, monkeypatch):
    tuners = types.ModuleType("peft.tuners.tuners_utils")
    tuners.BaseTunerLayer = TunerLayer
    for name in ("peft", "peft.tuners"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", tuners)
    for module in ("diffusers.utils", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
        monkeypatch.setattr(sys.modules[module], "USE_PEFT_BACKEND", True)
    monkeypatch.setattr(sys.modules["pipelines.prompts"], "USE_PEFT_BACKEND", True)

    def adapt(pipe):
        for layer in (pipe.text_encoder.encoder.layers[0].self_attn.q_proj, pipe.unet.mid_block.attentions[0].proj_in):
            if isinstance(layer, torch.nn.Linear):
                layer.__class__ = Adapted
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Linear) and module.in_features == module.out_features == 16:
                module.__class__ = Adapted

    call = {"cross_attention_kwargs": {"scale": scale}}
    ours, stock = drawn_by_both(call, before=adapt)
    np.testing.assert_allclose(ours, stock, atol=1e-5)
    plain, full = drawn_by_both({})[0], drawn_by_both({}, before=adapt)[0]
    assert np.allclose(ours, plain, atol=1e-5) == (scale == 0)
    assert np.allclose(ours, full, atol=1e-5) == (scale == 1)


REFUSED = [
    ({"timesteps": [5, 3], "sigmas": [1.0]}, "timesteps, sigmas: got both"),
    ({"timesteps": [500, 10]}, "timesteps: DDIMScheduler takes none; leave them out"),
    ({"timesteps": [10, 500], "scheduler": EULER}, r"timesteps: got \[10, 500\]; expected falling numbers from 0 on"),
    ({"timesteps": [], "scheduler": EULER}, r"timesteps: got \[\]; expected falling"),
    ({"timesteps": ["9"], "scheduler": EULER}, "expected falling numbers"),
    ({"timesteps": [1000, 10], "scheduler": EULER}, "timesteps: 2 make Euler.* take timesteps from 1000 to 10"),
    ({"sigmas": [float("nan")], "scheduler": EULER}, "sigmas: got .nan.; expected falling"),
    ({"timesteps": [9, 5], "scheduler": FLOWING}, "timesteps: DPMSolver.* on the flow path takes none"),
    ({"eta": 2}, "eta: got 2; expected a number from 0"),
    ({"eta": 0.5, "scheduler": EULER}, "eta: EulerDiscreteScheduler has none; leave it out, or use DDIMScheduler"),
    ({"guidance_rescale": -1}, "guidance_rescale: got -1; expected a number from 0"),
    ({"guidance_rescale": "1"}, "guidance_rescale: got '1'"),
    ({"cross_attention_kwargs": 0.5}, "cross_attention_kwargs: got 0.5; expected a dict"),
    ({"clip_skip": -1}, "clip_skip: got -1; expected a whole number >= 0"),
]


@table(("call", "message"), REFUSED)
def test_unusable_options_are_refused(call, message):
    pipe = tiny_pipeline.pipeline(scheduler=call.get("scheduler", DDIM))
    call = {name: value for name, value in call.items() if name != "scheduler"}
    with pytest.raises(ValueError, match=message):
        arrays(pipe, **call)


def test_a_denoiser_of_guidance_scales_is_refused():
    with pytest.raises(ValueError, match="unet: it is conditioned on the guidance scale"):
        tiny_pipeline.pipeline(unet=tiny_pipeline.unet(time_cond_proj_dim=8))
