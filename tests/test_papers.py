"""The published sizes: every config of a paper has the number of parameters that was published."""

from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch

from ldm.config import AutoencoderConfig, StageConfig
from ldm.config.file import load_config

from .table import table

CONFIGS = Path(__file__).parents[1] / "configs"
rounded = partial(pytest.approx, rel=2e-3)
PUBLISHED = {
    "ddpm/paper/cifar10.yaml": rounded(35.7e6),  # Ho et al. 2020, appendix B
    "improved_ddpm/paper/imagenet64.yaml": rounded(121e6),  # Nichol & Dhariwal 2021, section 6, rounds it to 120 M
    "improved_ddpm/paper/cifar10_likelihood.yaml": rounded(52.5e6),  # the same network's count in their code
    "adm/paper/imagenet64.yaml": rounded(296e6),  # Dhariwal & Nichol 2021, table 5
    "adm/paper/imagenet256.yaml": rounded(554e6),
    "stable_diffusion/paper/text2img.yaml": 859_520_964,  # of the released weights, as is the next
    "stable_diffusion/paper/vae.yaml": 83_653_863,
}
"""Parameters of the denoiser or the autoencoder."""


def test_every_paper_is_counted():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/paper/*.yaml")} == PUBLISHED.keys()


@table("name", PUBLISHED)
def test_the_network_has_the_published_number_of_parameters(name):
    kind, network = (AutoencoderConfig, "autoencoder") if name.endswith("vae.yaml") else (StageConfig, "denoiser")
    keys = dict(getattr(load_config(kind, ["--config", str(CONFIGS / name)]), network))
    with torch.device("meta"):
        built = getattr(diffusers, keys.pop("_class_name"))(**keys)
    assert sum(parameter.numel() for parameter in built.parameters()) == PUBLISHED[name]
