"""Configs that no run can be made of: what is refused, where it is named, and that it is found before training."""

import re
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from ldm.config import AutoencoderConfig, StageConfig
from ldm.config.check import FINITE, RANGES, Numbers, ranges_of, shown
from ldm.config.file import load_config
from ldm.errors import ConfigError, explained
from ldm.models import network
from ldm.models.network import build_network
from ldm.spaces import build_space
from ldm.training.resume_check import STEPS

from .fuzzing import SECRET, Bench, as_text, prepare
from .table import table

TINY = Path(__file__).parents[1] / "configs" / "tiny" / "text2img.yaml"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(StageConfig, ["--config", str(TINY), *words])
    return str(caught.value)


def changed(bench: Bench, name: str, **changes: Any) -> Any:
    """Return one of the tiny configs with values changed, by dotted path with two underscores for a dot."""
    tree = bench.small[name]
    file = bench.folder / "case.yaml"
    file.write_text(yaml.safe_dump(tree))
    words = [f"--{path.replace('__', '.')}={as_text(value)}" for path, value in changes.items()]
    kind = AutoencoderConfig if name == "tiny vae" else StageConfig
    return load_config(kind, ["--config", str(file), *words])


def test_snapshots_of_no_average_or_of_one_too_long_are_refused():
    assert "snapshot_sigma_rels: got none; expected one or more" in refusal(
        "--snapshot_every_steps", "5", "--snapshot_sigma_rels", "[]"
    )
    assert "snapshot_sigma_rels: got (0.3,); expected a number above 0, to 0.28" in refusal(
        "--snapshot_sigma_rels", "[0.3]"
    )
    assert "snapshot_every_steps: got 0; expected" in refusal("--snapshot_every_steps", "0")


@table("kind", RANGES)
def test_every_number_of_a_config_has_a_range(kind):
    def has_numbers(hint):
        return hint in (int, float) or (get_origin(hint) is not dict and any(map(has_numbers, get_args(hint))))

    hints = get_type_hints(kind)
    numbers = {name for name, hint in hints.items() if has_numbers(hint) and hint not in (bool, NoneType)}
    assert numbers == ranges_of(kind).keys()
    defaults = [getattr(kind, field.name, None) for field in fields(kind) if field.name in numbers]
    for allowed, default in zip(
        (ranges_of(kind)[field.name] for field in fields(kind) if field.name in numbers), defaults, strict=True
    ):
        assert all(
            value in allowed for value in (default if isinstance(default, tuple) else [default]) if value is not None
        )


@table(
    ("word", "message"),
    [
        ("optim.learning_rate=-1", "optim.learning_rate: got -1.0; expected a finite number above 0"),
        ("optim.learning_rate=.nan", "optim.learning_rate: got nan; expected a finite number above 0"),
        ("optim.learning_rate=.inf", "optim.learning_rate: got inf; expected a finite number above 0"),
        ("optim.betas=[0.9, 1.0]", "optim.betas: got (0.9, 1.0); expected a number from 0 to below 1"),
        ("optim.eps=0", "optim.eps: got 0.0; expected a finite number, 1e-37 or more"),
        ("optim.ema_decay=2", "optim.ema_decay: got 2.0; expected a number from 0 to below 1"),
        ("optim.warmup_steps=40", "optim.warmup_steps: got 40 of loop.max_train_steps 40, which leaves none for"),
        ("data.batch_size=0", "data.batch_size: got 0; expected a number from 1 to 1048576"),
        ("data.image_size=0", "data.image_size: got 0; expected a number from 1 to 8192"),
        ("data.workers=-1", "data.workers: got -1; expected a number from 0 to 1024"),
        ("data.held_out_percent=200", "data.held_out_percent: got 200.0; expected a number from 0 to below 50"),
        ("data.background=whyte", "data.background: got 'whyte'; expected a colour that PIL knows, such as white"),
        ("data.licence=", "data.licence: expected text of at least one character"),
        ("data.held_out={test: ''}", "data.held_out: expected text of at least one character"),
        ("output_dir=", "output_dir: expected text of at least one character"),
        ("output_dir=a\0b", "output_dir: expected text of at least one character, without NUL"),
        (f"space.autoencoder={'x' * 300}", "space.autoencoder: a name of more than 255 bytes, which no file has"),
        ("conditioners.text.dropout=2", "conditioners.text.dropout: got 2.0; expected a number from 0 to below 1"),
        ("validation.num_inference_steps=0", "validation.num_inference_steps: got 0; expected a number from 1 to"),
        ("validation.num_inference_steps=2000", "got 2000; expected at most objective.num_train_timesteps, 1000"),
        ("validation.guidance_scale=.nan", "validation.guidance_scale: got nan; expected a number from 0 to 1000000"),
        ("validation.num_images=0", "validation.num_images: got 0; expected a number from 1 to"),
        ("loop.save_every_steps=0", "loop.save_every_steps: got 0; expected a number from 1 to"),
        ("loop.log_every_steps=0", "loop.log_every_steps: got 0; expected a number from 1 to"),
        ("loop.max_train_steps=-5", "loop.max_train_steps: got -5; expected a number from 1 to"),
        ("loop.gradient_accumulation_steps=3", "data.batch_size: got 8; expected a multiple of loop.gradient"),
        ("conditioners.frames={}", "conditioners.frames: got settings for data.source openmoji of images"),
        ("temporal={}", "temporal: got settings for data.source openmoji of images; expected null, or data of clips"),
        ("data.source=openmoji_clips", "temporal: got null for clips; expected settings of temporal layers"),
        ("data.items=frames", "data.items: got frames of data.source openmoji, whose items are images; expected all"),
        ("data.num_frames=1", "data.num_frames: got 1; expected a number from 2 to 65536"),
        ("denoiser.norm_eps=.nan", "denoiser.norm_eps: not a finite number"),
        ("denoiser.layers_per_block=1000000000", "denoiser.layers_per_block: more than 1000 layers"),
        ("denoiser.pretrained=[1]", "denoiser.pretrained: got list; expected a name"),
        ("conditioners.text.encoder.num_hidden_layers=1000000000", "encoder.num_hidden_layers: more than 1000 layers"),
        (f"denoiser.act_fn={{token: {SECRET}}}", "denoiser.act_fn: got a dict; expected a number, text"),
    ],
)
def test_impossible_values_are_refused_when_the_config_is_read(word, message):
    refused = refusal(f"--{word}")
    assert message in refused
    assert "\n" not in refused
    assert SECRET not in refused


def test_frozen_image_layers_must_be_of_a_trained_model():
    refused = refusal("--data.source=openmoji_clips", "--temporal={}")
    assert refused.startswith("temporal.freeze_image_layers: got true for a denoiser from scratch, whose last layer")


def test_a_seed_that_no_generator_takes_is_refused():
    assert refusal(f"--seed={10**30}").startswith("seed: got 1000")
    assert refusal("--seed", "0x" + "f" * 5000).startswith("seed: got 0xfff")  # Python refuses to write it in digits


def test_infinity_is_no_clipping_of_gradients():
    assert load_config(StageConfig, ["--config", str(TINY), "--optim.max_grad_norm", ".inf"])


def test_yaml_that_is_nested_too_deeply_is_a_config_error(tmp_path):
    (tmp_path / "deep.yaml").write_text("seed: " + "[" * 2000)
    with pytest.raises(ConfigError, match=r"deep\.yaml: nested too deeply"):
        load_config(StageConfig, ["--config", str(tmp_path / "deep.yaml")])


def test_a_list_that_holds_itself_is_a_config_error(tmp_path):
    (tmp_path / "self.yaml").write_text("output_dir: x\ndenoiser: {act_fn: &a [*a]}")
    with pytest.raises(ConfigError, match=r"denoiser\.act_fn: got a list"):
        load_config(StageConfig, ["--config", str(tmp_path / "self.yaml")])


def test_ranges_say_what_they_allow():
    assert 1 in Numbers(0, 1)
    assert 1 not in Numbers(0, 1, below=True)
    assert 0 not in Numbers(0, above=True)
    assert float("nan") not in Numbers(0)
    assert 10**400 not in Numbers(0, 1e6)
    assert str(Numbers(0, 1e9, above=True)) == "a number above 0, to 1000000000"
    assert str(Numbers(1, 5)) == "a number from 1 to 5"
    assert str(FINITE) == "a finite number"


def test_what_a_library_raises_names_the_path_and_keeps_the_reason():
    with pytest.raises(ConfigError, match=r"^denoiser: ZeroDivisionError: division by zero$"), explained("denoiser"):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError, match=r"^denoiser\.x: no such$"), explained("denoiser"):
        raise ValueError("denoiser.x: no such")
    assert shown(16**5000).startswith("0x1000")


# ---- what only building shows ----


@table(
    ("name", "path", "value"),
    [
        ("stable diffusion", "denoiser.norm_num_groups", 7),
        ("stable diffusion", "denoiser.norm_num_groups", 0),
        ("stable diffusion", "denoiser.block_out_channels", [8]),
        ("stable diffusion", "denoiser.block_out_channels", ["a", "b"]),
        ("stable diffusion", "denoiser.dropout", 2.0),
        ("stable diffusion", "denoiser.act_fn", "reluu"),
        ("stable diffusion", "denoiser.down_block_types", ["DownBlock2D", "NoBlock"]),
        ("stable diffusion", "denoiser.cross_attention_dim", 10**12),
        ("stable diffusion", "denoiser.in_channels", -4),
        ("tiny vae", "autoencoder.latent_channels", 0.5),
        ("tiny vae", "autoencoder.norm_num_groups", 3),
        ("dit", "denoiser.num_layers", "x"),
        ("stable diffusion", "conditioners.text.encoder.num_attention_heads", 5),
        ("stable diffusion", "conditioners.text.encoder.hidden_act", "geluu"),
        ("stable diffusion", "conditioners.text.encoder.vocab_size", 100),
    ],
)
def test_what_a_library_refuses_to_build_is_named_with_its_reason(bench, name, path, value):
    config = changed(bench, name, **{path.replace(".", "__"): value})
    with pytest.raises(ConfigError) as caught:
        prepare(config, bench, name)
    assert str(caught.value).startswith(path.rpartition(".")[0])
    assert len(str(caught.value)) > len(path) + 20


def test_a_network_that_no_memory_holds_is_refused_without_asking_for_it(bench, monkeypatch):
    monkeypatch.setattr(network, "memory_bytes", lambda: 2**20)
    config = changed(bench, "stable diffusion", denoiser__block_out_channels=[2048, 2048])
    with pytest.raises(
        ConfigError, match=r"^denoiser: UNet2DConditionModel .* parameters, which need \d+\.\d GiB; this"
    ):
        build_network(config.denoiser, "denoiser")


def test_the_trial_build_takes_no_draw(bench):
    tree = {key: value for key, value in changed(bench, "ddpm").denoiser.items() if key != "_class_name"}
    torch.manual_seed(0)
    one = build_network({"_class_name": "UNet2DModel", **tree}, "denoiser").conv_in.weight
    torch.manual_seed(0)
    assert torch.equal(one, network.diffusers.UNet2DModel(**tree).conv_in.weight)


@table("folder", ["no/such/folder", "not a name!", "a/b/c/d"])
def test_pretrained_parts_that_are_not_there_are_named(bench, folder):
    for path in ("denoiser", "space.autoencoder", "conditioners.text.pretrained"):
        value: Any = {"pretrained": folder} if path == "denoiser" else folder
        config = changed(bench, "stable diffusion", **{path.replace(".", "__"): value})
        with pytest.raises(ConfigError, match=rf"^{re.escape(path)}"):
            prepare(config, bench, "stable diffusion")


def test_a_denoiser_is_no_autoencoder(bench):
    build_network(changed(bench, "ddpm").denoiser, "denoiser").save_pretrained(bench.folder / "unet")
    space = changed(bench, "dit", space__autoencoder=str(bench.folder / "unet")).space
    with pytest.raises(ConfigError, match="got 'UNet2DModel'; choose from AutoencoderKL, VQModel"):
        build_space(space)


# ---- what only one step shows ----


@table(
    ("name", "changes", "message"),
    [
        ("stable diffusion", {"denoiser__in_channels": 3}, "^denoiser, space, .*, data.image_size 16 do not fit"),
        ("stable diffusion", {"denoiser__cross_attention_dim": 32}, "do not fit together: RuntimeError: mat1 and mat2"),
        ("stable diffusion", {"conditioners__text__keywords": {"no_such": "prompt_embeds"}}, ".*'no_such'"),
        ("stable diffusion", {"data__image_size": 17}, "data.image_size 17 is not a multiple of the auto"),
        ("stable diffusion", {"denoiser__sample_size": 16}, "denoiser.sample_size: images are sampled at 32 x"),
        ("stable diffusion", {"denoiser__sample_size": None}, "^validation or denoiser.sample_size: "),
        ("stable diffusion", {"validation__num_inference_steps": 61}, "num_inference_steps: 61 make DPMSolver"),
        ("dit", {"denoiser__norm_eps": -1.0}, "first losses are not finite"),
        ("tiny vae", {"data__image_size": 17}, "^autoencoder, reconstruction, data.image_size 17 do not fit together"),
        ("tiny vae", {"autoencoder__in_channels": 4}, "^autoencoder, reconstruction, data.image_size 16 do not fit"),
        ("tiny vae", {"reconstruction__discriminator_layers": 9}, "^autoencoder, reconstruction, .*Kernel size"),
        ("tiny vae", {"reconstruction__l1_weight": 1e300}, "first losses are not finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_the_first_step(bench, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(changed(bench, name, **changes), bench, name)


@table("name", ["tiny vae", "stable diffusion", "unclip prior", "videoldm", "pixart"])
def test_sound_configs_pass(bench, name):
    saved = bench.folder / "saved.yaml"
    saved.unlink(missing_ok=True)
    prepare(changed(bench, name), bench, name)
    assert saved.stat().st_size > 500, "it came to its end"


def test_a_resume_check_has_steps_for_warm_up_and_for_decay():
    assert STEPS // 2 < 2 * STEPS - 1


@table(
    ("words", "path"),
    [
        (("--sampler.kind", "ddim"), "sampler.kind: got ddim, which knows no objective.path flow"),
        (
            ("--sampler.kind", "unclip"),
            "sampler.kind: got unclip, which samples objective.path cosine with prediction_",
        ),
        (
            ("--sampler.kind", "unclip", "--sampler.thresholding", "0.9"),
            "sampler.thresholding: got a number with sampler.kind unclip",
        ),
        (("--sampler.variance_type", "fixed_large"), "sampler.variance_type: got fixed_large, which only sampler.kind"),
        (
            ("--sampler.kind", "ddpm", "--validation.num_inference_steps", "1"),
            "validation.num_inference_steps: got 1; expected 2 or more",
        ),
        (
            ("--conditioners.text", "null", "--validation.retrieval_images", "9"),
            "validation.retrieval_images: got 9 without conditioners.text",
        ),
        (("--loop.max_train_steps", "3", "--loop.max_train_seconds", "9"), "loop: got max_train_steps 3 and max_train"),
        (
            ("--loop.max_train_steps", "null", "--loop.max_train_epochs", "1e308"),
            "loop.max_train_epochs: got 1e+308; expected a number above 0, to 1000000000",
        ),
        (("--push_private", "true"), "push_to_hub: got null"),
        (("--push_every_steps", "5"), "push_to_hub: got null"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(words, path):
    assert path in refusal("--objective.path", "flow", "--objective.prediction_type", "flow_prediction", *words)
