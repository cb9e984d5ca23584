"""The recipe of one kind of training, and the order of steps that every training follows."""

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
from ldm.export.card import CardText
from ldm.export.folder import ModelFolder, check_push
from ldm.terminal import write_lines
from ldm.training.alarms import Alarms
from ldm.training.loop import Event, Loop
from ldm.training.record import run_record
from ldm.training.resume_check import check_resume
from ldm.training.run import Run, opened
from ldm.training.steps import Step

C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Recipe:
    """One kind of training with its networks built: plain values and callables, without a state of its own.

    Each kind has one function that makes its recipe from ``(config, run, images)``: `diffusion_recipe`,
    `autoencoder_recipe`. It calls `refuse_leaks` for the pretrained parts before it loads anything.
    """

    step: Step
    """The networks to train, and their losses on a batch."""
    parts: Sequence[str]
    """Folders or Hub names of the pretrained parts."""
    rehearse: Callable[[], None]
    """Runs every part of a training once, on few images; raises ConfigError for parts that do not fit together."""
    dataset: Callable[[], PositionDataset]
    """Returns the training data; computes and caches the outputs of frozen networks on it."""
    events: Callable[[Loop[Batch]], Sequence[Event]]
    """Returns the actions between steps of the loop, such as validations and snapshots."""
    alarms: Callable[[PositionDataset], Iterable[tuple[str, str]]]
    """Yields name and sentence of each alarm that is known before the first step."""
    findings: Callable[[PositionDataset], Iterator[Finding]]
    """Yields the findings of the doctor."""
    save: Callable[[Path], object]
    """Writes the current averaged weights into a folder; what is trained stays unchanged."""
    card: CardText
    """The words on the model's card."""


def train(config: C, recipe_of: Callable[[C, Run, CaptionedImages], Recipe], script: str) -> None:
    """Train from the config to the model folder: check, refuse leaks, build, rehearse, resume, loop, save, push.

    `script` is the entry script; ``config.resume_check`` runs it again. With ``config.doctor`` the training is only
    examined.
    """
    write_lines()
    if config.resume_check:
        return check_resume(script, sys.argv[1:], Path(config.output_dir))
    if config.doctor:
        config = examined(config)
    with opened(Run(config.output_dir, config.seed, config.loop)) as run:
        check_push(config, run)
        images = CaptionedImages(checked_source(config.data), config.data)
        recipe = recipe_of(config, run, images)
        recipe.rehearse()
        dataset = recipe.dataset()
        if config.doctor:
            return report(recipe.findings(dataset), run.folder, recipe.card.sheets)

        record = run_record(config, images, recipe.step, run.precision)
        loop = Loop(recipe.step, config.optim, config.loop, run, len(dataset) / config.data.batch_size)
        loop.resume(record, config.allow_config_change)
        if not loop.done:
            save_config(config, run.folder / "config.yaml")
        folder = ModelFolder(config, run, loop, recipe.save, recipe.card, recipe.step.networks, recipe.parts)
        alarms = Alarms(run, loop.progress, config.optim, len(dataset), recipe.step.not_finite_at)
        run.watch = alarms
        alarms.say_all(recipe.alarms(dataset))
        loop.fit(
            partial(training_batches, dataset), *recipe.events(loop), (config.push_every_steps, folder.push_meanwhile)
        )
        folder.finish()
