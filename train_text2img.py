"""Train a diffusion stage.

accelerate launch train_text2img.py --config configs/stable_diffusion/openmoji/text2img.yaml
"""

from __future__ import annotations

from functools import partial

from ldm.config import StageConfig
from ldm.config.file import exit_on_config_error, load_config
from ldm.recipes.diffusion import diffusion_recipe
from ldm.recipes.recipe import train
from ldm.training.signals import exit_on_interrupt
from pipelines import PIPELINES


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train, validate, save the pipeline folder, push it if asked to."""
    train(load_config(StageConfig), partial(diffusion_recipe, pipelines=PIPELINES), script=__file__)


if __name__ == "__main__":
    main()
