"""The model card: what it says is true, what it shows runs, and it tells nothing of this machine."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import ModelCard
from PIL import Image

from ldm.config import AutoencoderConfig, StageConfig
from ldm.config.file import load_config
from ldm.export.card import CARD, with_name, write_card
from ldm.export.kinds import KINDS
from ldm.export.pipeline_card import pipeline_card
from ldm.models.provenance import Provenance
from ldm.recipes.autoencoder import autoencoder_card
from tests.tiny_pipeline import FLOW, PIXELS, pipeline, vae

from .table import table

ROOT = Path(__file__).parent.parent
RECORD = Provenance("fingerprint-7", "ab" * 16, 3553, 40, 12.5, 99.0, "2 threads, a processor", {"torch": "2.13.0"})
OLD = {"step": 20, "validation/loss": 9.0, "validation/r_at_1": 0.5}
NEW = {"step": 40, "validation/loss": 1.25, "validation/loss_at_0.10": float("nan"), "validation/loss_at_0.90": 1.5}


@pytest.fixture
def run(tmp_path):
    """A run's folder as training leaves it, but for the model."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (OLD, NEW, {"loss/denoiser": 2.0}))
    )
    for kind in ("samples", "reconstructions"):
        (tmp_path / kind).mkdir()
        for step in (20, 40):
            Image.new("RGB", (step, step)).save(tmp_path / kind / f"step-{step:07d}.png")
    (tmp_path / "model").mkdir()
    return tmp_path


def stage(*words):
    return load_config(StageConfig, ["--config", str(ROOT / "configs/tiny/text2img.yaml"), *words])


def autoencoder(*words):
    return load_config(AutoencoderConfig, ["--config", str(ROOT / "configs/tiny/vae.yaml"), *words])


WORDS = {
    StageConfig: lambda config: pipeline_card(kind_of_config(config), config, ranked=50),
    AutoencoderConfig: autoencoder_card,
}


def kind_of_config(config):
    """The kind of the pipeline that a stage becomes, by its config alone."""
    asks = "prompt" if config.conditioners.text else "class_labels" if config.conditioners.label else "batch_size"
    return next(kind for kind in KINDS if (kind.space, kind.asks) == (config.space.kind, asks))


def worded(config):
    return config, WORDS[type(config)](config)


def card(run, config):
    write_card(run / "model", run, *worded(config), RECORD)
    return ModelCard.load(run / "model" / CARD)


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_metadata_is_what_the_hub_reads(run):
    data = card(run, stage("--output_dir", str(run))).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-sa-4.0", "diffusers", "text-to-image")
    assert data.datasets is None
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {"loss": 1.25, "loss_at_0.90": 1.5}, "of the newest validation only, and only numbers"
    assert {result.dataset_split for result in data.eval_results} == {"validation"}
    assert card(run, autoencoder()).data.pipeline_tag is None


def test_the_newest_sheet_is_shown(run):
    text = card(run, stage()).text
    assert "](samples.png)" in text
    assert Image.open(run / "model" / "samples.png").width == 40


def test_what_was_measured_and_how_is_said(run):
    words = ["--validation.guidance_scale", "1.75", "--validation.loss_images", "77", "--seed", "11"]
    text = " ".join(card(run, stage(*words)).text.split())
    for expected in (
        *("At step 40", "at most 77", "| loss | 1.25 |", "| loss at noise level 0.10 | nan |"),
        *("in 4 steps with guidance 1.75 and seeds from 11 on",),
        *("3,553 training images", "`fingerprint-7`", "`" + "ab" * 16 + "`"),
        *("[OpenMoji](https://openmoji.org)", "Licence of the images: CC BY-SA 4.0.", "a processor", "torch 2.13.0"),
    ):
        assert expected in text
    assert "Retrieval" not in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 37, "validation/loss": 1.0, "validation/r_at_1": 0.5}) + "\n")
    text = card(run, stage()).text
    assert "Retrieval: the share of 50 validation captions" in text
    assert "At step 37" in text
    assert "40 steps" in text


def test_nothing_measured_and_nothing_drawn_is_said(run, tmp_path):
    (run / "bare").mkdir()
    found = card(run, stage())
    write_card(run / "model", run / "bare", *worded(stage()), RECORD)
    bare = ModelCard.load(run / "model" / CARD)
    assert "Nothing was measured." in bare.text
    assert "samples.png" in found.text
    assert "samples.png" not in bare.text
    assert bare.data.eval_results is None


@table(
    ("licence", "metadata", "said"),
    [
        (None, None, "Licence of the images: not stated."),
        ("CC BY 4.0", "cc-by-4.0", "Licence of the images: CC BY 4.0."),
        ("only among friends", "other", "Licence of the images: only among friends."),
    ],
)
def test_the_licence_of_the_images_is_said(run, licence, metadata, said):
    words = ["--data.source", "imagefolder", "--data.path", str(run)]
    found = card(run, stage(*words, *(["--data.licence", licence] if licence else [])))
    assert found.data.license == metadata
    assert said in found.text


def test_a_licence_that_is_given_counts_also_for_known_images(run):
    assert card(run, stage("--data.licence", "MIT")).data.license == "mit"


def test_a_data_set_of_the_hub_is_linked(run):
    found = card(run, stage("--data.source", "dataset", "--data.path", "alice/birds"))
    assert found.data.datasets == ["alice/birds"]
    assert "https://huggingface.co/datasets/alice/birds" in found.text
    assert card(run, stage("--data.source", "dataset", "--data.path", str(run))).data.datasets is None


@table("kind", [stage, autoencoder])
def test_s04_nothing_of_this_machine_is_told(run, kind):
    words = ["--output_dir", str(run), "--data.source", "imagefolder", "--data.path", "/home/alice/secret/birds"]
    words += ["--data.held_out", "{validation: /home/alice/v.txt, test: /Users/alice/t.txt}", "--push_to_hub", "al/ice"]
    words += ["--space.autoencoder", "C:\\Users\\alice\\vae"] if kind is stage else []
    part = "denoiser" if kind is stage else "autoencoder"
    words += [f"--{part}.pretrained", "../alice/unet"]
    card(run, kind(*words))
    text = (run / "model" / CARD).read_text()
    assert not re.search(r"alice|secret|Users|home|al/ice|push_", text)
    assert str(run) not in text
    assert str(run.parent) not in text
    assert {"birds", "v.txt", "unet", run.name} <= set(re.findall(r"[\w.-]+", text))


def test_s04_the_config_in_the_card_can_be_trained(run, tmp_path):
    config = stage("--output_dir", str(run))
    (yaml,) = re.findall(r"```yaml\n(.*?)```", card(run, config).text, re.DOTALL)
    (tmp_path / "config.yaml").write_text(yaml)
    read = load_config(StageConfig, ["--config", str(tmp_path / "config.yaml")])
    assert read == replace(config, output_dir=run.name)


def test_the_pipeline_is_loaded_as_the_card_says(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(run / "modules"))
    pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW)).save_pretrained(run / "model")
    stock, own = snippets(card(run, stage()).text)
    kinds = []
    for snippet in (stock, own):
        left = {}
        exec(snippet, left)  # noqa: S102
        assert Image.open(run / "image.png").size == (PIXELS, PIXELS)
        (run / "image.png").unlink()
        kinds.append(type(left["pipe"]).__name__)
    assert kinds == ["StableDiffusionPipeline", "TextToImagePipeline"]


@table(
    ("name", "sampler", "plain"),
    [("text2img", "dpm_solver", False), ("ddpm", "ddpm", True), ("ddpm", "ddim", False)],
)
def test_a_learned_variance_is_sampled_by_plain_diffusers_where_it_makes_the_same_images(run, name, sampler, plain):
    words = ["--config", str(ROOT / f"configs/tiny/{name}.yaml"), "--objective.variational_weight", "1"]
    found = snippets(card(run, load_config(StageConfig, [*words, "--sampler.kind", sampler])).text)
    assert ["trust_remote_code=True" in snippet for snippet in found] == ([False, True] if plain else [True])


def test_the_autoencoder_is_loaded_as_the_card_says(run, monkeypatch):
    monkeypatch.chdir(run)
    vae().half().save_pretrained(run / "model")
    (snippet,) = snippets(card(run, autoencoder()).text)
    left = {}
    exec(snippet, left)  # noqa: S102
    assert left["latents"].shape == (1, 4, 16, 16)
    assert left["reconstructions"].shape == (1, 3, 32, 32)


def test_a_repository_takes_the_place_of_the_folder(run):
    text = card(run, stage()).content
    named = with_name(text, "me/model")
    assert named.count('model = "me/model"') == text.count('model = "model"') == 2
    assert named.replace('"me/model"', '"model"') == text


@table(("kind", "warned"), [("ddim", True), ("ddpm", False)])
def test_where_plain_diffusers_draws_other_images_it_says_so(run, kind, warned):
    words = ["--config", str(ROOT / "configs/tiny/ddpm.yaml"), "--sampler.kind", kind]
    text = card(run, load_config(StageConfig, words)).text
    assert ("`use_clipped_model_output=True`" in text) == warned
    assert "guidance" not in text.partition("## ")[0], "an unconditional model has none"
