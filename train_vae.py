"""Train an autoencoder: accelerate launch train_vae.py --config configs/stable_diffusion/openmoji/vae.yaml."""

from __future__ import annotations

from ldm.config import AutoencoderConfig
from ldm.config.file import exit_on_config_error, load_config
from ldm.recipes.autoencoder import autoencoder_recipe
from ldm.recipes.recipe import train
from ldm.training.signals import exit_on_interrupt


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train, validate, bring the latents to unit scale, save, push if asked to."""
    train(load_config(AutoencoderConfig), autoencoder_recipe, script=__file__)


if __name__ == "__main__":
    main()
