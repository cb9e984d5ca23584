"""A CLIP is trained with the loss of the paper over the batch of all processes, and is loaded by transformers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from ldm.commands.evaluate_clip import evaluate_clip
from ldm.conditioners.text import TextConditioner
from ldm.config import ClipConfig, ClipNetworkConfig
from ldm.config.conditioners import TextConfig
from ldm.config.file import load_config
from ldm.data.batches import CaptionedImages
from ldm.data.pixels import to_pixel_values
from ldm.data.positions import generators
from ldm.data.sources import build_source
from ldm.errors import ConfigError
from ldm.evaluation import clip as clip_module
from ldm.evaluation.clip import ClipEvaluation
from ldm.models.clip import build_clip, load_clip, load_image_encoder, normalised
from ldm.models.text_encoder import build_text_encoder
from ldm.objectives.contrastive import contrastive_losses
from ldm.training.contrastive import Contrast, random_crops
from ldm.training.resume_check import differences

from .table import table
from .trainers import QUICK, ended, ledger, metrics, run, start_several

ENCODER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TINY_CLIP = {
    "text": ENCODER,
    "vision": ENCODER | {"image_size": 8, "patch_size": 4},
    "projection_dim": 4,
    "vocab_size": 514,
    "max_length": 8,
}
CONFIG = ("--config", "configs/tiny/clip.yaml")
TINY = (*CONFIG, *QUICK, "--data.batch_size", 8, "--optim.decay", "constant")


def embeds(count, width=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=draw, dtype=torch.float64), dim=1)


def by_hand(images, texts, scale):
    """Return the loss of figure 3, written out: -log of softmax shares, over rows and over columns."""
    logits = [[float(scale) * float(image @ text) for text in texts] for image in images]
    total = 0.0
    for own in range(len(images)):
        total -= logits[own][own] - math.log(sum(math.exp(value) for value in logits[own]))
        total -= logits[own][own] - math.log(sum(math.exp(row[own]) for row in logits))
    return total / (2 * len(images))


def test_the_loss_is_that_of_the_paper():
    images, texts, scale = embeds(6), embeds(6, seed=1), torch.tensor(7.0, dtype=torch.float64)
    losses = contrastive_losses(images, texts, images, texts, scale)
    assert losses.shape == (6,)
    assert float(losses.mean()) == pytest.approx(by_hand(images, texts, scale), rel=1e-12)
    assert float(losses.mean()) == pytest.approx(
        float(image_text_contrastive_loss(scale * texts @ images.T)), rel=1e-12
    )


def test_its_gradient_is_that_of_finite_differences():
    leaves = [embeds(4), embeds(4, seed=1), torch.tensor(3.0, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda i, t, s: contrastive_losses(i, t, i, t, s), leaves)


@table("parts", [1, 2, 3])
def test_the_parts_of_a_batch_make_the_loss_of_the_whole(parts):
    images, texts, scale = embeds(6), embeds(6, seed=1), torch.tensor(7.0)
    whole = contrastive_losses(images, texts, images, texts, scale)
    size = 6 // parts
    found = [
        contrastive_losses(images[i : i + size], texts[i : i + size], images, texts, scale, i)
        for i in range(0, 6, size)
    ]
    torch.testing.assert_close(torch.cat(found), whole)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    pair = start_several(2, "train_clip.py", (*TINY, "--output_dir", tmp_path / "two"), tmp_path / "log-two")
    assert [ended(process) for process in pair] == [0, 0], (tmp_path / "log-two-0").read_text()[-2000:]
    run("train_clip.py", (*TINY, "--output_dir", tmp_path / "one"), tmp_path / "log-one")
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training of eight steps."""
    folder = tmp_path_factory.mktemp("clip")
    run("train_clip.py", (*TINY, "--output_dir", folder / "whole"), folder / "whole.log")
    return folder


@pytest.mark.slow
def test_a_resumed_training_equals_one_that_was_not_stopped(trained):
    for steps in (4, 8):
        words = (*TINY, "--loop.max_train_steps", steps, "--output_dir", trained / "resumed")
        run("train_clip.py", words, trained / "resumed.log")
    assert "resumed step-4 at step 4" in (trained / "resumed.log").read_text()
    whole, resumed = trained / "whole", trained / "resumed"
    rows = [row for row in differences(whole, resumed) if not row.startswith("metrics.jsonl")]
    assert rows == [], "the shorter run validated at its own end, too"


def test_transformers_and_the_other_stages_load_what_is_saved(trained):
    folder = trained / "whole" / "model"
    clip, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert clip.logit_scale <= math.log(100)
    pixel_values = to_pixel_values(Image.new("RGB", (32, 32), "red"))[None]
    tokens = tokenizer(["red heart"], padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (1, 24)
    output = clip(pixel_values=normalised(pixel_values, 32), input_ids=tokens.input_ids)
    image_encoder = load_image_encoder(str(folder), "space.image_encoder")
    torch.testing.assert_close(F.normalize(image_encoder(pixel_values)), output.image_embeds)
    keywords = {"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
    text = TextConfig(pretrained=str(folder), max_length=24, train=False, keywords=keywords)
    encoder, tokenizer = build_text_encoder(text, [])
    assert isinstance(encoder, CLIPTextModelWithProjection)
    conditioner = TextConditioner(encoder, tokenizer, train=False, dropout=0.0, keywords=keywords)
    found = conditioner.encode_captions(["red heart"])
    torch.testing.assert_close(F.normalize(found["pooled_prompt_embeds"]), output.text_embeds)


def test_images_are_normalised_as_the_saved_processor_does(trained):
    settings = json.loads((trained / "whole" / "model" / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    theirs = CLIPImageProcessorPil(**settings)(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(normalised(to_pixel_values(image)[None], 32), theirs, atol=1e-5, rtol=1e-5)


def test_what_is_no_clip_is_refused_with_what_is_expected():
    with pytest.raises(ConfigError, match=r"model: assets/openmoji-vae is no CLIP .*expected the folder or Hub"):
        load_clip("assets/openmoji-vae", "model")


@table(
    ("words", "message"),
    [
        (("--loop.gradient_accumulation_steps", "2"), "each image is compared with all captions of its batch"),
        (("--data.batch_size", "1"), "data.batch_size: got 1; expected 2 or more"),
        (("--contrastive.smallest_crop", "0"), "contrastive.smallest_crop: got 0.0; expected a number above 0, to 1"),
    ],
)
def test_a_config_that_trains_something_else_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ClipConfig, [*CONFIG, *words])


def test_a_crop_of_a_ramp_is_a_part_of_the_ramp():
    ramp = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    images = torch.stack([ramp, ramp.mT] * 8)
    crops = random_crops(images, generators(0, range(16), "crop"), 0.5)
    assert torch.equal(random_crops(images, generators(0, range(16), "crop"), 1.0), images)
    assert torch.equal(crops, random_crops(images, generators(0, range(16), "crop"), 0.5))
    along = torch.cat([crops[0::2, 0, 0], crops[1::2, 0, :, 0]])
    slopes = along[:, 2:-2].diff(dim=1)
    assert float(slopes.std(1).max()) < 1e-5, "a ramp still"
    shares = slopes.mean(1) / ramp[0, 0].diff().mean()
    assert 0.5 <= float(shares.min()) < 0.7
    assert 0.8 < float(shares.max()) <= 1
    assert float(along.min()) >= -1
    assert float(along.max()) <= 1
    apart = along.mean(1)
    assert float(apart.std()) > 0.05, "not all of the middle"


def test_the_inverse_temperature_has_an_upper_limit():
    clip, _ = build_clip(ClipNetworkConfig(**TINY_CLIP), ["a", "b"])
    contrast = Contrast(clip, 100.0)
    for value, scale in ((math.log(7), 7), (math.log(99), 99), (9.0, 100)):
        clip.logit_scale.data.fill_(value)
        assert float(contrast.logit_scale.detach()) == pytest.approx(scale, rel=1e-5)


@pytest.mark.slow
def test_held_out_captions_find_their_images_by_a_clip_that_knows_all(trained, tmp_path, monkeypatch):
    model = trained / "whole" / "model"
    report = evaluate_clip(str(model), out=str(tmp_path))
    assert (tmp_path / "report.html").is_file()
    assert "Do captions find their images?" in (model / "README.md").read_text()
    first, *_ = report.sections
    row = first.rows[0]
    assert (row.name, row.measure.n, row.beside["copy"].value) == ("R@1, caption", 200, 0)
    assert row.measure.value < 0.1, "eight steps"
    measuring = ClipEvaluation(str(model), None, {}, {})
    for name in ("embedded_images", "embedded_captions"):
        monkeypatch.setattr(clip_module, name, lambda *_: torch.eye(len(measuring.gallery)))
    for section in measuring.report().sections:
        assert [one.measure.value for one in section.rows] == [1, 1, 1]
        assert section.rows[0].beside["shuffled"].value == 0
    with pytest.raises(ValueError, match="trained on"):
        evaluate_clip(str(model), captions=str(leaking(tmp_path)), out=str(tmp_path))


def leaking(folder):
    """Return a list of captions of which one is of an image that a tiny training has seen."""
    config = load_config(ClipConfig, [*CONFIG, "--output_dir", str(folder)]).data
    images = CaptionedImages(build_source(config), config)
    (folder / "list.txt").write_text("\n".join(images.source.captions(images.splits["train"][0])[:1]))
    return folder / "list.txt"
