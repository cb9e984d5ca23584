"""A tiny stage for each system of the family, as the YAML that a user would write: stock networks and nothing else."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from . import tiny_pipeline
from .tiny_pipeline import LENGTH, WIDTH

PIXELS = 16
CLASSES = 5
UNET = {"sample_size": PIXELS, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
PLAIN = {"_class_name": "UNet2DModel", **UNET, "in_channels": 3, "out_channels": 3, "attention_head_dim": 8}
DDPM = {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
ADM = {
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
CROSS = {
    "_class_name": "UNet2DConditionModel",
    **UNET,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SIMPLE = CROSS | {
    "attention_head_dim": 8,
    "cross_attention_dim": 32,  # normalised in 32 groups
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_norm": "group_norm",
}
IMAGEN = SIMPLE | {
    "in_channels": 3,
    "out_channels": 6,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
LATENT = {"in_channels": 4, "out_channels": 4, "sample_size": PIXELS // 2}
COSINE = {"path": "cosine"}
LEARNED = {"path": "cosine", "variational_weight": 1.0}
FLOW = {"path": "flow", "prediction_type": "flow_prediction"}
PIXEL = {"kind": "pixel"}

CLIP_SCRATCH = {
    "encoder": {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vocab_size": 600,
    "max_length": LENGTH,
}


def frozen_text(folder: str, **keywords: str) -> dict[str, Any]:
    return {"pretrained": folder, "max_length": LENGTH, "train": False, "dropout": 0.5, "keywords": keywords}


def stages(parts: Path) -> dict[str, dict[str, Any]]:
    """Return each system's stage as a config, after the table of systems; `parts` as `save_parts` left it."""
    t5 = frozen_text(f"{parts}/t5", encoder_hidden_states="prompt_embeds")
    clip = f"{parts}/clip"
    kl, movq = ({"kind": "latent", "autoencoder": f"{parts}/{name}"} for name in ("kl", "movq"))
    image = {"pretrained": f"{parts}/vision", "dropout": 0.5}
    pooled = {"added_cond_kwargs.text_embeds": "pooled_prompt_embeds"}
    prior_text = {
        "encoder_hidden_states": "prompt_embeds",
        "proj_embedding": "pooled_prompt_embeds",
        "attention_mask": "attention_mask",
    }
    return {
        "ddpm": {"space": PIXEL, "denoiser": PLAIN | DDPM, "objective": {"path": "linear"}},
        "adm": {
            "space": PIXEL,
            "denoiser": PLAIN | ADM | {"out_channels": 6, "num_class_embeds": CLASSES + 1},
            "objective": LEARNED,
            "conditioners": {"label": {"num_classes": CLASSES, "dropout": 0.5}},
        },
        "stable diffusion": {
            "space": kl,
            "denoiser": CROSS | LATENT,
            "objective": {"path": "scaled_linear", "prediction_type": "v_prediction"},
            "conditioners": {"text": CLIP_SCRATCH},
        },
        "unclip prior": {
            "space": {"kind": "embedding", "image_encoder": f"{parts}/vision"},
            "denoiser": {
                "_class_name": "PriorTransformer",
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "embedding_dim": WIDTH,
                "num_embeddings": LENGTH,
                "additional_embeddings": 4,
                "added_emb_type": "prd",
            },
            "objective": {"path": "cosine", "prediction_type": "sample"},
            "conditioners": {"text": frozen_text(clip, **prior_text)},
        },
        "unclip decoder": {
            "space": PIXEL,
            "denoiser": CROSS
            | {
                "in_channels": 3,
                "out_channels": 6,
                "encoder_hid_dim": WIDTH,
                "encoder_hid_dim_type": "text_image_proj",
                "addition_embed_type": "text_image",
            },
            "objective": LEARNED,
            "conditioners": {
                "image": image,
                "text": frozen_text(clip, encoder_hidden_states="prompt_embeds", **pooled),
            },
        },
        "unclip upsampler": {
            "space": PIXEL,
            "denoiser": PLAIN
            | ADM
            | {
                "in_channels": 6,
                "add_attention": False,
                "down_block_types": ["ResnetDownsampleBlock2D"] * 2,
                "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
            },
            "objective": COSINE,
            "conditioners": {"low_res": {"image_size": PIXELS // 4}},
        },
        "imagen": {"space": PIXEL, "denoiser": IMAGEN, "objective": LEARNED, "conditioners": {"text": t5}},
        "imagen upsampler": {
            "space": PIXEL,
            "denoiser": IMAGEN | {"in_channels": 6, "class_embed_type": "timestep"},
            "objective": LEARNED,
            "conditioners": {"text": t5, "low_res": {"image_size": PIXELS // 4, "noise_timesteps": 1000}},
        },
        "kandinsky decoder": {
            "space": movq,
            "denoiser": SIMPLE
            | LATENT
            | {
                "out_channels": 8,
                "encoder_hid_dim": WIDTH,
                "encoder_hid_dim_type": "image_proj",
                "addition_embed_type": "image",
            },
            "objective": {"path": "linear", "variational_weight": 1.0},
            "conditioners": {"image": image | {"null": "zero_picture"}},
        },
        "videoldm": {
            "space": kl,
            "denoiser": CROSS | LATENT,
            "objective": {"path": "scaled_linear", "prediction_type": "v_prediction"},
            "conditioners": {"text": CLIP_SCRATCH, "frames": {"dropout": 0.5}},
            "temporal": {"head_dim": 8, "freeze_image_layers": False},
            "data": {"source": "openmoji_clips", "num_frames": 3, "image_size": PIXELS},
        },
        "dit": {
            "space": kl,
            "denoiser": {
                "_class_name": "DiTTransformer2DModel",
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "norm_num_groups": 4,
                **LATENT,
                "num_embeds_ada_norm": CLASSES,
            },
            "objective": FLOW,
            "conditioners": {"label": {"num_classes": CLASSES, "dropout": 0.5}},
        },
        "pixart": {
            "space": kl,
            "denoiser": {
                "_class_name": "PixArtTransformer2DModel",
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "cross_attention_dim": 16,
                "caption_channels": WIDTH,
                "use_additional_conditions": False,
                **LATENT,
            },
            "objective": FLOW,
            "conditioners": {"text": t5 | {"keywords": {**t5["keywords"], "encoder_attention_mask": "attention_mask"}}},
        },
    }


def save_parts(parts: Path) -> None:
    """Write the pretrained parts, with random weights, into `parts`."""
    torch.manual_seed(3)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": PIXELS}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, **kinds).save_pretrained(parts / "kl")
    quantised = {"latent_channels": 4, "vq_embed_dim": 4, "num_vq_embeddings": 32, "norm_type": "spatial"}
    wider = {"block_out_channels": (32, 32)}  # spatial normalisation has groups of 32
    VQModel(**blocks | wider, **kinds, **quantised).save_pretrained(parts / "movq")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=WIDTH)
    CLIPVisionModelWithProjection(vision).save_pretrained(parts / "vision")
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    text = CLIPTextConfig(**sizes, **ids, projection_dim=WIDTH, max_position_embeddings=LENGTH)
    CLIPTextModelWithProjection(text).save_pretrained(parts / "clip" / "text_encoder")
    tiny_pipeline.text_encoder("t5").save_pretrained(parts / "t5" / "text_encoder")
    for name in ("clip", "t5"):
        tiny_pipeline.tokenizer().save_pretrained(parts / name / "tokenizer")
