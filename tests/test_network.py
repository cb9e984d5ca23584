import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from ldm.config import SpaceConfig
from ldm.config.conditioners import TextConfig
from ldm.config.places import resolve
from ldm.models import network
from ldm.models.autoencoder import decode, fold_statistics, posterior_moments
from ldm.models.network import (
    build_network,
    freeze_unused,
    network_hash,
    set_attention_and_memory,
    unreached,
    weights_hash,
    without_float16,
    zero_tails,
)
from ldm.models.text_encoder import build_text_encoder
from ldm.spaces import LatentSpace, build_space

from .table import table
from .tiny_stages import stages

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 4,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
CAPTIONS = ["men with bunny ears", "woman astronaut medium-dark skin tone", "keycap 3"]


def test_a_misspelt_key_is_named_with_the_right_one():
    with pytest.raises(ValueError, match=r"denoiser\.layer_per_block: no such field.*'layers_per_block'"):
        build_network(UNET | {"layer_per_block": 2}, "denoiser")


def test_a_class_outside_the_list_is_refused():
    with pytest.raises(ValueError, match="choose from"):
        build_network({"_class_name": "os.system"}, "denoiser")


def test_zero_tails_make_the_denoiser_the_zero_function():
    torch.manual_seed(0)
    denoiser = build_network(UNET, "denoiser")
    call = {"timestep": torch.tensor([3, 700]), "encoder_hidden_states": torch.randn(2, 5, 16), "return_dict": False}
    x = torch.randn(2, 4, 8, 8)
    assert denoiser(x, **call)[0].abs().max() > 0.1
    zero_tails(denoiser)
    assert denoiser(x, **call)[0].abs().max() == 0


def test_zeroed_residual_branches_leave_the_input_unchanged():
    denoiser = build_network(UNET, "denoiser")
    zero_tails(denoiser)
    block = denoiser.down_blocks[0]
    hidden = torch.randn(2, 16, 8, 8)
    out = block.resnets[0](hidden, torch.randn(2, 64))
    assert torch.equal(out, hidden)
    assert torch.equal(block.attentions[0](hidden, torch.randn(2, 5, 16), return_dict=False)[0], hidden)
    inside = block.attentions[0].transformer_blocks[0]
    assert inside.attn2.to_out[0].weight.abs().max() > 0, "one zero a branch: behind two of them nothing would learn"


@table("name", ["dit", "pixart", "unclip prior"])
def test_zeroed_transformer_blocks_leave_the_input_unchanged(name, tmp_path):
    denoiser = build_network(stages(tmp_path)[name]["denoiser"], "denoiser")
    zero_tails(denoiser)
    hidden = torch.randn(2, 4, 16)
    call = {"dit": {"timestep": torch.tensor([1, 2]), "class_labels": torch.tensor([0, 1])}}.get(name, {})
    if name == "pixart":
        call = {"timestep": torch.randn(2, 96), "encoder_hidden_states": torch.randn(2, 3, 16)}
    assert torch.equal(denoiser.transformer_blocks[0](hidden, **call), hidden)


def test_latents_of_a_vq_model_are_scaled_and_not_quantised():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vq = VQModel(**blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, num_vq_embeddings=8)
    images = torch.randn(2, 3, 16, 16)
    latents = vq.encode(images).latents
    mean, std = posterior_moments(vq, images)
    torch.testing.assert_close(mean, latents * vq.config.scaling_factor)
    assert std.abs().max() == 0
    torch.testing.assert_close(decode(vq, mean), vq.decode(latents, force_not_quantize=True).sample)
    assert not torch.allclose(decode(vq, mean), vq.decode(latents).sample)


def test_gradient_checkpointing_recomputes_and_changes_no_gradient():
    torch.manual_seed(0)
    denoiser = build_network(UNET, "denoiser").train()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    calls = []
    denoiser.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))

    def gradients():
        calls.clear()
        denoiser.zero_grad()
        denoiser(x, timestep=torch.tensor([3, 700]), encoder_hidden_states=text).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    set_attention_and_memory(denoiser, gradient_checkpointing=True, xformers=False)
    again = gradients()
    assert len(calls) == 2  # forward, and once more in the backward pass
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_a_network_without_gradient_checkpointing_says_so():
    with pytest.raises(ValueError, match="Linear has none"):
        set_attention_and_memory(torch.nn.Linear(1, 1), gradient_checkpointing=True, xformers=False)


def test_xformers_without_the_package_or_a_gpu_says_what_to_do(monkeypatch):
    denoiser = build_network(UNET, "denoiser")
    find = network.importlib.util.find_spec
    with pytest.raises(ImportError, match="pip install xformers"):
        set_attention_and_memory(denoiser, gradient_checkpointing=False, xformers=True)
    monkeypatch.setattr(network.importlib.util, "find_spec", lambda name: name if name == "xformers" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA GPU"):
        set_attention_and_memory(denoiser, gradient_checkpointing=False, xformers=True)


def test_the_hash_names_the_weights():
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 3)
    two = torch.nn.Linear(3, 3)
    assert weights_hash(one) != weights_hash(two)
    two.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(two)
    assert network_hash(one) == network_hash(two)
    encoders = [CLIPVisionModel(CLIPVisionConfig(**VISION, hidden_act=act)) for act in ("gelu", "gelu", "quick_gelu")]
    for encoder in encoders[1:]:
        encoder.load_state_dict(encoders[0].state_dict())
    encoders[0].config._name_or_path = "elsewhere"
    assert network_hash(encoders[0]) == network_hash(encoders[1]) != network_hash(encoders[2])
    autoencoders = [AutoencoderKL(norm_num_groups=groups) for groups in (32, 32, 16)]
    for autoencoder in autoencoders[1:]:
        autoencoder.load_state_dict(autoencoders[0].state_dict())
    assert network_hash(autoencoders[0]) == network_hash(autoencoders[1]) != network_hash(autoencoders[2])
    scalar = nn.ParameterDict({"logvar": nn.Parameter(torch.zeros(()))})
    assert weights_hash(scalar) != weights_hash(nn.ParameterDict({"logvar": nn.Parameter(torch.ones(()))}))


BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False}


@table("keys", [{}, BARE, {"use_post_quant_conv": False, "shift_factor": 0.5}])
def test_folded_latents_have_unit_scale_and_reconstruct_the_same(keys):
    torch.manual_seed(0)
    vae = AutoencoderKL(**BLOCKS, **keys)
    vae.encoder.conv_out.bias.data += 3
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        mean, std = posterior.mean, posterior.std
        before = vae.decode(mean).sample
        spread = (mean.double().var((0, 2, 3)) + std.double().square().mean((0, 2, 3))).sqrt()
        fold_statistics(vae, mean.double().mean((0, 2, 3)), spread)
        new_mean, new_std = posterior_moments(vae, images)
        total = new_mean.double().var((0, 2, 3)) + new_std.double().square().mean((0, 2, 3))
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, None)
        assert torch.allclose(new_mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(total, torch.ones(4).double(), atol=1e-4)
        assert torch.allclose(new_std, (std / spread.float()[:, None, None]), rtol=1e-4)
        assert torch.allclose(decode(vae, new_mean), before, atol=4e-6)


def channelwise(*values):
    return torch.tensor(values).view(1, 4, 1, 1)


SHIFTED = {  # an autoencoder's config, and the mean and the divisor that pipelines of its kind take for it
    "sd3": ({**BARE, "shift_factor": 0.0609, "scaling_factor": 1.5305}, 0.0609, 1 / 1.5305),
    "shift": ({"shift_factor": 1.5}, 1.5, 1 / 0.18215),
    "sdxl": (
        {"latents_mean": [-1.6, 2.0, 0.1, 0.0], "latents_std": [8.4, 4.2, 3.5, 9.0], "scaling_factor": 0.5},
        channelwise(-1.6, 2.0, 0.1, 0.0),
        channelwise(8.4, 4.2, 3.5, 9.0) / 0.5,
    ),
    "neither": ({"scaling_factor": 0.5}, 0.0, 2.0),
}


@table("kind", SHIFTED)
def test_a_mean_that_a_config_names_is_folded_and_stock_pipelines_decode_the_same(kind, tmp_path):
    keys, mean, divisor = SHIFTED[kind]
    torch.manual_seed(0)
    vae = AutoencoderKL(**BLOCKS, **keys)
    vae.save_pretrained(tmp_path / "given")
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = torch.randn(4, 4, 8, 8)
        expected = vae.decode(latents * divisor + mean).sample
        draws = torch.random.get_rng_state()
        space = build_space(SpaceConfig(autoencoder=str(tmp_path / "given")))
        moments = space.moments(images)
        torch.testing.assert_close(moments.mean, (posterior.mean - mean) / divisor, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moments.std, posterior.std / divisor, atol=0, rtol=1e-5)
        torch.testing.assert_close(space.decode(latents), expected, atol=1e-5, rtol=1e-4)
        LatentSpace(vae)
        assert torch.equal(torch.random.get_rng_state(), draws)
        space.autoencoder.save_pretrained(tmp_path / "saved")
        saved = AutoencoderKL.from_pretrained(tmp_path / "saved")
        stock = saved.decode(latents / saved.config.scaling_factor).sample  # as StableDiffusionPipeline does
        torch.testing.assert_close(stock, expected, atol=1e-5, rtol=1e-4)
    named = {key: saved.config[key] for key in ("shift_factor", "latents_mean", "latents_std")}
    assert set(named.values()) == {None}
    assert saved.config.scaling_factor == (0.5 if kind == "neither" else 1.0)


def test_a_mean_that_no_pipeline_reads_so_is_refused():
    whole = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    for keys in ({"latents_mean": [1.0] * 4}, {"latents_std": [1.0] * 4}, {"shift_factor": 1.0, **whole}):
        with pytest.raises(ValueError, match="expected shift_factor alone, or latents_mean and latents_std together"):
            LatentSpace(AutoencoderKL(**BLOCKS, **keys))


def test_dead_latents_are_named():
    vae = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=2)
    with pytest.raises(ValueError, match="channel 1"):
        fold_statistics(vae, torch.zeros(2), torch.tensor([1.0, 0.0]))


def test_a_text_encoder_from_scratch_fits_its_tokenizer():
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_encoder, tokenizer = build_text_encoder(TextConfig(encoder=encoder, vocab_size=600, max_length=12), CAPTIONS)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert text_encoder(ids)[0].shape == (3, 12, 16)
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="hiden_size"):
        build_text_encoder(TextConfig(encoder={"hiden_size": 16}), CAPTIONS)


def test_a_folder_in_a_package_is_found_and_what_is_missing_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "my_weights" / "model").mkdir(parents=True)
    (tmp_path / "my_weights" / "__init__.py").write_text("raise RuntimeError('weights need no code')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:my_weights/model") == str(tmp_path / "my_weights" / "model")
    assert resolve("some/folder") == "some/folder"
    with pytest.raises(FileNotFoundError, match="package my_weights has no folder 'weights'"):
        resolve("package:my_weights/weights")
    for name in ("no_such_weights", "no.such", "..", ""):
        with pytest.raises(ImportError, match="is installed; pip install"):
            resolve(f"package:{name}/model")


def test_what_an_example_does_not_call_is_not_frozen():
    """An expert that this example does not reach may be reached by another; what works for nothing is frozen."""
    parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("reached", "expert", "idle")})
    x = torch.ones(1, 2)
    outputs = [lambda: [parts["reached"](x)], lambda: [parts["reached"](x), parts["idle"](x)][:1]]
    assert [freeze_unused(parts, forward) for forward in outputs] == [[], ["idle.weight", "idle.bias"]]
    assert [name for name, weight in parts.named_parameters() if not weight.requires_grad] == [
        "idle.weight",
        "idle.bias",
    ]
    assert unreached(parts, [parts["reached"](x)]) == ["expert.weight", "expert.bias"]


def test_weights_of_float16_are_computed_with_in_float32_and_others_as_they_are():
    for saved, computed in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        assert without_float16(torch.nn.Linear(2, 2).to(saved)).weight.dtype == computed
