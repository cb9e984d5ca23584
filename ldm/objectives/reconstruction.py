"""The losses of an autoencoder and its discriminator, in float32; errors are means over the values of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import ReconstructionConfig

Adversarial = Literal["hinge", "minimax"]
Distance = Callable[[Tensor, Tensor], Tensor]
"""A perceptual distance between two batches of images, (B,)."""
MAX_ADAPTIVE_WEIGHT = 1e4


def reconstruction_error(
    pixel_values: Tensor, reconstruction: Tensor, config: ReconstructionConfig, distance: Distance | None = None
) -> dict[str, Tensor]:
    """Return the weighted terms of the error, scalars by name: l1, l2 and, with a `distance`, perceptual.

    Of images (B, 3, H, W), or clips (B, 3, F, H, W), which have the term change too, if it has a weight: the absolute
    error of the change from frame to frame.
    """
    error = reconstruction.float() - pixel_values
    terms = {"l1": config.l1_weight * error.abs().mean(), "l2": config.l2_weight * error.square().mean()}
    if config.change_weight and error.ndim == 5:
        terms["change"] = config.change_weight * error.diff(dim=2).abs().mean()
    if distance is not None:
        pair = (clips.movedim(1, -3).flatten(0, -4) for clips in (reconstruction.float(), pixel_values))
        terms["perceptual"] = config.perceptual_weight * distance(*pair).mean()
    return terms


def negative_log_likelihood(error: Tensor, logvar: Tensor) -> Tensor:
    """Return the loss of an error whose scale is exp(logvar): ``error / exp(logvar) + logvar``.

    Up to constants it is the negative log-likelihood of a Laplace distribution for an absolute error, and twice that of
    a normal distribution for a squared error. It is smallest at logvar = log(error); with logvar 0 it is the error.
    """
    return error / logvar.float().exp() + logvar.float()


def discriminator_loss(kind: Adversarial, real: Tensor, reconstructed: Tensor) -> Tensor:
    """Return the discriminator's loss, a scalar, from its logits of real and reconstructed images.

    hinge: half the sum of two margins (Lim & Ye 2017). minimax: ``-E log D(x) - E log(1 - D(y))`` (Goodfellow et al.
    2014, eq. 1), which is ``2 log 2 - 2 JSD`` at the best discriminator.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + reconstructed.float()).mean())
    return F.softplus(-real.float()).mean() + F.softplus(reconstructed.float()).mean()


def generator_loss(kind: Adversarial, reconstructed: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss, a scalar: hinge ``-E f(y)``, minimax ``E log(1 - D(y))``."""
    return -reconstructed.float().mean() if kind == "hinge" else -F.softplus(reconstructed.float()).mean()


def adaptive_weight(
    error: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Return the ratio of the losses' gradient norms at the last layer, at most 1e4 (Esser et al. 2021, eq. 7).

    `reduce` averages a gradient over processes, so that each gets the weight of the whole batch. The result has no
    gradient, and the graphs of both losses stay usable.
    """
    norms = [
        reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (error, adversarial)
    ]
    ratio: Tensor = norms[0] / (norms[1] + 1e-4)
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT)
