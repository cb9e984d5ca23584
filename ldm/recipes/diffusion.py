"""The recipe of a diffusion stage: space, denoiser, objective and conditioners, saved as a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ldm.config import StageConfig
from ldm.data.batches import Batch, CaptionedImages, PositionDataset
from ldm.doctor.examination import stage_findings
from ldm.errors import explained
from ldm.evaluation.leaks import refuse_leaks
from ldm.evaluation.samples import SAMPLES
from ldm.export.kinds import build_pipeline, kind_of
from ldm.export.pipeline_card import pipeline_card
from ldm.recipes.recipe import Recipe
from ldm.stage import build_stage, pretrained_parts
from ldm.training.alarms import faults_before
from ldm.training.loop import Event, Loop
from ldm.training.record import recorded_tokenizer
from ldm.training.rehearsal import first_batch, rehearse
from ldm.training.run import Run
from ldm.training.snapshots import Snapshots
from ldm.training.steps import DiffusionStep
from ldm.training.validation import Validation

FIELDS = "denoiser, space, conditioners, objective"
"""Parts of the config that must fit together."""
STATISTICS_IMAGES = 4096
"""Number of training images from which an embedding space computes its statistics."""


def diffusion_recipe(
    config: StageConfig, run: Run, images: CaptionedImages, pipelines: Mapping[str, Callable[..., Any]]
) -> Recipe:
    """Return the recipe of a diffusion stage, saved as one of `pipelines`: the classes by name.

    Raises:
        ConfigError: a pretrained part was trained on images that are held out here.
        ValueError: no pipeline can sample such a stage.

    """
    parts = pretrained_parts(config)
    refuse_leaks(parts, images)
    first_images = partial(images.first_images, "train", STATISTICS_IMAGES)
    stage = build_stage(config, images.captions("train"), first_images, recorded_tokenizer(run.saved))
    sigma_rels = config.snapshot_sigma_rels if config.snapshot_every_steps else ()
    step = DiffusionStep(stage, run, config.optim.ema_decay, sigma_rels)
    kind = kind_of(stage, config.space.kind)
    with explained(FIELDS):
        pipeline = build_pipeline(kind, stage, step.averaged, config, pipelines)
    samples = SAMPLES[kind.samples](images, stage.space, config.sampled_size)
    validation = Validation(config, images, step, pipeline, samples, run)

    def rehearse_all() -> None:
        batch = first_batch(images, 2)
        rehearse(step, batch, f"{FIELDS}, data.image_size {config.data.image_size}")
        validation.rehearse()

    def dataset() -> PositionDataset:
        encoded = None
        if config.data.cache:
            encoded = images.encoded_images("latents", stage.space.key, step.encode) if stage.space.frozen else None
            step.remember(images)
        return PositionDataset(images, "train", config.seed, encoded, stage.model.reads_pixels)

    def events(loop: Loop[Batch]) -> Sequence[Event]:
        snapshots = Snapshots(run, loop.progress, step.power_averages)
        snapshots.forget_later()
        return (config.loop.validate_every_steps, validation), (config.snapshot_every_steps, snapshots)

    return Recipe(
        step=step,
        parts=parts,
        rehearse=rehearse_all,
        dataset=dataset,
        events=events,
        alarms=partial(faults_before, config, validation),
        findings=partial(stage_findings, config, kind, step, validation),
        save=pipeline.save_pretrained,
        card=pipeline_card(kind, config, len(validation.ranked)),
    )
