"""Train an autoencoder: accelerate launch train_vae.py --config configs/stable_diffusion/openmoji/vae.yaml."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from ldm.config import AutoencoderConfig
from ldm.config.file import exit_on_config_error, load_config, save_config
from ldm.config.places import pretrained_place
from ldm.data.batches import CaptionedImages, PositionDataset, fixed_batch
from ldm.data.loader import training_batches
from ldm.data.preflight import checked_source
from ldm.doctor.examination import examine_autoencoder, examined
from ldm.evaluation.leaks import refuse_leaks
from ldm.export.folder import ModelFolder, check_push
from ldm.models.network import build_network
from ldm.training.autoencoding import measuring_distance, reconstruction_report, save_at_unit_scale
from ldm.training.loop import Loop
from ldm.training.record import run_record
from ldm.training.rehearsal import rehearse
from ldm.training.resume_check import check_resume
from ldm.training.run import Run, finishing
from ldm.training.signals import exit_on_interrupt
from ldm.training.steps import AutoencoderStep


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train, validate, bring the latents to unit scale, save, push if asked to."""
    config = load_config(AutoencoderConfig)
    if config.resume_check:
        return check_resume(__file__, sys.argv[1:], Path(config.output_dir))
    if config.doctor:
        config = examined(config)
    with finishing(Run(config.output_dir, config.seed, config.loop)) as run:
        check_push(config, run)
        torch.manual_seed(config.seed)
        images = CaptionedImages(checked_source(config.data), config.data)
        refuse_leaks([pretrained_place(config.autoencoder)], images)
        train = PositionDataset(images, "train", config.seed)
        held_out = fixed_batch(PositionDataset(images, "validation", config.seed), config.validation.loss_images)
        autoencoder = build_network(config.autoencoder, "autoencoder", ("AutoencoderKL",))
        step = AutoencoderStep(autoencoder, config.reconstruction, run, config.optim.ema_decay)
        rehearse(step, images, config)
        distance = measuring_distance(config.data.image_size)

        def validate(global_step: int) -> None:
            metrics, sheet = reconstruction_report(step.averaged, held_out, config.validation.num_images, distance)
            run.log_metrics(metrics, global_step)
            run.log_picture("reconstructions", sheet, global_step)

        if config.doctor:
            return examine_autoencoder(config, step, train, validate)
        record = run_record(config, images, step, run.precision)
        epoch_steps = len(train) / config.data.batch_size
        loop = Loop(step, config.optim, config.loop, run, epoch_steps, record, config.allow_config_change)
        if not loop.done:
            save_config(config, run.folder / "config.yaml")
        save = partial(save_at_unit_scale, step.averaged, train, getattr(torch, config.save_dtype))
        model = ModelFolder(config, run, loop, train, save, step.networks)
        loop.fit(
            partial(training_batches, train),
            (config.loop.validate_every_steps, validate),
            (config.push_every_steps, model.push_meanwhile),
        )
        model.finish()


if __name__ == "__main__":
    main()
