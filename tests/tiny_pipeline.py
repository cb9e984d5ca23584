"""The parts of a text-to-image pipeline with random weights, small enough to run in milliseconds."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from pipelines.text2img import TextToImagePipeline

LENGTH = 12  # tokens
WIDTH = 16  # of the prompt embeddings
PIXELS = 16  # height and width: 8 latents of 2 pixels
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}


def tokenizer() -> CLIPTokenizer:
    """Bytes only, laid out as CLIP's vocabulary: the end token has the last id."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def text_encoder(kind: str = "clip") -> PreTrainedModel:
    torch.manual_seed(1)
    if kind == "bert":
        sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = BertConfig(vocab_size=514, max_position_embeddings=LENGTH, use_attention_mask=True, **sizes)
        return BertModel(config, add_pooling_layer=False).eval()
    if kind == "t5":
        config = T5Config(vocab_size=514, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        config.use_attention_mask = True
        return T5EncoderModel(config).eval()
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return CLIPTextModel(config).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(2)
    config = {
        "sample_size": PIXELS // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**config | changes).eval()


def transformer(**changes: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(4)
    config = {
        "sample_size": PIXELS // 2,
        "patch_size": 1,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": WIDTH,
    }
    return PixArtTransformer2DModel(**config | changes).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=PIXELS,
        scaling_factor=0.5,
    ).eval()


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear", **changes)


def parts(**changes: Any) -> dict[str, Any]:
    """Return the pipeline's components, as both pipeline classes take them."""
    defaults = {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": scheduler,
    }
    made = {name: changes[name] if name in changes else make() for name, make in defaults.items()}
    return {**made, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def pipeline(**changes: Any) -> TextToImagePipeline:
    pipe = TextToImagePipeline(**parts(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def arrays(pipe: Any, prompt: Any = "a cat", steps: int = 3, **changes: Any) -> Any:
    """Return what a short call with seed 0 makes."""
    call = {"generator": seeds(0)[0], "num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "np"}
    return pipe(prompt, **call | changes).images
