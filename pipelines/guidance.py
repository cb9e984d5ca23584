"""Classifier-free guidance."""

import torch


def guide(
    uncond: torch.Tensor, cond: torch.Tensor, guidance_scale: float, channels: int, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Return the guided model output, shaped like `cond`: ``uncond + guidance_scale * (cond - uncond)``.

    A `guidance_scale` of 0 gives the unconditional prediction, 1 the conditional one; above 1 it extrapolates (Ho &
    Salimans 2022, eq. 6, whose w is guidance_scale - 1). The rule is linear, so it is the same for every prediction
    type.
    guidance_rescale: from 0, none, to 1. Guidance makes the standard deviation of each sample larger than that of
    `cond`; a rescaled output, with the standard deviation of `cond`, is mixed in with this share (Lin et al. 2024,
    section 3.4: against overexposed images, above all with zero terminal SNR).

    uncond, cond: (B, channels, ...), or (B, 2 * channels, ...) of a network with a learned variance. In the second
    case only the first half, the mean, is guided; the variance is the conditional one, as in GLIDE (Nichol et al.
    2022), because an extrapolated variance means nothing. ValueError for other numbers of channels or unequal shapes.
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
