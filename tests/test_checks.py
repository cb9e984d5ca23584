"""What keeps a model from learning, measured on stages in which exactly that is so."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from ldm.models.text_encoder import train_tokenizer
from ldm.training.checks import Scale, conditional_gain, latent_scale, null_difference, truncation
from ldm.training.steps import DiffusionStep
from pipelines.text2img import TextToImagePipeline

from . import test_stage
from .test_network import CAPTIONS
from .test_stage import TEXT, batch, build_stage, config

run = test_stage.run


def step_of(run, **text):
    step = DiffusionStep(build_stage(config(replace(TEXT, **text)), CAPTIONS), run, 0.9)
    torch.nn.init.normal_(step.averaged.denoiser.conv_out.weight, std=0.3)  # zero at first, as if there were no text
    return step


def pipeline_of(step):
    text = step.averaged.conditioners["text"]
    return TextToImagePipeline(None, text.text_encoder, text.tokenizer, None, None)


def test_the_scale_is_that_of_a_known_gaussian():
    drawn = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert latent_scale(3 * drawn + 1).mean == pytest.approx(1, abs=0.1)
    assert latent_scale(3 * drawn + 1).std == pytest.approx(3, rel=0.05)


def test_the_unit_scale_has_four_edges():
    for mean, std in ((0.5, 1), (-0.5, 1), (0, 0.5), (0, 2)):
        assert Scale(mean, std).unit
        assert not Scale(1.01 * mean, std * (1 if std == 1 else 1.01 if std > 1 else 0.99)).unit
    assert not Scale(math.nan, 1).unit


def test_what_is_cut_is_counted_by_captions_and_by_tokens():
    tokenizer = train_tokenizer([], 514, 5)  # a token a letter; begin and end are two of the five
    assert vars(truncation(tokenizer, ["abc", "abcdefgh"])) == {"captions": 0.5, "tokens": 5 / 15}
    assert vars(truncation(tokenizer, [])) == {"captions": 0, "tokens": 0}
    many = ["abc"] * 15_000 + ["abcdefgh"] * 15_000
    assert truncation(tokenizer, many).captions == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize("train", [True, False], ids=["trained", "frozen"])
def test_the_null_is_the_pipelines(run, train):
    step = step_of(run, train=train)
    assert null_difference(step, batch(), pipeline_of(step)) < 1e-6


def test_another_null_is_seen(run, monkeypatch):
    step = step_of(run)
    text = step.averaged.conditioners["text"]
    tokenize = text.tokenize
    monkeypatch.setattr(
        step.stage.model.conditioners["text"], "tokenize", lambda some: tokenize([c or "none" for c in some])
    )
    assert null_difference(step, batch(), pipeline_of(step)) > 0.01
    shorter = copy.deepcopy(pipeline_of(step).tokenizer)
    shorter.model_max_length = 7
    pipeline = TextToImagePipeline(None, text.text_encoder, shorter, None, None)
    assert null_difference(step, batch(), pipeline) == math.inf


def test_without_dropout_there_is_no_null(run):
    step = step_of(run, dropout=0.0)
    assert null_difference(step, batch(), pipeline_of(step)) is None


def told(count=24):
    """A batch of `count` noisy images, bright or dark as their captions say."""
    plain = batch(range(count))
    bright = torch.tensor([position % 2 for position in plain.positions]).view(-1, 1, 1, 1)
    captions = ["a cat" if position % 2 else "three dogs" for position in plain.positions]
    return replace(plain, captions=captions, pixel_values=plain.pixel_values / 10 + bright - 0.5)


def reads(model, monkeypatch):
    """Let a model know of an image exactly whether it is bright, if its caption says so."""

    def forward(x_t, timesteps, inputs):
        bright = (inputs["text"]["input_ids"] == cat).all(1).float().view(-1, 1, 1, 1)
        return (bright - 0.5).expand_as(x_t)

    cat = model.conditioners["text"].tokenize(["a cat"])["input_ids"][0]
    monkeypatch.setattr(model, "forward", forward)


def test_the_gain_of_a_model_that_reads_is_what_reading_is_worth(run, monkeypatch):
    step = DiffusionStep(build_stage(config(prediction_type="sample"), CAPTIONS), run, 0.9)
    reads(step.averaged, monkeypatch)
    gain = conditional_gain(step, told(), (0.3, 0.7))
    # the wrong half is 1 off: its loss is (1 + e)^2 in place of e^2, and e is the noise of an image, 0.06 rms
    assert gain.by_level == pytest.approx([1, 1], abs=0.05)
    assert gain.mean == pytest.approx(sum(gain.by_level) / 2)
    assert 0 < gain.standard_error < 0.02


def test_the_gain_of_a_model_that_does_not_read_is_zero(run, monkeypatch):
    step = step_of(run)
    monkeypatch.setattr(step.averaged, "forward", lambda x_t, timesteps, inputs: 0.3 * x_t)
    gain = conditional_gain(step, told(), (0.3, 0.7))
    assert (gain.by_level, gain.mean, gain.standard_error) == ([0, 0], 0, 0)


def test_the_standard_error_is_the_spread_over_repetitions(run):
    step = step_of(run)
    gains = [
        conditional_gain(step, replace(told(), positions=list(range(k, k + 24))), (0.5,)) for k in range(0, 960, 24)
    ]
    spread = torch.tensor([gain.mean for gain in gains]).std()
    assert spread == pytest.approx(sum(gain.standard_error for gain in gains) / len(gains), rel=0.5)


def test_known_losses_are_not_measured_again_and_change_nothing(run, monkeypatch):
    step, levels = step_of(run), (0.3, 0.7)
    losses = step.held_out_losses(told(), levels)
    assert losses.shape == (2, 24)
    expected = conditional_gain(step, told(), levels)
    measure, seen = step.held_out_losses, []
    monkeypatch.setattr(step, "held_out_losses", lambda batch, levels: seen.append(batch) or measure(batch, levels))
    assert conditional_gain(step, told(), levels, losses) == expected
    (shuffled,) = seen
    assert all(one != other for one, other in zip(shuffled.captions, told().captions, strict=True))


def test_nothing_is_shuffled_where_there_is_nothing_to_shuffle(run):
    step = step_of(run)
    for captions in (["a cat"] * 13 + ["three dogs"] * 11, [""] * 23 + ["a cat"], [""] * 24):
        assert conditional_gain(step, replace(told(), captions=captions), (0.5,)) is None
    some = replace(told(), captions=[""] * 20 + ["a cat", "three dogs"] * 2)
    assert conditional_gain(step, some, (0.5,)) is not None
