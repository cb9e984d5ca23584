"""Temporal layers: the image network as it was, before training and for single images; what training changes."""

import copy
import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldm.config import TemporalConfig, TemporalDecoderConfig
from ldm.errors import ConfigError
from ldm.models.autoencoder import last_weight
from ldm.models.network import (
    build_network,
    image_layers_hash,
    set_attention_and_memory,
    with_temporal_decoder,
    with_temporal_layers,
)
from ldm.models.temporal import (
    Clip,
    Context,
    Mixed,
    TemporalAttention,
    TemporalConvolution,
    VideoAutoencoder,
    VideoUNet,
    frame_positions,
)

from .table import table

SIZES = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
UNETS = {
    "attention everywhere": {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "downsampling by residual blocks": {
        "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "encoder_hid_dim": 12,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
    },
}


def image_network(kind="attention everywhere"):
    torch.manual_seed(0)
    return UNet2DConditionModel(**SIZES, cross_attention_dim=12, attention_head_dim=2, **UNETS[kind]).eval()


def called(network, x, timesteps=(3, 500)):
    torch.manual_seed(1)
    states = torch.randn(len(x), 5, 12)
    with torch.no_grad():
        return network(x, torch.tensor(timesteps), states).sample


def clips(num_frames=4):
    return torch.randn(2, 4, num_frames, 8, 8, generator=torch.Generator().manual_seed(2))


def trained(network):
    """Return a copy whose temporal layers do something."""
    network = copy.deepcopy(network)
    for parameter in network.temporal.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for layer in network.temporal.values():
        if isinstance(layer, Mixed):
            layer.logit.data.zero_()
    return network


@table("kind", list(UNETS))
def test_before_training_each_frame_is_what_the_image_network_makes_of_it(kind):
    images = image_network(kind)
    video = VideoUNet.over(images, temporal_head_dim=4).eval()
    x = clips()
    alone = torch.stack([called(images, x[:, :, frame]) for frame in range(4)], 2)
    torch.testing.assert_close(called(video, x), alone, atol=1e-5, rtol=0)


def test_before_training_a_changed_frame_changes_no_other_one_by_a_bit_and_after_it_does():
    video = VideoUNet.over(image_network()).eval()
    for network, others_move in ((video, False), (trained(video), True)):
        x = clips()
        before = called(network, x)
        x[:, :, 1] += 1
        after = called(network, x)
        assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]]) != others_move
        assert not torch.equal(before[:, :, 1], after[:, :, 1])


@table("kind", list(UNETS))
def test_single_images_pass_the_image_network_alone_after_training_too(kind):
    images = image_network(kind)
    video = trained(VideoUNet.over(images, temporal_head_dim=4)).eval()
    x = clips()[:, :, 0]
    assert torch.equal(called(video, x), called(images, x))
    torch.testing.assert_close(called(video, x[:, :, None])[:, :, 0], called(images, x), atol=1e-6, rtol=0)


def test_the_image_weights_keep_their_names_and_every_residual_block_and_attention_has_its_layer():
    images = image_network()
    video = VideoUNet.over(images)
    theirs, ours = images.state_dict(), video.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert all(name.startswith("temporal.") for name in ours.keys() - theirs.keys())
    kinds = {"resnets": TemporalConvolution, "attentions": TemporalAttention}
    assert {key: type(layer.branch) for key, layer in video.temporal.items()} == {
        name.replace(".", "-"): kinds[part]
        for name, _ in images.named_modules()
        for part in kinds
        if name.split(".")[-2:-1] == [part]
    }


def test_a_mixture_is_alpha_times_the_image_and_the_rest_of_the_temporal_layer():
    class Twice(torch.nn.Module):
        def forward(self, frames, clip):
            return 2 * frames  # so l(z) = 3 z

    mixed, z = Mixed(Twice()), torch.randn(4, 3, 2, 2)
    assert mixed.alpha.item() == pytest.approx(0.9)
    for alpha in (0.01, 0.25, 0.99):
        mixed.logit.data.fill_(math.log(alpha / (1 - alpha)))
        torch.testing.assert_close(mixed(z, Clip(4)), alpha * z + (1 - alpha) * 3 * z)


def test_a_convolution_over_time_is_a_dense_one_over_the_frames_of_each_place():
    torch.manual_seed(0)
    layer = TemporalConvolution(4, 2)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    frames = torch.randn(6, 4, 2, 2)  # two clips of three frames
    found = layer(frames, Clip(3)).view(2, 3, 4, 2, 2)
    for clip in range(2):
        x = frames.view(2, 3, 4, 2, 2)[clip].transpose(0, 1)[None]  # (1, C, F, h, w)
        x = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2, layer.norm1.weight, layer.norm1.bias))
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
        weight, bias = layer.conv1.weight[..., 0, 0], layer.conv1.bias
        x = sum(torch.einsum("oc,bcfhw->bofhw", weight[..., tap], padded[:, :, tap : tap + 3]) for tap in range(3))
        x = x + bias.view(1, -1, 1, 1, 1)
        x = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2, layer.norm2.weight, layer.norm2.bias))
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
        weight, bias = layer.conv2.weight[..., 0, 0], layer.conv2.bias
        x = sum(torch.einsum("oc,bcfhw->bofhw", weight[..., tap], padded[:, :, tap : tap + 3]) for tap in range(3))
        x = x + bias.view(1, -1, 1, 1, 1)
        torch.testing.assert_close(found[clip], x[0].transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_attention_over_time_sees_the_same_place_alone_and_the_order_of_the_frames():
    torch.manual_seed(0)
    layer = TemporalAttention(8, 2, 4, 12).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.norm = torch.nn.Identity()  # group normalisation sees all places of a frame
    clip = Clip(4, torch.randn(1, 5, 12))
    frames = torch.randn(4, 8, 2, 2)
    before = layer(frames, clip)
    changed = frames.clone()
    changed[1, :, 0, 0] += torch.randn(8)
    moved = (layer(changed, clip) - before).abs().amax(1) > 1e-6  # (F, h, w)
    assert moved[:, 0, 0].all()
    assert not moved[:, 0, 1].any()
    assert not moved[:, 1].any()
    assert not torch.allclose(layer(frames.flip(0), clip).flip(0), before, atol=1e-4), "positions tell the order"
    other = Clip(4, clip.states + 1)
    assert not torch.allclose(layer(frames, other), before, atol=1e-4), "the text is read"


def test_positions_are_sines_and_cosines_of_the_frame():
    rows = [[trig(frame * rate) for rate in (1, 0.01) for trig in (math.sin, math.cos)] for frame in range(3)]
    torch.testing.assert_close(frame_positions(3, 4), torch.tensor(rows))


def test_the_first_gradient_reaches_the_last_layer_of_every_branch_and_no_image_layer():
    video = with_temporal_layers(image_network(), TemporalConfig(head_dim=4))
    torch.manual_seed(1)
    video(clips(), torch.tensor([3, 500]), torch.randn(2, 5, 12)).sample.square().mean().backward()
    for key, layer in video.temporal.items():
        last = layer.branch.conv2 if isinstance(layer.branch, TemporalConvolution) else layer.branch.proj_out
        assert last.weight.grad.abs().sum() > 0, key
    assert {name.split(".")[0] for name, one in video.named_parameters() if one.requires_grad} == {"temporal"}
    assert all(one.grad is None for one in video.parameters() if not one.requires_grad)
    joint = with_temporal_layers(image_network(), TemporalConfig(head_dim=4, freeze_image_layers=False))
    assert all(one.requires_grad for one in joint.parameters())
    assert with_temporal_layers(joint, TemporalConfig(head_dim=4)) is joint
    assert {name.split(".")[0] for name, one in joint.named_parameters() if one.requires_grad} == {"temporal"}
    with pytest.raises(ConfigError, match=r"temporal\.head_dim: got 8; expected 4"):
        with_temporal_layers(video, TemporalConfig(head_dim=8))
    with pytest.raises(ConfigError, match="temporal: a Linear takes none; expected a UNet2DConditionModel"):
        with_temporal_layers(torch.nn.Linear(1, 1), TemporalConfig())


def test_a_network_without_a_transformer_is_refused():
    simple = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "mid_block_type": None}
    plain = UNet2DConditionModel(**SIZES, cross_attention_dim=12, attention_head_dim=2, **simple)
    with pytest.raises(ValueError, match="none of its blocks has a transformer"):
        VideoUNet.over(plain)


def test_the_hash_of_frozen_image_layers_is_theirs_alone():
    frozen = with_temporal_layers(image_network(), TemporalConfig(head_dim=4))
    before = image_layers_hash(frozen)
    assert image_layers_hash(trained(frozen)) == before
    frozen.conv_in.bias.data += 1
    assert image_layers_hash(frozen) != before
    assert image_layers_hash(with_temporal_layers(frozen, TemporalConfig(4)).requires_grad_(True)) is None
    assert image_layers_hash(image_network().requires_grad_(False)) is None


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        video = trained(VideoUNet.over(image_network(), temporal_head_dim=4)).train()
        set_attention_and_memory(video, gradient_checkpointing=checkpointing, xformers=False)
        torch.manual_seed(1)
        video(clips(), torch.tensor([3, 500]), torch.randn(2, 5, 12)).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in video.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_copy_is_its_own_network_and_a_saved_one_the_same(tmp_path):
    video = trained(VideoUNet.over(image_network(), temporal_head_dim=4)).eval()
    x = clips()
    before = called(video, x)
    copied = copy.deepcopy(video)
    for parameter in copied.temporal.parameters():
        parameter.data.zero_()
    assert torch.equal(called(video, x), before), "hooks of the copy call the copy's layers"
    assert not torch.equal(called(copied, x), before)
    video.save_pretrained(tmp_path)
    again = build_network({"pretrained": str(tmp_path)}, "denoiser").eval()
    assert torch.equal(called(again, x), before)


def test_a_context_is_more_channels_of_the_first_layer_and_changes_nothing_before_training():
    plain, images = VideoUNet.over(image_network()).eval(), image_network()
    told = VideoUNet.over(plain, context_channels=5).eval()
    x, context = clips(), torch.randn(2, 5, 4, 8, 8)
    known = torch.cat([x, context], 1)
    assert torch.equal(called(told, known), called(plain, x))
    after = trained(told)
    assert not torch.allclose(called(after, known), called(after, x), atol=1e-3)
    assert torch.equal(called(after, torch.cat([x, 0 * context], 1)), called(after, x)), "left out: nothing is known"
    assert torch.equal(called(after, x[:, :, 0]), called(images, x[:, :, 0])), "images know of no context"
    with pytest.raises(ValueError, match="got 6 channels; expected 4, or 9 with a context"):
        called(told, known[:, :6])


def test_a_context_is_a_convolution_over_places_and_frames_beside_the_first_layer():
    layer = Context(5, 8)
    torch.nn.init.normal_(layer.conv.weight)
    clip = Clip(3, context=torch.randn(2, 5, 3, 4, 4))
    frames = torch.randn(6, 8, 4, 4)
    wide = layer.conv(clip.context)
    expected = frames + torch.stack([wide[one, :, frame] for one in range(2) for frame in range(3)])
    torch.testing.assert_close(layer(frames, clip), expected)


def test_a_model_of_clips_goes_on_as_one_that_is_given_frames():
    video = with_temporal_layers(image_network(), TemporalConfig(head_dim=4))
    told = with_temporal_layers(video, TemporalConfig(head_dim=4), given_frames=True)
    assert (video.config.context_channels, told.config.context_channels) == (0, 5)
    assert {name for name in told.state_dict() if name not in video.state_dict()} == {
        "temporal.context.conv.weight",
        "temporal.context.conv.bias",
    }
    assert {name.split(".")[0] for name, one in told.named_parameters() if one.requires_grad} == {"temporal"}
    assert with_temporal_layers(told, TemporalConfig(head_dim=4), given_frames=True) is told


def image_autoencoder():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, **blocks).eval()


@torch.no_grad()
def test_an_untrained_temporal_decoder_decodes_each_frame_as_the_image_decoder_does():
    images, video = image_autoencoder(), VideoAutoencoder.over(image_autoencoder()).eval()
    z = clips()
    alone = torch.stack([images.decode(z[:, :, frame]).sample for frame in range(4)], 2)
    torch.testing.assert_close(video.decode(z).sample, alone, atol=1e-5, rtol=0)
    for network, others_move in ((video, False), (trained(video), True)):
        before, moved = network.decode(z).sample, z.clone()
        moved[:, :, 1] += 1
        after = network.decode(moved).sample
        assert torch.equal(before[:, :, [0, 2, 3]], after[:, :, [0, 2, 3]]) != others_move
        torch.testing.assert_close(network.decode(z[:, :, 0]).sample, alone[:, :, 0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_clip_is_encoded_frame_by_frame():
    images, video = image_autoencoder(), trained(VideoAutoencoder.over(image_autoencoder())).eval()
    x = torch.randn(2, 3, 4, 8, 8)
    found = video.encode(x).latent_dist
    for frame in range(4):
        alone = images.encode(x[:, :, frame]).latent_dist
        torch.testing.assert_close(found.mean[:, :, frame], alone.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.std[:, :, frame], alone.std, atol=1e-5, rtol=0)
    assert torch.equal(video.encode(x[:, :, 0]).latent_dist.mean, images.encode(x[:, :, 0]).latent_dist.mean)


@table(("freeze", "trained_parts"), [(True, {"temporal"}), (False, {"temporal", "decoder"})])
def test_the_encoder_of_a_temporal_decoder_is_frozen(freeze, trained_parts):
    found = with_temporal_decoder(image_autoencoder(), TemporalDecoderConfig(freeze_image_layers=freeze))
    assert {name.split(".")[0] for name, one in found.named_parameters() if one.requires_grad} == trained_parts
    before = image_layers_hash(found)
    with torch.no_grad():
        found.encoder.conv_in.weight.add_(1)
    assert image_layers_hash(found) != before, "the encoder is in the record, whatever is trained"
    assert with_temporal_decoder(found, TemporalDecoderConfig()) is found
    with pytest.raises(ConfigError, match="temporal: a UNet2DConditionModel takes none; expected an AutoencoderKL"):
        with_temporal_decoder(image_network(), TemporalDecoderConfig())


def test_the_last_layer_that_is_trained_is_that_before_the_pixels():
    """Its gradient weighs the adversarial loss; the decoder registers its mid block last, and runs it first."""
    video = with_temporal_decoder(image_autoencoder(), TemporalDecoderConfig())
    called_last = []
    for layer in video.temporal.values():
        layer.register_forward_hook(lambda layer, *_: called_last.append(layer))
    video.decode(clips())
    assert last_weight(video) is called_last[-1].branch.conv2.weight
    whole = with_temporal_decoder(video, TemporalDecoderConfig(freeze_image_layers=False))
    assert last_weight(whole) is whole.decoder.conv_out.weight
