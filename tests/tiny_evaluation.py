"""Everything that an evaluation needs, tiny: images, held-out captions, factors, three pipelines, a CLIP."""

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from ldm.config import ObjectiveConfig
from ldm.models.scheduler import build_scheduler
from ldm.models.text_encoder import train_tokenizer
from pipelines.pixels import PixelPipeline
from tests.image_folders import noise_image, write_metadata
from tests.tiny_pipeline import parts, pipeline

COLOURS = ("red", "green", "blue", "grey")
COUNT = 48
FLOW = ObjectiveConfig(path="flow", prediction_type="flow_prediction")
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_place(folder):
    """Write it all into `folder`, which is there."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    captions = [f"{COLOURS[index % 4]} thing {index // 4}" for index in range(COUNT)]
    for index in range(COUNT):
        noise_image(rng, 16).save(images / f"{index}.png")
    write_metadata(images, [{"file_name": f"{index}.png", "text": text} for index, text in enumerate(captions)])
    (folder / "heldout.txt").write_text("\n".join(captions[::3]))
    (folder / "validation.txt").write_text("\n".join(captions[1::6]))
    (folder / "factors.yaml").write_text(f"colour: [{', '.join(COLOURS)}]\n")
    pipeline(scheduler=build_scheduler(FLOW)).save_pretrained(folder / "model")
    StableDiffusionPipeline(**parts(scheduler=build_scheduler(FLOW))).save_pretrained(folder / "stock")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    denoiser = UNet2DModel(sample_size=16, norm_num_groups=8, **blocks)
    PixelPipeline(denoiser, DDPMScheduler()).save_pretrained(folder / "pixels")
    tokenizer = train_tokenizer(captions, 520, 12)
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=12)
    text = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=12))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")


def words(place, model, out, *more):
    named = {
        "data": place / "images",
        "captions": place / "heldout.txt",
        "validation_captions": place / "validation.txt",
        "network": place / "clip",
        "num_inference_steps": 2,
        "variety_prompts": 2,
        "num_images_per_prompt": 2,
        "out": out,
    }
    options = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return ["evaluate", str(place / model), *options, *map(str, more)]
