"""The variational bound of a model in pixel space, in bits per dimension, by its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.evaluation.measure import mean_of
from ldm.evaluation.report import Curve, Row, Section
from ldm.models.scheduler import schedule_of
from ldm.models.vision import Images
from ldm.objectives.schedule import DiscreteSchedule, recover
from ldm.objectives.variational import (
    GREY_STEP,
    fixed_log_variance,
    interpolated_log_variance,
    prior_term,
    variational_term,
)

CHUNK = 50

Bits = NDArray[np.float64]


@dataclass(frozen=True)
class Bound:
    """The terms of an upper bound of -log2 p(image) (Ho et al. 2020, eq. 5), in bits per value of the image."""

    prior: Bits
    """L_T, (N,)."""
    steps: Bits
    """Unbiased estimates of the sum of L_t over each of K ranges of timesteps, (K, N), the least noise first."""
    decoder: Bits
    """L_0, (N,): the bits of the grey levels, given the last step."""

    @property
    def total(self) -> Bits:
        """Return the bits per dimension, (N,)."""
        return cast(Bits, self.prior + self.steps.sum(0) + self.decoder)


@torch.no_grad()
def variational_bound(
    pipeline: Any, pixel_values: Tensor, class_labels: Sequence[int] | None, timesteps: int, seed: int
) -> Bound:
    """Return the bound of images, (N, 3, H, W) in [-1, 1] on the grid of 256 grey levels.

    Every image has L_T, L_0 and `timesteps` of the terms between. The timesteps are split into as many ranges of equal
    length, and one is drawn from each: an unbiased estimate, and with all timesteps exact but for the noise. Timesteps
    and noise depend on the seed and the place of an image alone. The predicted x0 is clipped where the scheduler clips.

    Raises:
        ValueError: see `check_bound`.

    """
    schedule, unet = check_bound(pipeline, timesteps), pipeline.unet
    edges = torch.linspace(1, len(schedule.betas), timesteps + 1).round().long()
    count = len(pixel_values)
    steps, decoder, prior = np.empty((timesteps, count)), np.empty(count), np.empty(count)
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        x0 = pixel_values[rows].to(unet.device)
        labels = {} if class_labels is None else {"class_labels": torch.tensor(class_labels[rows], device=unet.device)}
        generators = [torch.Generator().manual_seed(seed + row) for row in range(rows.start, rows.stop)]
        prior[rows] = prior_term(schedule, x0.double().cpu()).numpy()
        decoder[rows] = _terms(pipeline, schedule, x0, torch.zeros(len(x0), dtype=torch.long), generators, labels)
        for number, (first, last) in enumerate(pairwise(edges)):
            t = torch.stack([torch.randint(int(first), int(last), (), generator=each) for each in generators])
            steps[number, rows] = int(last - first) * _terms(pipeline, schedule, x0, t, generators, labels)
    return Bound(prior, steps, decoder)


def check_bound(pipeline: Any, timesteps: int) -> DiscreteSchedule:
    """Return the noise schedule whose steps the bound is a sum over.

    Raises:
        ValueError: the pipeline diffuses latents or has no discrete steps, or it has fewer than `timesteps`.

    """
    name = type(pipeline).__name__
    if pipeline.components.get("vae") is not None or "unet" not in pipeline.components:
        raise ValueError(f"{name} diffuses latents, whose bits are not those of images; expected a model of pixels")
    schedule, _ = schedule_of(pipeline.scheduler)
    if not isinstance(schedule, DiscreteSchedule) or schedule.alphas_cumprod[-1] == 0:
        raise ValueError(f"{name} has no bound: that needs discrete steps, and a little of the image in the last one")
    if not 1 <= timesteps < len(schedule.betas):
        raise ValueError(f"got {timesteps} timesteps of the bound; expected 1 to {len(schedule.betas) - 1}")
    return schedule


def _terms(
    pipeline: Any,
    schedule: DiscreteSchedule,
    x0: Tensor,
    timesteps: Tensor,
    generators: Sequence[torch.Generator],
    labels: dict[str, Tensor],
) -> Bits:
    """Return L_t of each image at its timestep, in bits, (B,); `labels` are keywords of the network."""
    unet, config = pipeline.unet, pipeline.scheduler.config
    _, prediction_type = schedule_of(pipeline.scheduler)
    alpha, sigma = (level.to(x0.device).view(-1, 1, 1, 1) for level in schedule.alpha_sigma(timesteps))
    timesteps = timesteps.to(x0.device)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=each) for each in generators]).to(x0)
    x_t = alpha * x0 + sigma * noise
    output = unet(x_t.to(unet.dtype), timesteps, **labels, return_dict=False)[0].float()
    predicted_x0, _ = recover(output[:, : x0.shape[1]], x_t, prediction_type, alpha, sigma)
    if config.get("clip_sample") or config.get("thresholding"):  # a bound may use any estimate of x0
        predicted_x0 = predicted_x0.clamp(-1, 1)
    if output.shape[1] == 2 * x0.shape[1]:
        log_variance = interpolated_log_variance(schedule, output[:, x0.shape[1] :], timesteps)
    else:
        kind = config.get("variance_type") or "fixed_small"
        log_variance = fixed_log_variance(schedule, kind, timesteps, x0)
    terms = variational_term(schedule, x0, x_t, timesteps, predicted_x0, log_variance, GREY_STEP)
    return cast(Bits, terms.double().cpu().numpy())


def bound_section(bits: Bound, true: Images, training: Images) -> Section:
    """Return the bits per dimension of the `true` images, beside those of `independent_bits`."""
    parts = {"prior": bits.prior, "steps": bits.steps.sum(0), "decoder": bits.decoder}
    words = ", ".join(f"{name} {values.mean():.3f}" for name, values in parts.items())
    beside = {"pixel by pixel": mean_of(independent_bits(true, training))}
    row = Row("bits per dimension", mean_of(bits.total), "lower", beside, words)
    stretch = [
        (float(place), mean_of(of)) for place, of in zip(np.linspace(0, 1, len(bits.steps)), bits.steps, strict=True)
    ]
    curve = Curve("Bits by noise level", "noise level (0: image, 1: noise)", "bits per dimension", {"steps": stretch})
    text = (
        f"The variational bound (Ho et al. 2020, eq. 5) of the true held-out images: the bits that are needed to "
        f"send them with this model. The estimate is unbiased, from {len(bits.steps)} timesteps of each image. Pixel "
        "by pixel: each value is sent alone, by how often the training images have it at that place and colour."
    )
    meaning = "Bits that each colour value of a true image costs to send with this model."
    return Section("How many bits is an image?", text, [row], [curve], meaning=meaning)


def independent_bits(true: Images, training: Images) -> Bits:
    """Return the mean bits per value of each image, (N,), if every value is coded alone.

    The probability of a grey level at a place and colour is its count there in the training images, plus one.
    """
    counts = np.stack([(training == value).sum(0) for value in range(256)], -1) + 1.0
    bits = -np.log2(counts / counts.sum(-1, keepdims=True))
    return cast(Bits, np.take_along_axis(bits[None], true[..., None].astype(np.int64), -1).mean((1, 2, 3, 4)))
