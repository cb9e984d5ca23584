"""Train a CLIP.

accelerate launch train_clip.py --config configs/openmoji/clip.yaml
"""

from __future__ import annotations

from ldm.config import ClipConfig
from ldm.config.file import exit_on_config_error, load_config
from ldm.recipes.clip import clip_recipe
from ldm.recipes.recipe import train
from ldm.training.signals import exit_on_interrupt


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train, validate, save the model folder, push it if asked to."""
    train(load_config(ClipConfig), clip_recipe, script=__file__)


if __name__ == "__main__":
    main()
