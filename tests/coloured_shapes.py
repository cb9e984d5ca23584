"""Small images that their captions describe in full: "red circle left". All is known of what a model could learn."""

import itertools
import json
import random

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.models.autoencoder import fold_statistics
from ldm.models.text_encoder import train_tokenizer

COLOURS = ("red", "green", "blue", "yellow", "black", "magenta")
SHAPES = ("circle", "square", "bar")
PLACES = {"left": (5, 8), "right": (11, 8), "top": (8, 5), "bottom": (8, 11)}
COMBINATIONS = list(itertools.product(COLOURS, SHAPES, PLACES))
PIXELS = 16
TOKENS = 16
BOXES = {"circle": (3, 3), "square": (3, 3), "bar": (4, 1)}
"""Half of width and height."""


def write_shapes(folder, copies=4):
    """Write `copies` of each combination, a pixel apart at most; return the captions of every fifth combination."""
    captions, rows = [" ".join(combination) for combination in COMBINATIONS], []
    for copy in range(copies):
        for caption, image in zip(captions, images(copy), strict=True):
            name = f"{copy}-{caption.replace(' ', '-')}.png"
            image.save(folder / name)
            rows.append({"file_name": name, "text": caption})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return captions[::5]


def images(seed):
    """Return one image of each combination."""
    draw = random.Random(seed)
    return [image(*combination, draw) for combination in COMBINATIONS]


def image(colour, shape, place, draw):
    """Return one of these images: its own place within a pixel, and a grey of its own behind it."""
    grey = draw.randrange(160, 256)
    image = Image.new("RGB", (PIXELS, PIXELS), (grey, grey, grey))
    x, y = (middle + draw.choice((-1, 0, 1)) for middle in PLACES[place])
    half_width, half_height = BOXES[shape]
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
    return image


def save_autoencoder(folder, images, scale=1.0):
    """Write an autoencoder with random weights whose latents of `images` (N, 3, H, W) have mean 0 and std `scale`."""
    torch.manual_seed(3)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": PIXELS}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = AutoencoderKL(**blocks, **kinds).eval()
    with torch.no_grad():
        autoencoder.quant_conv.weight[4:] = 0
        autoencoder.quant_conv.bias[4:] = -10  # next to no spread: random weights would draw little but noise
        latents = autoencoder.encode(images).latent_dist.mean
    fold_statistics(autoencoder, latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / scale)
    autoencoder.save_pretrained(folder)


def save_text_encoder(folder, width=32):
    """Write an untrained CLIP text encoder that tells words apart, and a tokenizer that knows them."""
    torch.manual_seed(1)
    tokenizer = train_tokenizer([" ".join(combination) for combination in COMBINATIONS], 600, TOKENS)
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(**sizes, **ids, vocab_size=len(tokenizer), max_position_embeddings=TOKENS)
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)  # drawn with std 0.02, all captions are nearly one
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
