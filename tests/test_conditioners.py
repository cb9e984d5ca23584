"""What each conditioner tells, against its definition; its null; and that a sample's draws are its own."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import (
    BertModel,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ldm.conditioners.conditioning import nested
from ldm.conditioners.frames import FramesConditioner
from ldm.conditioners.image import ImageConditioner
from ldm.conditioners.label import LabelConditioner
from ldm.conditioners.low_res import LowResConditioner
from ldm.conditioners.text import TextConditioner
from ldm.config import DataConfig
from ldm.config.check import checked
from ldm.config.conditioners import UNKNOWN_CLASS, TextConfig
from ldm.data.batches import CaptionedImages
from ldm.data.cache import CachedCaptions
from ldm.data.positions import generators
from ldm.errors import ConfigError
from ldm.models.clip import ImageEncoder
from ldm.models.resolution import enlarged, shrunk
from ldm.models.text_encoder import build_text_encoder
from ldm.spaces import EmbeddingSpace
from ldm.stage import ConditionedDenoiser
from pipelines.text2img import TextToImagePipeline

from . import tiny_pipeline
from .table import table
from .test_batches import Shades


@dataclass
class Some:
    captions: tuple[str, ...] = ()
    class_labels: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    views: tuple[tuple[int, bool], ...] = ()


def images(count, size=16):
    return torch.stack([torch.rand(3, size, size, generator=draw) * 2 - 1 for draw in generators(5, range(count), "p")])


def tell(conditioner, batch, count, dropped=None, x0=None, positions=None):
    draws = generators(0, positions or range(count), "condition")
    x0 = torch.zeros(count, 4, 2, 2) if x0 is None else x0
    return conditioner.inputs(batch, x0, dropped or [False] * count, draws)


def image_encoder(image_size=8):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=image_size, patch_size=4, projection_dim=12)
    return ImageEncoder(CLIPVisionModelWithProjection(config))


def text(**keywords):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = CLIPTextConfig(**sizes, **ids, projection_dim=6, max_position_embeddings=tiny_pipeline.LENGTH)
    encoder = CLIPTextModelWithProjection(config).eval()
    return TextConditioner(encoder, tiny_pipeline.tokenizer(), train=False, dropout=0.1, keywords=keywords or None)


def test_a_clip_with_projection_tells_the_same_in_training_and_in_both_pipelines(tmp_path):
    whole = text().text_encoder
    whole.save_pretrained(tmp_path / "clip" / "text_encoder")
    tiny_pipeline.tokenizer().save_pretrained(tmp_path / "clip" / "tokenizer")
    config = TextConfig(pretrained=str(tmp_path / "clip"), max_length=tiny_pipeline.LENGTH)
    one = TextConditioner(*build_text_encoder(config, []), train=False, dropout=0.1, keywords=config.keywords)
    assert all(torch.equal(whole.text_model.state_dict()[name], t) for name, t in one.text_encoder.state_dict().items())
    embeds = one.embed(["a cat", ""])["prompt_embeds"]
    torch.testing.assert_close(embeds, whole(**one.tokenize(["a cat", ""])).last_hidden_state)
    tiny_pipeline.pipeline(text_encoder=one.text_encoder, tokenizer=one.tokenizer).save_pretrained(tmp_path / "model")
    for kind in (StableDiffusionPipeline, TextToImagePipeline):
        pipe = kind.from_pretrained(tmp_path / "model")
        found = pipe.encode_prompt(["a cat"], "cpu", 1, True, [""])
        torch.testing.assert_close(torch.cat(found), embeds)

    keywords = {"encoder_hidden_states": "prompt_embeds", "added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
    projected, _ = build_text_encoder(replace(config, keywords=keywords), [])
    assert torch.equal(projected.text_projection.weight, whole.text_projection.weight)


def test_a_frozen_language_model_may_be_held_in_bfloat16(tmp_path):
    t5 = tiny_pipeline.text_encoder("t5")
    t5.save_pretrained(tmp_path / "t5" / "text_encoder")
    tiny_pipeline.tokenizer().save_pretrained(tmp_path / "t5" / "tokenizer")
    config = TextConfig(pretrained=str(tmp_path / "t5"), max_length=tiny_pipeline.LENGTH, train=False)
    whole, half = (
        TextConditioner(*build_text_encoder(one, []), train=False, dropout=0.1)
        for one in (config, replace(config, dtype="bfloat16"))
    )
    assert {parameter.dtype for parameter in half.text_encoder.parameters()} == {torch.bfloat16}
    expected, found = (one.embed(["a cat", ""])["prompt_embeds"] for one in (whole, half))
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert whole.key(["a cat"]) != half.key(["a cat"]), "the cache tells them apart"
    made = tiny_pipeline.pipeline(text_encoder=half.text_encoder, tokenizer=half.tokenizer)
    made.save_pretrained(tmp_path / "model")
    for one in (made, TextToImagePipeline.from_pretrained(tmp_path / "model")):
        said = one.encode_prompt(["a cat"], "cpu", 1, True, [""])
        torch.testing.assert_close(torch.cat(said).float(), found, atol=0.05, rtol=0.05)
    for wrong in ({"train": True}, {"pretrained": None}):
        with pytest.raises(
            ConfigError, match=r"text\.dtype: got bfloat16; expected null, or a pretrained encoder with"
        ):
            checked(replace(config, dtype="bfloat16", **wrong), "text")


def test_dotted_keywords_gather_in_one_dictionary():
    assert nested({"a": 1, "b.c": 2, "b.d": 3}) == {"a": 1, "b": {"c": 2, "d": 3}}


def test_each_keyword_of_text_gets_the_output_it_names():
    one = text(**{"a": "prompt_embeds", "b.c": "pooled_prompt_embeds", "m": "attention_mask"})
    captions = ["a cat", ""]
    kwargs = one(**tell(one, Some(captions), 2)).kwargs
    tokens = one.tokenizer(captions, padding="max_length", max_length=12, return_tensors="pt")
    output = one.text_encoder(tokens.input_ids)
    torch.testing.assert_close(kwargs["a"], output.last_hidden_state)
    torch.testing.assert_close(kwargs["b.c"], output.text_embeds)
    assert kwargs["b.c"].shape == (2, 6)
    assert torch.equal(kwargs["m"], tokens.attention_mask)
    assert kwargs["m"].sum(1).tolist() == [6, 2]  # begin, a, c, a, t, end; begin, end


def test_dropped_text_is_the_empty_caption_in_every_output():
    one = text(**{"a": "prompt_embeds", "b": "pooled_prompt_embeds", "m": "attention_mask"})
    dropped = tell(one, Some(["a cat", "a cat"]), 2, [True, False])
    plain = tell(one, Some(["", "a cat"]), 2)
    assert all(torch.equal(dropped[name], plain[name]) for name in plain)


def test_an_output_that_the_encoder_lacks_is_named():
    t5 = TextConditioner(
        tiny_pipeline.text_encoder("t5"),
        tiny_pipeline.tokenizer(),
        train=False,
        dropout=0,
        keywords={"x": "pooled_prompt_embeds"},
    )
    with pytest.raises(ValueError, match="T5EncoderModel has no pooled_prompt_embeds"):
        tell(t5, Some(["a cat"]), 1)


@table(
    ("kind", "output", "frozen"),
    [
        (BertModel, "prompt_embeds", {"pooler.dense.weight", "pooler.dense.bias"}),
        (BertModel, "pooled_prompt_embeds", set()),
        (CLIPTextModelWithProjection, "prompt_embeds", {"text_projection.weight"}),
        (CLIPTextModelWithProjection, "pooled_prompt_embeds", set()),
    ],
)
def test_what_no_keyword_uses_of_a_trained_encoder_is_frozen_and_everything_else_gets_a_gradient(kind, output, frozen):
    encoder = kind(tiny_pipeline.text_encoder("bert" if kind is BertModel else "clip").config)
    for weight in encoder.parameters():
        torch.nn.init.zeros_(weight)  # a gradient that is zero is one
    one = TextConditioner(encoder, tiny_pipeline.tokenizer(), train=True, dropout=0, keywords={"x": output})
    assert {name for name, weight in encoder.named_parameters() if not weight.requires_grad} == frozen
    one(**one.tokenize(["a cat"])).kwargs["x"].sum().backward()
    assert {name for name, weight in encoder.named_parameters() if weight.grad is None} == frozen


def test_captions_on_disk_are_those_of_the_encoder_and_spare_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    captions = ["", "a cat", "a dog"]
    first = text()
    expected = first.encode_captions(["a dog", "", "a bird"])["prompt_embeds"]
    data = SimpleNamespace(encoded_captions=lambda key, encode: CachedCaptions(captions, key(captions), encode))
    first.remember(data)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = text()
    asked = []
    encode = again.encode_captions
    monkeypatch.setattr(again, "encode_captions", lambda captions: asked.extend(captions) or encode(captions))
    again.remember(data)
    embeds = tell(again, Some(["a dog", "a bird", "a bird"]), 3, [False, True, False])["prompt_embeds"]
    torch.testing.assert_close(embeds, expected)
    assert asked == ["a bird"]


def test_another_encoder_or_other_captions_have_another_key():
    one, other = text(), text()
    assert one.key(["a"]) == other.key(["a"])
    torch.nn.init.normal_(next(other.text_encoder.parameters()))
    keys = {one.key(["a"]), one.key(["b"]), other.key(["a"]), text(m="attention_mask").key(["a"])}
    assert len(keys) == 4


def test_labels_and_their_null():
    label = LabelConditioner(5, 0.5)
    told = tell(label, Some(class_labels=torch.tensor([0, 4, 2])), 3, [False, True, False])
    assert label(**told).kwargs["class_labels"].tolist() == [0, 5, 2]
    told = tell(label, Some(class_labels=torch.tensor([0, UNKNOWN_CLASS, 2])), 3)
    assert label(**told).kwargs["class_labels"].tolist() == [0, 5, 2], "of no known class is the null too"
    with pytest.raises(ValueError, match=r"num_classes: 5, but the data has a class -2"):
        tell(label, Some(class_labels=torch.tensor([0, -2])), 2)
    with pytest.raises(ValueError, match=r"num_classes: 5, but the data has a class 5"):
        tell(label, Some(class_labels=torch.tensor([0, 5])), 2)
    with pytest.raises(ValueError, match=r"data\.class_column"):
        tell(label, Some(), 2)


def test_image_embeddings_are_those_of_the_models_own_processor():
    encoder = image_encoder()
    raw = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    ready = processor([Image.fromarray(one.numpy()) for one in raw], return_tensors="pt").pixel_values
    expected = encoder.network(ready).image_embeds
    pixel_values = raw.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(encoder(pixel_values), expected, rtol=1e-4, atol=1e-5)


@table("null", ["zeros", "zero_picture"])
def test_the_null_of_image_embeddings(null):
    encoder = image_encoder()
    conditioner = ImageConditioner(encoder, null, 0.5)
    told = tell(conditioner, Some(pixel_values=images(2)), 2, [True, False])["image_embeds"]
    zero = encoder.network(torch.zeros(1, 3, 8, 8)).image_embeds[0]  # as KandinskyV22PriorPipeline.get_zero_embed
    torch.testing.assert_close(told[0], torch.zeros(12) if null == "zeros" else zero)
    torch.testing.assert_close(told[1], encoder(images(2))[1])


def test_images_on_disk_are_those_of_the_encoder_and_spare_it_and_the_pixels(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    data = CaptionedImages(Shades(), DataConfig(image_size=8, flip=True))
    views = [(7, False), (7, True), (2, True)]
    some = torch.stack([data.pixel_values(*view) for view in views])
    conditioner = ImageConditioner(image_encoder(), "zero_picture", 0.5)
    expected = tell(conditioner, Some(pixel_values=some), 3, [False, False, True])["image_embeds"]
    for forward in (ImageEncoder.forward, None):  # the second time nothing is computed
        monkeypatch.setattr(ImageEncoder, "forward", forward)
        conditioner = ImageConditioner(image_encoder(), "zero_picture", 0.5)
        assert conditioner.reads_pixels
        conditioner.remember(data)
        assert not conditioner.reads_pixels
        told = tell(conditioner, Some(views=views), 3, [False, False, True])["image_embeds"]
        torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(told[0], told[1]), "a mirror image is another image"


def test_another_image_encoder_has_another_key():
    one, other = image_encoder(), image_encoder()
    assert one.key == other.key
    torch.nn.init.normal_(next(other.network.parameters()))
    activation = image_encoder()
    activation.network.config.hidden_act = "gelu"
    assert len({one.key, other.key, activation.key}) == 3


def test_the_small_image_is_eight_bits_and_enlarged_keeps_a_plain_colour():
    plain = torch.full((1, 3, 16, 16), 0.5)
    small = shrunk(plain, 4)
    assert small.shape == (1, 3, 4, 4)
    levels = (small + 1) * 127.5
    torch.testing.assert_close(levels, levels.round())
    torch.testing.assert_close(enlarged(small, 16), small[:, :, :1, :1].expand(1, 3, 16, 16))
    assert shrunk(images(8), 4).abs().max() <= 1


def test_low_res_noise_is_that_of_the_cosine_path_at_the_level_it_tells():
    conditioner = LowResConditioner(4, 1000)
    count = 400
    same = torch.full((count, 3, 16, 16), 0.6)
    told = tell(conditioner, Some(pixel_values=same), count)
    clean = shrunk(same[:1], 1)
    alpha_bar = torch.cos((told["levels"].double() + 1) / 1000 / 1.008 * torch.pi / 2 + 0.008 / 1.008 * torch.pi / 2)
    alpha = (alpha_bar / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2))).view(-1, 1, 1, 1)
    middle = (told["levels"] > 20) & (told["levels"] < 950)  # the path is clipped at its end
    noise = ((told["images"] - alpha * clean) / (1 - alpha**2).sqrt())[middle]
    assert float(noise.mean()) == pytest.approx(0, abs=4 / noise.numel() ** 0.5)
    assert float(noise.std()) == pytest.approx(1, abs=4 / (2 * noise.numel()) ** 0.5)
    assert abs(float(told["levels"].float().mean()) - 499.5) < 4 * 289 / count**0.5
    assert conditioner(**told).kwargs["class_labels"] is told["levels"]


def test_without_noise_low_res_tells_no_level():
    conditioner = LowResConditioner(4, 0)
    told = tell(conditioner, Some(pixel_values=images(2)), 2)
    conditions = conditioner(**told)
    assert conditions.kwargs == {}
    assert conditioner.keywords == ()
    torch.testing.assert_close(conditions.channels[0], enlarged(shrunk(images(2), 4), 16))


def test_frames_given_are_the_first_of_their_clip_and_the_null_is_none():
    conditioner = FramesConditioner(2, 0.5)
    x0 = torch.randn(20, 3, 4, 2, 2)
    dropped = [False] * 10 + [True] * 10
    told = tell(conditioner, Some(), 20, dropped, x0)["frames"]
    mask, frames = told[:, :1], told[:, 1:]
    assert told.shape == (20, 4, 4, 2, 2)
    marks = mask[:, 0, :, 0, 0]
    assert set(marks[:10].sum(1).tolist()) == {0, 1, 2}
    assert (marks.diff(dim=1) <= 0).all(), "ones, then zeros"
    assert marks[10:].sum() == 0
    assert torch.equal(frames, x0 * mask)
    for wrong in (x0[:, :, 0], x0[:, :, :2]):
        with pytest.raises(ValueError, match="expected clips of more than the 2 frames that are given"):
            tell(conditioner, Some(), 20, x0=wrong)


def test_of_a_share_of_the_clips_the_first_and_the_last_frame_are_given():
    conditioner = FramesConditioner(2, 0.0, between=0.5)
    marks = tell(conditioner, Some(), 40, x0=torch.randn(40, 3, 4, 2, 2))["frames"][:, 0, :, 0, 0]
    between = marks[:, 3] == 1
    assert torch.equal(marks[between], torch.tensor([1.0, 0, 0, 1]).expand(int(between.sum()), 4))
    assert 10 < between.sum() < 30
    assert set(marks[~between].sum(1).tolist()) == {0, 1, 2}
    alone = tell(FramesConditioner(0, 0.0, between=1.0), Some(), 8, x0=torch.randn(8, 3, 3, 2, 2))["frames"]
    assert torch.equal(alone[:, 0, :, 0, 0], torch.tensor([1.0, 0, 1]).expand(8, 3))
    for wrong in ({"max_context": 0}, {"max_context": 1, "between": 1.5}):
        with pytest.raises(ValueError, match=r"conditioners\.frames"):
            FramesConditioner(dropout=0.0, **wrong)


@table("kind", ["low_res", "frames"])
def test_what_is_told_of_a_sample_does_not_depend_on_its_batch(kind):
    conditioner = LowResConditioner(4, 1000) if kind == "low_res" else FramesConditioner(1, 0.5)
    x0 = images(40) if kind == "low_res" else torch.randn(40, 4, 3, 2, 2)
    whole = tell(conditioner, Some(pixel_values=x0), 40, x0=x0)
    for first in range(0, 40, 2):
        some = x0[first : first + 2]
        part = tell(conditioner, Some(pixel_values=some), 2, x0=some, positions=[first, first + 1])
        assert all(torch.equal(whole[name][first : first + 2], part[name]) for name in part)


@table("made", [lambda d: LabelConditioner(3, d), lambda d: FramesConditioner(1, d)])
def test_a_share_that_leaves_nothing_is_refused(made):
    with pytest.raises(ValueError, match=r"conditioners\.\w+\.dropout: got 1; expected"):
        made(1)


def test_conditioners_that_set_the_same_keyword_are_refused_when_the_stage_is_built():
    both = {"label": LabelConditioner(3, 0.1), "low_res": LowResConditioner(4, 1000)}
    with pytest.raises(ValueError, match="'class_labels'"):
        ConditionedDenoiser(torch.nn.Identity(), both)


def test_embedding_space_has_unit_scale_and_decodes_to_the_encoders_embeddings():
    encoder = image_encoder()
    space = EmbeddingSpace(encoder, images(200))
    x0 = space.moments(images(200)).mean
    torch.testing.assert_close(x0.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(x0.std(0), torch.ones(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(space.decode(x0), encoder(images(200)), atol=1e-5, rtol=1e-4)
    assert space.key != EmbeddingSpace(encoder, images(50)).key
    with pytest.raises(ValueError, match="equal for all images"):
        EmbeddingSpace(encoder, torch.zeros(3, 3, 16, 16))
