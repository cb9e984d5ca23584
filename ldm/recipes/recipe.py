"""One kind of training as a recipe, and the order in which every kind is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from ldm.config import RunConfig
from ldm.config.file import save_config
from ldm.data.batches import Batch, CaptionedImages, PositionDataset
from ldm.data.loader import training_batches
from ldm.data.preflight import checked_source
from ldm.doctor.examination import examined
from ldm.doctor.findings import Finding, report
from ldm.evaluation.leaks import refuse_leaks
from ldm.export.card import CardText
from ldm.export.folder import ModelFolder, check_push
from ldm.training.alarms import Alarms
from ldm.training.loop import Event, Loop
from ldm.training.record import run_record
from ldm.training.resume_check import check_resume
from ldm.training.run import Run, log_to_stderr, opened
from ldm.training.steps import Step

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Recipe:
    """What one kind of training is, with its networks built: plain values and callables, without a state of its own.

    One function makes it for each kind, from ``(config, run, images)``: `diffusion_recipe`, `autoencoder_recipe`.
    """

    step: Step
    """What is trained, and how a batch becomes losses."""
    parts: Sequence[str]
    """Folders and Hub names of the pretrained parts."""
    rehearse: Callable[[], None]
    """Does everything once that a training does, on two images; raises ConfigError for what does not fit together."""
    dataset: Callable[[], PositionDataset]
    """Returns what is trained on; computes and keeps what frozen networks make of it."""
    events: Callable[[Loop[Batch]], Sequence[Event]]
    """Returns what happens between the loop's steps: validations, snapshots."""
    alarms: Callable[[PositionDataset], Iterable[tuple[str, str]]]
    """Yields name and sentence of each alarm that shows before the first step."""
    findings: Callable[[PositionDataset], Iterator[Finding]]
    """Yields what the doctor finds."""
    save: Callable[[Path], object]
    """Writes the averaged weights as they stand into a folder, and changes nothing that is trained."""
    card: CardText
    """The words on the model's card."""


def train(config: C, recipe_of: Callable[[C, Run, CaptionedImages], Recipe], script: str) -> None:
    """Train from start to model folder: check, build, refuse, rehearse, resume, loop, save, push.

    `script` is the entry script, which the check of a resume runs again. With ``config.doctor`` nothing is trained.
    """
    log_to_stderr()
    if config.resume_check:
        return check_resume(script, sys.argv[1:], Path(config.output_dir))
    if config.doctor:
        config = examined(config)
    with opened(Run(config.output_dir, config.seed, config.loop)) as run:
        check_push(config, run)
        images = CaptionedImages(checked_source(config.data), config.data)
        recipe = recipe_of(config, run, images)
        refuse_leaks(recipe.parts, images)
        recipe.rehearse()
        dataset = recipe.dataset()
        if config.doctor:
            return report(recipe.findings(dataset), run.folder)

        record = run_record(config, images, recipe.step, run.precision)
        loop = Loop(recipe.step, config.optim, config.loop, run, len(dataset) / config.data.batch_size)
        loop.resume(record, config.allow_config_change)
        if not loop.done:
            save_config(config, run.folder / "config.yaml")
        folder = ModelFolder(config, run, loop, dataset, recipe.save, recipe.card, recipe.step.networks, recipe.parts)
        alarms = Alarms(run, loop.progress, config.optim, len(dataset), recipe.step.not_finite_at)
        run.watch = alarms
        alarms.say_all(recipe.alarms(dataset))
        loop.fit(
            partial(training_batches, dataset), *recipe.events(loop), (config.push_every_steps, folder.push_meanwhile)
        )
        folder.finish()
