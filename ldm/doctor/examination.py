"""The doctor: before a long run, check that the config can learn, and measure its cost. No weights are kept."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline

from ldm.config import AutoencoderConfig, ClipConfig, RunConfig, StageConfig
from ldm.data.batches import PositionDataset, fixed_batch
from ldm.doctor.agreement import agreement
from ldm.doctor.cost import Cost, measure_cost
from ldm.doctor.findings import Finding
from ldm.doctor.forecast import forecast
from ldm.doctor.latents import round_trip, unit_scale
from ldm.doctor.overfit import Overfit, fixed_draws, mean_loss, overfit, restored
from ldm.doctor.plan import Plan
from ldm.export.kinds import PipelineKind
from ldm.models.autoencoder import reconstruct
from ldm.models.quiet import quietly
from ldm.spaces import time_last
from ldm.training.alarms import SCALE, cut_captions, faults_before
from ldm.training.autoencoding import reconstruction_sheet
from ldm.training.contrastive import ContrastiveStep, ContrastiveValidation
from ldm.training.progress import planned_steps
from ldm.training.steps import AutoencoderStep, DiffusionStep
from ldm.training.validation import Validation

log = logging.getLogger(__name__)
C = TypeVar("C", bound=RunConfig)

BATCH = 8
"""Number of images that are learned by heart."""
LEFT = 0.6
"""Greatest share of the starting loss that may be left: a denoiser's loss, or an autoencoder's squared error."""
LEFT_PRETRAINED = 0.95
"""As `LEFT`, for pretrained weights, whose starting loss is low."""
LEFT_FEW, ENOUGH_STEPS = 0.995, 50
"""As `LEFT`, if a slow machine has time for fewer than `ENOUGH_STEPS` steps: the loss only has to fall."""
ROUND_TRIP_IMAGES = 64
SCALE_IMAGES = 256
LEVEL_TOLERANCE = 1
"""Greatest difference of an image that a reloaded pipeline samples, in levels of 255."""


def examined(config: C) -> C:
    """Return `config` for an examination: its folder is ``OUTPUT_DIR/doctor``, which is emptied, and nothing is pushed.

    Raises:
        SystemExit: there are several processes.

    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit("doctor: runs in one process only; start it without a launcher of several")
    folder = Path(config.output_dir) / "doctor"
    shutil.rmtree(folder, ignore_errors=True)
    return replace(
        config,
        output_dir=str(folder),
        push_to_hub=None,
        push_every_steps=None,
        push_private=False,
        loop=replace(config.loop, trackers=()),
    )


def stage_findings(
    config: StageConfig, kind: PipelineKind, step: DiffusionStep, validation: Validation, train: PositionDataset
) -> Iterator[Finding]:
    """Yield the findings on a diffusion stage: latents, scheduler, conditions, learning, cost, saving."""
    space, images, folder = step.stage.space, train.images, step.run.folder
    if space.networks:  # pixels are as they are
        yield unit_scale(step, fixed_batch(train, SCALE_IMAGES))
    if space.networks and space.images:
        yield round_trip(space, images.first_images("validation", ROUND_TRIP_IMAGES), folder)
    pipeline: Any = validation.pipeline
    yield agreement(step.stage.objective, pipeline.scheduler, config.validation.num_inference_steps)
    yield conditions(config, validation, train)
    with restored(step):
        log.info("learning %d images by heart", BATCH)
        yield stage_overfit(config, step, train, validation)
    log.info("measuring steps, a validation and a checkpoint")
    cost = measure_cost(step, train, config.optim, step.run, partial(validation, 0))
    yield same_sample(config, kind, validation, train, folder)
    yield from cost_findings(config, cost, len(train))


def autoencoder_findings(
    config: AutoencoderConfig, step: AutoencoderStep, validate: Callable[[int], None], train: PositionDataset
) -> Iterator[Finding]:
    """Yield the findings on an autoencoder: learning, plan and cost, with the discriminator from the first step."""
    step.config = replace(step.config, discriminator_start_step=0)
    with restored(step):
        log.info("learning %d images by heart", BATCH)
        yield autoencoder_overfit(config, step, train)
    log.info("measuring steps, a validation and a checkpoint")
    cost = measure_cost(step, train, config.optim, step.run, partial(validate, 0))
    yield from cost_findings(config, cost, len(train))


def clip_findings(
    config: ClipConfig, step: ContrastiveStep, validation: ContrastiveValidation, train: PositionDataset
) -> Iterator[Finding]:
    """Yield the findings on a CLIP: captions that are cut, learning, plan and cost."""
    cut = validation.truncation
    said = [sentence for _, sentence in cut_captions(cut, "clip.max_length")]
    text = f"{cut.captions:.1%} of the training captions and {cut.tokens:.1%} of their tokens are cut off"
    yield Finding("captions", not said, "; ".join([text, *said]))
    batch = fixed_batch(train, BATCH)

    def loss() -> float:
        with torch.no_grad():
            return float(step.losses(batch, 0)["clip"])

    with restored(step):
        log.info("learning %d images by heart", BATCH)
        found = overfit(step, batch, config.optim, step.run, loss)
        yield overfit_finding(config, found, f"loss on {BATCH} images", config.clip.pretrained is not None)
    log.info("measuring steps, a validation and a checkpoint")
    cost = measure_cost(step, train, config.optim, step.run, partial(validation, 0))
    yield from cost_findings(config, cost, len(train))


def conditions(config: StageConfig, validation: Validation, train: PositionDataset) -> Finding:
    """Return the finding on the conditions: the null condition of guidance, and the share of captions that is cut off.

    It repeats the alarms of a training, except that on the scale of the latents, which has its own finding.
    """
    said = [f"{name}: {sentence}" for name, sentence in faults_before(config, validation, train) if name != SCALE]
    cut = validation.truncation
    text = f"{cut.captions:.1%} of the training captions and {cut.tokens:.1%} of their tokens are cut off"
    return Finding("conditions", not said, "; ".join([text, *said]))


def stage_overfit(config: StageConfig, step: DiffusionStep, train: PositionDataset, validation: Validation) -> Finding:
    """Return the finding on whether the denoiser learns a few images by heart; write samples of them as overfit.png."""
    batch = fixed_batch(train, BATCH)
    draws = fixed_draws(batch)
    found = overfit(step, batch, config.optim, step.run, lambda: mean_loss(step, draws))
    try:
        sampled = validation.sample(batch.rows, guidance_scale=1.0)
    except FloatingPointError as error:
        log.warning("no sample of the learned images: %s", error)
    else:
        validation.sheet(batch.rows, sampled).save(step.run.folder / "overfit.png")
    return overfit_finding(config, found, f"loss on {len(batch)} images", "pretrained" in config.denoiser)


def autoencoder_overfit(config: AutoencoderConfig, step: AutoencoderStep, train: PositionDataset) -> Finding:
    """Return the finding on whether the autoencoder learns a few images; write reconstructions as overfit.png."""
    batch = fixed_batch(train, BATCH)
    module = step.modules["autoencoder"]
    if batch.pixel_values is None:
        raise ValueError("got cached latents; an autoencoder is examined on images")
    pixel_values = time_last(batch.pixel_values)

    def squared_error() -> float:
        return float((reconstruct(module.autoencoder, pixel_values) - pixel_values).square().mean())

    found = overfit(step, batch, config.optim, step.run, squared_error)
    rebuilt = reconstruct(module.autoencoder, pixel_values).nan_to_num()
    reconstruction_sheet(pixel_values, rebuilt).save(step.run.folder / "overfit.png")
    what = f"squared error of {len(batch)} images"
    return overfit_finding(config, found, what, "pretrained" in config.autoencoder)


def overfit_finding(config: RunConfig, found: Overfit, what: str, pretrained: bool) -> Finding:
    """Return the finding of an overfit; `what` names the quantity and `pretrained` chooses the limit."""
    most = LEFT_FEW if found.steps < ENOUGH_STEPS else LEFT_PRETRAINED if pretrained else LEFT
    ok = found.left < most  # NaN is not
    rate, steps = config.optim.learning_rate, found.steps
    text = (
        f"{what} goes from {found.start:.4g} to {found.end:.4g} in {steps} steps at learning rate {rate:g}, "
        f"{found.left:.2f} of the start"
    )
    rose = not found.left <= 1.01
    advice = "a lower optim.learning_rate" if rose else "a higher optim.learning_rate, or a larger network"
    return Finding("overfits one batch", ok, text if ok else f"{text}; expected less than {most:g}: try {advice}")


def same_sample(
    config: StageConfig, kind: PipelineKind, validation: Validation, train: PositionDataset, folder: Path
) -> Finding:
    """Return the finding on whether the pipeline, saved and reloaded, samples the same image of a caption.

    It is loaded by diffusers' own class if that makes the same images, else by ours. A pipeline that cannot be loaded
    is wrong too.
    """
    pipeline = validation.pipeline
    loader = DiffusionPipeline if kind.stock_images(config) == "same" else type(pipeline)
    rows, steps = fixed_batch(train, 1).rows, min(config.validation.num_inference_steps, 10)
    # PixArt's stock pipeline turns captions into lower case
    asked = [one.lower().strip() if isinstance(one, str) else one for one in validation.asked(rows)]

    # a network of our own is loaded from the source that was saved with it just now
    own_code = any(hasattr(component, "_source") for component in pipeline.components.values())
    name = "saved and reloaded"
    with tempfile.TemporaryDirectory(dir=folder) as place, quietly():
        pipeline.save_pretrained(place)
        (Path(place) / "pipeline.py").unlink(missing_ok=True)  # the class is here: no saved code is run
        try:
            loaded = loader.from_pretrained(place, use_safetensors=True, trust_remote_code=own_code).to(pipeline.device)
        except Exception as error:  # libraries raise every kind
            return Finding(name, False, f"{loader.__name__} cannot load what was saved: {error}")
    loaded.set_progress_bar_config(disable=True)
    # the stock super-resolution of IF has another level by default; a call that takes none is not given one
    call = {"num_inference_steps": steps, "noise_level": 0}
    one, other = (validation.sample(rows, of, asked, **call) for of in (pipeline, loaded))
    levels = math.ceil(validation.samples.difference(one, other))
    how = "exactly the sample" if levels == 0 else f"within {levels} of 255 levels the sample"
    text = f"{type(loaded).__name__}.from_pretrained makes {how} of the pipeline in memory, same caption and seed"
    remedy = f"; at most {LEVEL_TOLERANCE} is expected: a component was saved with other weights or another config"
    return Finding(name, levels <= LEVEL_TOLERANCE, text + ("" if levels <= LEVEL_TOLERANCE else remedy))


def cost_findings(config: RunConfig, cost: Cost, images: int) -> Iterator[Finding]:
    """Yield the findings on the plan, on the cost here, and on the machine that ``doctor`` describes."""
    steps = planned_steps(config.loop, images / config.data.batch_size)
    if config.loop.max_train_seconds is not None:
        steps = cost.steps(config.loop.max_train_seconds)
    plan = Plan(images, config.data.batch_size, steps or 1, config.loop, config.optim)
    faults = list(plan.faults())
    yield Finding("plan", not faults, "; ".join([plan.text(), *faults]), tuple(plan.oddities()))
    other = config.doctor
    price = other.price_per_hour if other is not None and other.gpu_tflops is None else None
    fault = cost.memory_fault()
    numbers = {"steps": plan.steps, "step_seconds": cost.step_seconds, "seconds": cost.seconds(plan)}
    numbers |= {
        "step_flops": cost.step_flops,
        "step_operations": cost.step_operations,
        "memory_bytes": cost.memory.total,
    }
    text = "; ".join(filter(None, [cost.text(plan, price), fault]))
    yield Finding("cost", fault is None, text, numbers=numbers)
    if other is not None and (other.gpu_tflops is not None or other.gpu_memory_gib is not None):
        there = forecast(cost, plan, other)
        its_numbers = {"step_seconds": there.step_seconds, "hours": there.hours}
        numbers = {name: number for name, number in its_numbers.items() if number is not None}
        yield Finding("another machine", there.fits is not False, there.text, numbers=numbers)
