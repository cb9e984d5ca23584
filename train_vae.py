"""Train an autoencoder: accelerate launch train_vae.py --config configs/openmoji/vae.yaml."""

from __future__ import annotations

from functools import partial

import torch

from ldm.config import AutoencoderConfig
from ldm.config_file import exit_on_config_error, load_config, save_config
from ldm.data.batches import CaptionedImages, PositionDataset, fixed_batch, training_batches
from ldm.data.preflight import checked_source
from ldm.models.autoencoder import fold_statistics
from ldm.models.network import build_network
from ldm.provenance import refuse_leak
from ldm.training.autoencoding import latent_statistics, measuring_distance, reconstruction_report
from ldm.training.loop import Loop
from ldm.training.record import provenance
from ldm.training.run import Run, finishing
from ldm.training.steps import AutoencoderStep


def main() -> None:
    """Train, validate, bring the latents to unit scale, save."""
    with exit_on_config_error():
        config = load_config(AutoencoderConfig)
    with finishing(Run(config.output_dir, config.seed, config.loop)) as run:
        torch.manual_seed(config.seed)
        images = CaptionedImages(checked_source(config.data), config.data)
        if "pretrained" in config.autoencoder:
            refuse_leak(config.autoencoder["pretrained"], images.splits.held_out_hash)
        train = PositionDataset(images, "train", config.seed)
        held_out = fixed_batch(PositionDataset(images, "validation", config.seed), config.validation.loss_images)
        autoencoder = build_network(config.autoencoder, "autoencoder")
        step = AutoencoderStep(autoencoder, config.reconstruction, run, config.optim.ema_decay)
        loop = Loop(step, config.optim, config.loop, run, len(train) / config.data.batch_size)
        save_config(config, run.folder / "config.yaml")
        distance = measuring_distance()

        def validate(global_step: int) -> None:
            metrics, sheet = reconstruction_report(step.averaged, held_out, config.validation.num_images, distance)
            run.log_metrics(metrics, global_step)
            run.log_picture("reconstructions", sheet, global_step)

        progress = loop.fit(partial(training_batches, train), validate)
        if run.is_main:
            fold_statistics(step.averaged, *latent_statistics(step.averaged, train))
            step.averaged.to(getattr(torch, config.save_dtype)).save_pretrained(run.folder / "model")
            provenance(progress, train).save(run.folder / "model")


if __name__ == "__main__":
    main()
