"""Networks that measure: against transformers' own outputs, Pillow's resize, and what must not change a number."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ldm.models import vision
from ldm.models.network import weights_sha256
from ldm.models.text_encoder import train_tokenizer
from ldm.models.vision import ClipScore, build_feature_network, resized

from .table import table

WORDS = ("a red cat", "a blue dog", "two green birds", "cat")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def normalised(images, mean, std):
    return torch.from_numpy((images / 255 - np.array(mean)) / np.array(std)).permute(0, 3, 1, 2).float()


def random_images(count=5, height=40, width=40):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models: a whole CLIP, its vision model with and without projection, a DINOv2."""
    torch.manual_seed(3)  # of four cosines two are negative
    folder = tmp_path_factory.mktemp("networks")
    tokenizer = train_tokenizer(WORDS, 520, 12)
    vision_config = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8, projection_dim=12)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(CLIPConfig(vision_config=vision_config.to_dict(), text_config=SIZES | text, projection_dim=12))
    with torch.no_grad():  # random CLIPs see nearly the same in all images
        for name, tensor in clip.named_parameters():
            if name != "logit_scale" and "norm" not in name:
                tensor.normal_(0, 0.5)
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    projected = CLIPVisionModelWithProjection(vision_config)
    projected.vision_model.load_state_dict(clip.vision_model.state_dict())
    projected.visual_projection.load_state_dict(clip.visual_projection.state_dict())
    projected.save_pretrained(folder / "projected")
    clip.vision_model.save_pretrained(folder / "pooled")
    dino = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**dino, image_size=28, patch_size=14)).save_pretrained(folder / "dino")
    CLIPTextModel(clip.config.text_config).save_pretrained(folder / "text")
    return folder


@table("shape", [(40, 40), (300, 300), (64, 96)])
def test_the_resize_is_pillows_with_floats(shape):
    images = random_images(2, *shape)
    found = resized(images, 32).permute(0, 2, 3, 1).numpy() * 255
    for image, ours in zip(images, found, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32), mode="F")
            expected = np.asarray(plane.resize((32, 32), Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(ours[..., channel], expected, atol=1e-2)  # of 255


def test_rows_of_the_networks_size_are_not_touched():
    np.testing.assert_array_equal(
        resized(random_images(), 40).permute(0, 2, 3, 1).numpy(), random_images().astype("f") / 255
    )


@table("name", ["clip", "projected"])
def test_clip_features_are_transformers_image_embeds(folders, name):
    model = CLIPModel.from_pretrained(folders / "clip", use_safetensors=True)
    images = random_images(3, 32, 32)
    pixel_values = normalised(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values).pooler_output
    network = build_feature_network(str(folders / name))
    np.testing.assert_allclose(network(images), expected, atol=1e-5)
    assert network.resize == "bicubic, antialiased, to 32 x 32 px"


def test_a_vision_model_without_projection_gives_its_pooled_output(folders):
    network, whole = (build_feature_network(str(folders / name)) for name in ("pooled", "clip"))
    projection = CLIPModel.from_pretrained(folders / "clip", use_safetensors=True).visual_projection.weight
    features = network(random_images())
    assert features.shape == (5, 16)
    np.testing.assert_allclose(features @ projection.detach().numpy().T, whole(random_images()), atol=1e-4)


def test_dinov2_is_measured_at_224_pixels_with_the_statistics_of_imagenet(folders):
    network = build_feature_network(str(folders / "dino"))
    assert network.resize.endswith("224 x 224 px")
    assert network(random_images()).shape == (5, 16)
    images = random_images(2, 224, 224)
    model = Dinov2Model.from_pretrained(folders / "dino", use_safetensors=True)
    with torch.no_grad():
        expected = model(normalised(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)).pooler_output
    np.testing.assert_allclose(network(images), expected, atol=1e-4)


def test_one_tower_has_one_hash_in_every_folder_and_precision(folders, tmp_path):
    hashes = {build_feature_network(str(folders / name)).sha256 for name in ("clip", "projected", "pooled")}
    assert len(hashes) == 1
    linear = torch.nn.Linear(3, 2).half()
    assert weights_sha256(linear) == weights_sha256(linear.float())
    with torch.no_grad():
        linear.weight[0, 0] += 1
    assert weights_sha256(linear) != weights_sha256(torch.nn.Linear(3, 2))
    assert build_feature_network(str(folders / "dino")).sha256 not in hashes


@table("name", ["clip", "efficientnet_lite0"])
def test_an_image_has_the_same_features_whatever_the_chunk(folders, name, monkeypatch):
    network = build_feature_network(str(folders / name) if name == "clip" else name)
    images = random_images(7)
    expected = network(images)
    assert expected.dtype == np.float32
    for chunk in (1, 3):
        monkeypatch.setattr(vision, "CHUNK", chunk)
        np.testing.assert_allclose(network(images), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(network(images[4:5])[0], expected[4], rtol=1e-4, atol=1e-5)


def test_efficientnet_gives_what_its_classifier_sees():
    """Its own whole pass is the classifier on our features: ImageNet's classes of the image."""
    network = build_feature_network("efficientnet_lite0")
    whole = vision.efficientnet("efficientnet_lite0").eval()
    images = random_images(2, vision.EFFICIENTNET_SIZE, vision.EFFICIENTNET_SIZE)
    features = torch.from_numpy(network(images))
    assert features.shape == (2, 1280)
    with torch.no_grad():
        expected = whole(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        np.testing.assert_allclose(whole._fc(features), expected, atol=1e-4)
    assert network.sha256.startswith("57934424")


@table("chunk", [2, 64])
def test_image_text_similarity_is_transformers_logit(folders, chunk, monkeypatch):
    monkeypatch.setattr(vision, "CHUNK", chunk)
    score = ClipScore(str(folders / "clip"))
    images = random_images(4, 32, 32)
    model = CLIPModel.from_pretrained(folders / "clip", use_safetensors=True)
    read = score.tokenizer(list(WORDS), padding=True, return_tensors="pt")
    with torch.no_grad():
        pixel_values = normalised(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        logits = model(pixel_values=pixel_values, **read).logits_per_image
        cosines = (logits.diagonal() / model.logit_scale.exp()).numpy()
    assert (cosines < 0).any()  # else the test says nothing of them
    assert (cosines > 0).any()
    found = score.image_text_similarity(images, WORDS)
    np.testing.assert_allclose(found, 100 * cosines.clip(0), atol=1e-3)


def test_a_caption_longer_than_clip_reads_is_cut(folders):
    score = ClipScore(str(folders / "clip"))
    assert np.isfinite(score.image_text_similarity(random_images(1), ["a red cat " * 40])).all()
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        score.image_text_similarity(random_images(1), ["a", "b"])


def test_what_is_no_network_that_measures_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="clip_text_model, which is not known to measure; expected clip, clip_vision"):
        build_feature_network(str(folders / "text"))
    with pytest.raises(ValueError, match="is a clip_vision_model"):
        ClipScore(str(folders / "projected"))
    with pytest.raises(ValueError, match=r"expected at least one image, uint8"):
        build_feature_network(str(folders / "clip"))(random_images() / 255)
    for source in ("pooled", "clip"):
        (tmp_path / source).mkdir()
        for file in (folders / source).iterdir():
            (tmp_path / source / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "pooled" / "config.json").read_text())
    config["architectures"] = ["CLIPVisionModelWithProjection"]
    (tmp_path / "pooled" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks visual_projection\.weight of CLIPVision.* random weights"):
        build_feature_network(str(tmp_path / "pooled"))
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        build_feature_network(str(tmp_path / "clip"))


def test_a_network_with_code_of_its_own_is_refused(tmp_path):
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="comes with code of its own, which is never run"):
        build_feature_network(str(tmp_path))


def test_inception_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        build_feature_network("inception")


def test_a_name_tells_nothing_of_this_machine(folders):
    assert build_feature_network(str(folders / "clip")).name == "clip"
