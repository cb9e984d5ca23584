"""What the parts of a joined Imagen are worth, on held-out images: the super-resolution, and the limits on colours.

python -m benchmarks.imagen out/imagen/openmoji/model OUT.json --plot docs/thresholding.svg
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.held_out import Held, measured, parser_of
from ldm.evaluation.images import pixel_values
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.retrieval import retrieval_ranks
from ldm.evaluation.sampling import sample_images
from ldm.models.features import build_perceptual_distance
from ldm.models.resolution import shrunk
from ldm.models.vision import Images

CHUNK = 50
AVERAGED = 8
"""Samples of one small image that are averaged for PSNR: their mean is the estimate that it measures."""
GUIDANCE = (1.5, 3.0, 7.0)
LIMITED = 60
"""Held-out captions that the limits are compared on, and held-out images that are made larger; the first of them."""
LIMITS: dict[str, dict[str, Any]] = {
    "dynamic thresholding": {"thresholding": True, "sample_max_value": 100.0},
    "clipping": {"thresholding": True, "sample_max_value": 1.0},
    "no limit": {"thresholding": False},
}
"""Keys of the sampling schedulers. With a largest value of 1, thresholding clips at 1."""


def super_resolution(held: Held, noise_level: int = 0) -> Iterator[tuple[str, Measure]]:
    """Yield what the super-resolution makes of true images that were made small, beside bicubic's.

    PSNR of the mean of `AVERAGED` samples, perceptual distance and error of the mean colour of one sample.
    """
    pipe, distance = held.pipeline, build_perceptual_distance("efficientnet_lite0")
    true = pixel_values(held.true[:LIMITED])
    small = shrunk(true, pipe.unet.config.sample_size)
    size = pipe.image_size
    bicubic = F.interpolate(small, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    samples = [larger(held, small, noise_level, seed) for seed in range(AVERAGED)]
    mean = torch.stack(samples).mean(0)
    for name, average, one in (("bicubic", bicubic, bicubic), ("super-resolution", mean, samples[0])):
        error = (average - true).square().flatten(1).mean(1)
        yield f"PSNR of {name}, dB", mean_of((10 * torch.log10(4 / error.clamp(min=1e-10))).numpy())
        far = torch.cat([distance(*pair) for pair in zip(one.split(CHUNK), true.split(CHUNK), strict=True)])
        yield f"perceptual distance of {name}", mean_of(far.numpy())
        colour = (one.mean((2, 3)) - true.mean((2, 3))).abs().mean(1) * 127.5
        yield f"error of the mean colour of {name}, of 255", mean_of(colour.numpy())


def larger(held: Held, small: Tensor, noise_level: int, seed: int) -> Tensor:
    """Return the larger images of small ones and the held-out captions."""
    parts = []
    for start in range(0, len(small), CHUNK):
        rows = slice(start, start + CHUNK)
        generators = [torch.Generator().manual_seed(1000 * seed + row) for row in range(len(small))[rows]]
        output = held.pipeline.upsample(
            held.captions[: len(small)][rows],
            small[rows] / 2 + 0.5,
            noise_level=noise_level,
            generator=generators,
            output_type="latent",
        )
        parts.append(output.images.clamp(-1, 1).cpu())
    return torch.cat(parts)


def limits(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield the saturation of images, and R@1, for each limit on the estimate of x0 and each guidance scale."""
    own, captions = held.own[:LIMITED], held.captions[:LIMITED]
    yield "saturation of true images", mean_of(saturation(held.true[:LIMITED]))
    for name, keys in LIMITS.items():
        held.pipeline.scheduler.register_to_config(**keys)
        for scale in GUIDANCE:
            images = sample_images(held.pipeline, captions, 0, "prompt", guidance_scale=scale)
            yield f"saturation, {name}, guidance {scale:g}", mean_of(saturation(images))
            yield f"R@1, {name}, guidance {scale:g}", mean_of(retrieval_ranks(images, held.gallery, own) < 1)


def saturation(images: Images) -> NDArray[np.float64]:
    """Return the mean of the largest minus the smallest channel of each image, of 255."""
    found: NDArray[np.float64] = (images.max(3).astype(int) - images.min(3)).mean((1, 2))
    return found


def plot(numbers: dict[str, Measure], path: Path) -> None:
    """Draw the saturation over the guidance scale, with that of the true images, as SVG."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    for name in LIMITS:
        measures = [numbers[f"saturation, {name}, guidance {scale:g}"] for scale in GUIDANCE]
        axes.plot(GUIDANCE, [one.value for one in measures], marker="o", label=name)
        axes.fill_between(GUIDANCE, [one.low for one in measures], [one.high for one in measures], alpha=0.15)
    axes.axhline(numbers["saturation of true images"].value, color="black", linestyle="--", label="true images")
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("saturation, of 255")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


PARTS = {"super_resolution": super_resolution, "limits": limits}


def main() -> None:
    """Measure, draw, and write the numbers after each part."""
    parser = parser_of(__doc__, "a joined Imagen", PARTS)
    parser.add_argument("--plot", type=Path, help="file for the plot of the limits")
    arguments = parser.parse_args()
    if arguments.plot is not None and "limits" not in arguments.parts:
        parser.error("--plot: draws the limits, and --parts does not measure them")
    numbers = measured(Held(arguments.model, arguments.validation), PARTS, arguments)
    if arguments.plot is not None:
        plot(numbers, arguments.plot)


if __name__ == "__main__":
    main()
