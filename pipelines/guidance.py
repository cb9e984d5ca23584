"""Classifier-free guidance."""

import torch


def guide(
    uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, channels: int, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Return the guided model output, shaped like `cond`: ``uncond + guidance_scale * (cond - uncond)``.

    A `guidance_scale` of 0 is the unconditional prediction, 1 the conditional one, more extrapolates (Ho & Salimans
    2022, eq. 6, whose w is guidance_scale - 1). The rule is linear, so it is the same for every prediction type.
    guidance_rescale: share, from 0 to 1, of the same with the standard deviation that `cond` has in each sample, which
    guidance makes larger (Lin et al. 2024, section 3.4: against overexposed images, with zero terminal SNR above all).

    uncond, cond: (B, channels, ...), or (B, 2 * channels, ...) of a network with a learned variance. Then the first
    half, the mean, is guided, and the variance is the conditional one as it is (as GLIDE does, Nichol et al. 2022):
    an extrapolated variance is none. Any other number of channels, or two shapes, is a ValueError.
    """
    if uncond.shape != cond.shape or cond.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"model outputs of shapes {tuple(uncond.shape)} and {tuple(cond.shape)}; expected two alike with "
            f"{channels} channels, or {2 * channels} with a learned variance"
        )
    mean_uncond, mean_cond = uncond[:, :channels], cond[:, :channels]
    mean = mean_uncond + guidance_scale * (mean_cond - mean_uncond)
    if guidance_rescale:
        axes = list(range(1, mean.ndim))
        rescaled = mean * (mean_cond.std(axes, keepdim=True) / mean.std(axes, keepdim=True))
        mean = guidance_rescale * rescaled + (1 - guidance_rescale) * mean
    return torch.cat([mean, cond[:, channels:]], dim=1)
