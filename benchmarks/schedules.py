"""A figure of the linear and the cosine schedule, log-SNR by time and a noised image: python -m benchmarks.schedules.

Linear: Ho et al. 2020, section 4. Cosine: Nichol & Dhariwal 2021, eq. 17. Both with 1000 steps, and the same noise.
"""

import argparse

import matplotlib.pyplot as plt
import torch

from ldm.config import DataConfig, ObjectiveConfig
from ldm.data.batches import CaptionedImages
from ldm.data.sources import build_source
from ldm.objectives.schedule import build_schedule

STEPS = 1000
SHOWN = (0, 100, 200, 300, 400, 500, 600, 700, 800, 999)
PATHS = ("linear", "cosine")


def noised(x0: torch.Tensor, path: str) -> list[torch.Tensor]:
    """Return x_t, (3, H, W), at the times `SHOWN`."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    schedule = build_schedule(ObjectiveConfig(path=path, num_train_timesteps=STEPS))
    alpha, sigma = schedule.alpha_sigma(torch.tensor(SHOWN))
    return [a * x0 + s * noise for a, s in zip(alpha, sigma, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/schedules.png")
    parser.add_argument("--caption", default="woman astronaut")
    known = parser.parse_args()
    config = DataConfig(source="openmoji", image_size=64)
    images = CaptionedImages(build_source(config), config)
    (image,) = images.rows_of([known.caption])
    x0 = images.pixel_values(image)

    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.5, 1])
    axes = above.subplots()
    times = torch.arange(STEPS)
    for path in PATHS:
        alpha, sigma = build_schedule(ObjectiveConfig(path=path, num_train_timesteps=STEPS)).alpha_sigma(times)
        axes.plot(times, 2 * (alpha / sigma).log(), label=path)
    axes.set(xlabel="time t", ylabel="log-SNR, log(alpha_t^2 / sigma_t^2)", xlim=(0, STEPS), ylim=(-20, 12))
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend()
    for row, path in zip(below.subplots(len(PATHS), len(SHOWN)), PATHS, strict=True):
        for place, time, x_t in zip(row, SHOWN, noised(x0, path), strict=True):
            place.imshow(((x_t.clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
            place.set_title(f"{path}, t = {time}", fontsize=7)
            place.axis("off")
    figure.savefig(known.out, dpi=80)
    print(known.out)


if __name__ == "__main__":
    main()
