"""The published sizes: every config of a paper has the number of parameters that was published."""

from pathlib import Path

import diffusers
import pytest
import torch

from ldm.config import StageConfig
from ldm.config_file import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = {"ddpm/paper/cifar10.yaml": 35.7e6}
"""Parameters of the denoiser. DDPM: Ho et al. 2020, appendix B."""


def test_every_paper_is_counted():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/paper/*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_denoiser_has_the_published_number_of_parameters(name):
    config = load_config(StageConfig, ["--config", str(CONFIGS / name)])
    keys = dict(config.denoiser)
    with torch.device("meta"):
        denoiser = getattr(diffusers, keys.pop("_class_name"))(**keys)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count == pytest.approx(PUBLISHED[name], rel=2e-3)
