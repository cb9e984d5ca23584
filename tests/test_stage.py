from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from ldm.conditioners.conditioning import Conditions, merge
from ldm.conditioners.text import TextConditioner
from ldm.config import LoopConfig, ObjectiveConfig, SpaceConfig, StageConfig
from ldm.config.conditioners import ConditionersConfig, LabelConfig, TextConfig
from ldm.data.batches import Batch
from ldm.data.cache import CachedCaptions
from ldm.data.positions import generators
from ldm.errors import ConfigError
from ldm.export.kinds import kind_of
from ldm.models.text_encoder import build_text_encoder
from ldm.objectives.density import LossSecondMomentDensity
from ldm.spaces import Moments
from ldm.stage import build_stage
from ldm.training.rehearsal import rehearse
from ldm.training.run import Run
from ldm.training.steps import DiffusionStep

from .table import table
from .test_network import CAPTIONS, UNET

ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = TextConfig(encoder=ENCODER, vocab_size=600, max_length=12, dropout=0.3)


@dataclass
class Captions:
    captions: list[str]


def config(text=TEXT, **objective):
    return StageConfig(
        output_dir="",
        denoiser=UNET | {"in_channels": 3, "out_channels": 3},
        space=SpaceConfig(kind="pixel"),
        conditioners=ConditionersConfig(text=text),
        objective=ObjectiveConfig(**objective),
    )


def batch(positions=range(6)):
    positions = list(positions)
    images = torch.stack([torch.rand(3, 8, 8, generator=g) * 2 - 1 for g in generators(9, positions, "image")])
    return Batch(positions, positions, [CAPTIONS[p % 3] for p in positions], images, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(str(tmp_path_factory.mktemp("run")), 0, LoopConfig(trackers=(), mixed_precision="no"))
    torch.set_num_threads(1)
    return run


def conditioner(train=True, dropout=0.3):
    torch.manual_seed(0)
    return TextConditioner(*build_text_encoder(TEXT, CAPTIONS), train=train, dropout=dropout)


def test_texts_need_captions():
    with pytest.raises(ConfigError, match=r"conditioners\.text: no training image has a caption"):
        build_stage(config(), [])


def test_the_first_loss_is_the_variance_of_the_target(run):
    stage = build_stage(config(prediction_type="epsilon"), CAPTIONS)
    step = DiffusionStep(stage, run, 0.9)
    losses = torch.stack([step.losses(batch(range(i, i + 6)), 0)["denoiser"] for i in range(0, 240, 6)])
    # the mean square of unit noise: 1, within four standard errors of sqrt(2 / number of draws)
    assert float(losses.detach().mean()) == pytest.approx(1, abs=4 * (2 / (240 * 192)) ** 0.5)


def test_the_same_config_builds_the_same_weights(run):
    one, two = (build_stage(config(), CAPTIONS).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_stage(replace(config(), seed=1), CAPTIONS).model.state_dict()
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_what_is_remembered_of_a_step_does_not_depend_on_micro_batches_and_processes(run, monkeypatch):
    objective = {"path": "cosine", "num_train_timesteps": 2, "timestep_density": "loss_second_moment"}

    def remembered(*parts, gather=lambda tensors: tensors):
        monkeypatch.setattr(run.accelerator, "gather", gather)
        step = DiffusionStep(build_stage(config(**objective), CAPTIONS), run, 0.9)
        rehearse(step, batch(range(5)), "these")  # is not remembered
        for global_step in range(2):
            for part in parts:
                step.losses(batch(part), global_step)
            step.after_step()
        return step.memory

    whole = remembered(range(30))
    assert int(whole["seen"].sum()) == 60, "each sample of both steps, once"
    assert int(whole["seen"].min()) > LossSecondMomentDensity.HISTORY, "so that the order matters"
    cut = remembered(range(15), range(15, 30))
    others = remembered(range(30), gather=lambda tensors: tuple(tensor.flip(0) for tensor in tensors))
    for memory in (cut, others):
        assert torch.equal(memory["seen"], whole["seen"])
        torch.testing.assert_close(memory["losses"], whole["losses"])


def test_a_loss_does_not_depend_on_how_the_batch_is_cut(run):
    step = DiffusionStep(build_stage(config(), CAPTIONS), run, 0.9)
    for parameter in step.stage.model.parameters():  # away from the zero function
        torch.nn.init.normal_(parameter, std=0.05)
    whole, *parts = (step.losses(batch(p), 0)["denoiser"].item() for p in (range(6), range(3), range(3, 6)))
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_text_is_trained_with_the_denoiser_unless_frozen(run):
    for train in (True, False):
        stage = build_stage(config(replace(TEXT, train=train), prediction_type="epsilon"), CAPTIONS)
        step = DiffusionStep(stage, run, 0.9)
        for parameter in stage.model.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        step.losses(batch(), 0)["denoiser"].backward()
        grads = [p.grad for p in stage.model.conditioners["text"].parameters()]
        assert any(g is not None and g.abs().max() > 0 for g in grads) == train
        assert all(g is None for g in grads) != train


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames what is called here
def test_gradient_checkpointing_reaches_denoiser_and_trained_encoder(run, monkeypatch):
    monkeypatch.setattr(run, "config", LoopConfig(gradient_checkpointing=True))
    for train in (True, False):
        step = DiffusionStep(build_stage(config(replace(TEXT, train=train)), CAPTIONS), run, 0.9)
        assert step.stage.model.denoiser.is_gradient_checkpointing
        encoder = step.stage.model.conditioners["text"].text_encoder
        assert any(getattr(layer, "gradient_checkpointing", False) for layer in encoder.modules()) == train


def test_frozen_embeddings_equal_the_encoders(run):
    frozen = conditioner(train=False)
    texts = ["men with bunny ears", "", "keycap 3", ""]
    ids = frozen.tokenize(texts)
    expected = frozen.text_encoder(**ids)[0]
    for _ in range(2):  # the second time from memory
        embeds = frozen.inputs(Captions(texts), None, [False] * 4, [])["prompt_embeds"]
        assert torch.allclose(embeds, expected, atol=1e-6)


@table("train", [False, True])
def test_remembered_captions_are_encoded_once_for_all_runs_if_the_encoder_is_frozen(train, run, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    known = sorted({"", *CAPTIONS})
    for calls in (1, 0):
        step = DiffusionStep(build_stage(config(replace(TEXT, train=train)), CAPTIONS), run, 0.9)
        text = step.stage.model.conditioners["text"]
        encoded, encode = [], text.encode_captions
        monkeypatch.setattr(text, "encode_captions", lambda c, e=encode, n=encoded: n.append(c) or e(c))
        step.remember(SimpleNamespace(encoded_captions=lambda key, encode: CachedCaptions(known, key(known), encode)))
        step.inputs(batch(), None)
        assert len(encoded) == (0 if train else calls)
    assert bool(list(tmp_path.rglob("*.safetensors"))) != train


def test_a_dropped_caption_is_the_empty_caption_on_every_path():
    text = conditioner()
    dropped = text.inputs(Captions(["keycap 3", "keycap 3"]), None, [True, False], [])
    plain = text.inputs(Captions(["", "keycap 3"]), None, [False, False], [])
    assert dropped.keys() == plain.keys()
    assert all(torch.equal(dropped[name], plain[name]) for name in plain)


def test_the_dropout_rate_is_the_one_asked_for(run):
    step = DiffusionStep(build_stage(config(), CAPTIONS), run, 0.9)
    null = step.stage.model.conditioners["text"].tokenize([""])["input_ids"][0]
    count = 2000
    ids = step.inputs(batch(range(count)), None)["text"]["input_ids"]
    share = float((ids == null).all(1).float().mean())
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    kept = step.inputs(batch(range(count)), None, dropped=False)["text"]["input_ids"]
    assert not (kept == null).all(1).any()


@table("dropout", [0.0, 0.3])
def test_guidance_leaves_out_what_training_drops_and_nothing_else(dropout, run):
    step = DiffusionStep(build_stage(config(replace(TEXT, dropout=dropout)), CAPTIONS), run, 0.9)
    null = step.stage.model.conditioners["text"].tokenize([""])["input_ids"][0]
    ids = step.inputs(batch(), None, dropped=True)["text"]["input_ids"]
    assert (ids == null).all(1).tolist() == [dropout > 0] * 6


def test_tokens_are_those_of_the_stable_diffusion_pipeline():
    text = conditioner()
    ids = text.tokenize(["keycap 3"])["input_ids"]
    tokenizer = text.tokenizer
    stock = tokenizer(["keycap 3"], padding="max_length", max_length=tokenizer.model_max_length,
                      truncation=True, return_tensors="pt").input_ids  # fmt: skip
    assert torch.equal(ids, stock)
    assert ids.shape == (1, 12)


def test_two_conditioners_may_not_set_one_keyword():
    one = Conditions(channels=(torch.zeros(1),), kwargs={"a": 1})
    assert merge([one, Conditions(kwargs={"b": 2})]).kwargs == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="'a'"):
        merge([one, one])


def test_held_out_losses_are_the_averaged_models_and_repeat(run):
    step = DiffusionStep(build_stage(config(), CAPTIONS), run, 0.9)
    for parameter in step.stage.model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    first = step.held_out_losses(batch(), [0.2, 0.8])
    assert first.shape == (2, 6)
    assert torch.equal(first, step.held_out_losses(batch(), [0.2, 0.8]))
    assert torch.equal(first[1:], step.held_out_losses(batch(), [0.8]))
    step.averages["denoiser"].update(0)
    assert not torch.equal(first, step.held_out_losses(batch(), [0.2, 0.8]))


def test_moments_are_sampled_sample_by_sample():
    moments = Moments(torch.full((3, 2, 4, 4), 5.0), torch.full((3, 2, 4, 4), 2.0))
    drawn = moments.sample(generators(0, [0, 1, 2], "posterior"))
    again = Moments(moments.mean[1:], moments.std[1:]).sample(generators(0, [1, 2], "posterior"))
    assert torch.equal(drawn[1:], again)
    many = Moments(torch.full((1, 40_000), 5.0), torch.full((1, 40_000), 2.0)).sample(generators(0, [0], "posterior"))
    assert float(many.mean()) == pytest.approx(5, abs=4 * 2 / 200)
    assert float(many.std()) == pytest.approx(2, abs=4 * 2 / (2 * 40_000) ** 0.5)


def test_a_stage_that_no_pipeline_draws_with_is_refused(run):
    pixels = config()
    more = {"label": LabelConfig(3)}
    with_class = replace(pixels, conditioners=ConditionersConfig(text=TEXT, **more))
    with pytest.raises(ValueError, match="no pipeline samples a UNet2DConditionModel in ") as error:
        kind_of(build_stage(with_class, CAPTIONS), "pixel")
    assert "expected one of:" in str(error.value)
