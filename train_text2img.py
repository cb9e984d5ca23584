"""Train a diffusion stage.

accelerate launch train_text2img.py --config configs/stable_diffusion/openmoji/text2img.yaml
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from ldm.config import StageConfig
from ldm.config.file import exit_on_config_error, load_config, save_config
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.data.loader import training_batches
from ldm.data.preflight import checked_source
from ldm.doctor.examination import examine_stage, examined
from ldm.evaluation.leaks import refuse_leaks
from ldm.export.folder import ModelFolder, check_push
from ldm.export.kinds import export
from ldm.stage import build_stage, pretrained_parts
from ldm.training.alarms import Alarms
from ldm.training.loop import Loop
from ldm.training.record import recorded_tokenizer, run_record
from ldm.training.rehearsal import rehearse
from ldm.training.resume_check import check_resume
from ldm.training.run import Run, finishing
from ldm.training.signals import exit_on_interrupt
from ldm.training.snapshots import Snapshots
from ldm.training.steps import DiffusionStep
from ldm.training.validation import Validation
from pipelines import PIPELINES

STATISTICS_PICTURES = 4096


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train, validate, save the pipeline folder, push it if asked to."""
    config = load_config(StageConfig)
    if config.resume_check:
        return check_resume(__file__, sys.argv[1:], Path(config.output_dir))
    if config.doctor:
        config = examined(config)
    with finishing(Run(config.output_dir, config.seed, config.loop)) as run:
        check_push(config, run)
        images = CaptionedImages(checked_source(config.data), config.data)
        refuse_leaks(pretrained_parts(config), images)
        pictures = partial(images.first_pictures, "train", STATISTICS_PICTURES)
        stage = build_stage(config, images.captions("train"), pictures, recorded_tokenizer(run.saved))
        tracked = config.snapshot_sigma_rels if config.snapshot_every_steps else ()
        step = DiffusionStep(stage, run, config.optim.ema_decay, tracked)
        rehearse(step, images, config)
        encoded = None
        if config.data.cache:
            encoded = images.encoded(stage.space.key, step.encode) if stage.space.frozen else None
            step.remember_captions(images.known_captions())
        train = PositionDataset(images, "train", config.seed, encoded, stage.model.reads_pixels)
        pipeline = export(step, config, PIPELINES)

        validation = Validation(config, images, step, pipeline, run)
        validation.rehearse()
        if config.doctor:
            return examine_stage(config, step, train, validation)

        record = run_record(config, images, step, run.precision)
        epoch_steps = len(train) / config.data.batch_size
        loop = Loop(step, config.optim, config.loop, run, epoch_steps, record, config.allow_config_change)
        if not loop.done:
            save_config(config, run.folder / "config.yaml")
        model = ModelFolder(config, run, loop, train, pipeline.save_pretrained, step.networks)
        alarms = Alarms(run, loop.progress, config.optim, len(train), step.not_finite_at)
        alarms.before_training(config, validation, train)
        loop.fit(
            partial(training_batches, train),
            (config.loop.validate_every_steps, validation),
            (config.push_every_steps, model.push_meanwhile),
            (config.snapshot_every_steps, Snapshots(run, loop, step.power_averages)),
        )
        model.finish()


if __name__ == "__main__":
    main()
