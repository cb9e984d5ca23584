"""Autoencoder losses, each per element of the picture."""

from __future__ import annotations

from torch import Tensor

from ldm.config import ReconstructionConfig


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) in nats, (B,), summed over the latent (Kingma & Welling 2014, B)."""
    return 0.5 * (mean.float().square() + logvar.float().exp() - 1 - logvar.float()).flatten(1).sum(1)


def reconstruction_loss(
    pixel_values: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, config: ReconstructionConfig
) -> Tensor:
    """Return the scalar loss: weighted absolute and squared error and KL, all per picture element, in float32."""
    error = reconstruction.float() - pixel_values
    elements = pixel_values[0].numel()
    kl = kl_to_standard_normal(mean, logvar).mean() / elements
    return config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean() + config.kl_weight * kl
