"""Every field that names a network takes a pipeline too, in a folder and on the Hub, and finds its component in it."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, PriorTransformer, UNet2DModel, VQModel
from huggingface_hub import HfApi
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.config import SpaceConfig
from ldm.models.clip import load_image_encoder
from ldm.models.component import find_component
from ldm.models.network import AUTOENCODERS, DENOISERS, build_network
from ldm.models.text_encoder import load_text_encoder, load_tokenizer, tokenizer_hash
from ldm.spaces import build_space

from .fake_hub import FakeHub
from .table import table
from .tiny_pipeline import pipeline

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Stable Diffusion folder that also has an image encoder, as pipelines of image variations do."""
    folder = tmp_path_factory.mktemp("component") / "model"
    pipeline().save_pretrained(folder)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **SMALL)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def without_index(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "copy", ignore=shutil.ignore_patterns("model_index.json"))
    return str(tmp_path / "copy")


def in_a_folder(model, tmp_path, monkeypatch):
    return str(model)


def on_the_hub(model, tmp_path, monkeypatch):
    HfApi().create_repo("me/model", exist_ok=True)
    HfApi().upload_folder(folder_path=model, repo_id="me/model")
    return "me/model@v1.2"


@table("place", [in_a_folder, without_index, on_the_hub])
def test_the_components_of_a_pipeline_are_found_by_its_name(place, model, tmp_path, monkeypatch):
    with FakeHub() as hub:
        hub.serve(monkeypatch, tmp_path)
        name = place(model, tmp_path, monkeypatch)
        expected = pipeline()
        encoder, tokenizer = load_text_encoder(name, 12)
        found = {
            "unet": build_network({"pretrained": name}, "denoiser", DENOISERS),
            "vae": build_network({"pretrained": name}, "autoencoder", ("AutoencoderKL",)),
            "text_encoder": encoder,
        }
        for part, network in found.items():
            weights = getattr(expected, part).state_dict()
            assert all(torch.equal(weights[key], tensor) for key, tensor in network.state_dict().items()), part
        assert type(build_space(SpaceConfig(autoencoder=name)).autoencoder) is AutoencoderKL
        assert type(load_image_encoder(name, "image").network) is CLIPVisionModelWithProjection
        expected.tokenizer.model_max_length = 12
        assert tokenizer_hash(tokenizer) == tokenizer_hash(expected.tokenizer)
        assert load_tokenizer(name)("a cat").input_ids == tokenizer("a cat").input_ids
        asked = [request for request in hub.requests if "/resolve/" in request]
        commits = {"v1.2", *(repository.sha for repository in hub.repositories.values())}
        assert all(request.split("/resolve/")[1].split("/")[0] in commits for request in asked)


def test_a_network_in_a_folder_of_its_own_is_found_as_before(model):
    for part in ("vae", "unet", "text_encoder", "image_encoder"):
        assert find_component(str(model / part), (part,)) == (str(model / part), {})
    assert find_component("no/such", ("vae",)) == ("no/such", {})


def test_other_names_of_networks_are_known_and_a_pipeline_without_one_is_named(tmp_path):
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DModel(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **sizes)
    pixels = tmp_path / "pixels"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(pixels)
    assert type(build_network({"pretrained": str(pixels)}, "denoiser", DENOISERS)) is UNet2DModel
    with pytest.raises(ValueError, match=r"space\.autoencoder: .* is a pipeline of scheduler, unet; expected one with"):
        build_network({"pretrained": str(pixels)}, "space.autoencoder", AUTOENCODERS)

    decoder = tmp_path / "decoder"
    VQModel(block_out_channels=(8,), norm_num_groups=4).save_pretrained(decoder / "movq")
    PriorTransformer(num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=8).save_pretrained(
        decoder / "prior"
    )
    assert type(build_network({"pretrained": str(decoder)}, "space.autoencoder", AUTOENCODERS)) is VQModel
    assert type(build_network({"pretrained": str(decoder)}, "denoiser", DENOISERS)) is PriorTransformer
    with pytest.raises(ValueError, match="exactly one of vae, movq"):
        build_network({"pretrained": str(decoder)}, "a network")
    chosen = build_network({"pretrained": str(decoder), "subfolder": "prior"}, "denoiser", DENOISERS)
    assert type(chosen) is PriorTransformer
