"""The published sizes: every config of a paper has the number of parameters that was published."""

from pathlib import Path

import diffusers
import pytest
import torch

from ldm.config import StageConfig
from ldm.config.file import load_config

from .table import table

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = {
    "ddpm/paper/cifar10.yaml": 35.7e6,  # Ho et al. 2020, appendix B
    "improved_ddpm/paper/imagenet64.yaml": 121e6,  # Nichol & Dhariwal 2021, section 6, rounds it to 120 M
    "improved_ddpm/paper/cifar10_likelihood.yaml": 52.5e6,  # the same network's count in their code
    "adm/paper/imagenet64.yaml": 296e6,  # Dhariwal & Nichol 2021, table 5
    "adm/paper/imagenet256.yaml": 554e6,
}
"""Parameters of the denoiser."""


def test_every_paper_is_counted():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/paper/*.yaml")} == PUBLISHED.keys()


@table("name", PUBLISHED)
def test_the_denoiser_has_the_published_number_of_parameters(name):
    config = load_config(StageConfig, ["--config", str(CONFIGS / name)])
    keys = dict(config.denoiser)
    with torch.device("meta"):
        denoiser = getattr(diffusers, keys.pop("_class_name"))(**keys)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count == pytest.approx(PUBLISHED[name], rel=2e-3)
