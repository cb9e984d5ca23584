"""A sheet of image-to-image, inpainting and interpolation between two prompts: python -m benchmarks.edits MODEL

MODEL is the folder of a text-to-image pipeline trained here, such as out/demo/model. All images have seed 0.
"""

import argparse
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.evaluation.images import contact_sheet
from ldm.models.pipeline import image_size, load_pipeline

FIRST, SECOND = "woman astronaut light skin tone", "man cook dark skin tone"
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
CALL = {"num_inference_steps": 25, "guidance_scale": 1.25}


def sampled(pipeline: Any, prompt: str, **more: Any) -> Image.Image:
    """Return the image of a prompt with seed 0."""
    image: Image.Image = pipeline(prompt, generator=torch.Generator().manual_seed(0), **CALL, **more).images[0]
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", default="docs/edits.png")
    known = parser.parse_args()
    pipeline = load_pipeline(known.model, trust_remote_code=True)
    size = image_size(pipeline)
    image = sampled(pipeline, FIRST)
    upper, lower = Image.new("L", (size, size)), Image.new("L", (size, size), 255)
    upper.paste(255, (0, 0, size, size // 2))
    lower.paste(0, (0, 0, size, size // 2))
    images = {FIRST: image}
    images |= {f"strength {share}": sampled(pipeline, SECOND, image=image, strength=share) for share in STRENGTHS}
    images |= {
        "upper half anew": sampled(pipeline, SECOND, image=image, mask_image=upper),
        "lower half anew": sampled(pipeline, SECOND, image=image, mask_image=lower),
    }
    between = pipeline.interpolate(FIRST, SECOND, 8, generator=torch.Generator().manual_seed(0), **CALL).images
    images |= {f"{number} of 7 between": image for number, image in enumerate(between)}
    sheet = contact_sheet(list(images), np.stack([np.asarray(image) for image in images.values()]), columns=8)
    sheet.save(known.out)


if __name__ == "__main__":
    main()
