"""Alarms: plain sentences on what a training does wrong. Each is said once, as early as it is certain.

An alarm stops nothing. What another alarm explains is not said: a learning rate of 0 leaves the text unused, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ldm.config import OptimConfig, StageConfig
from ldm.data.batches import PositionDataset
from ldm.training.checks import Truncation, null_difference
from ldm.training.progress import Progress, expected_steps
from ldm.training.run import Run
from ldm.training.validation import Validation

SCALE = "latents are not of unit scale"
NULL = "guidance starts from a prompt that is not trained"
CUT = "captions are cut"
RATE = "the learning rate is 0"
WARMUP = "the warm-up is longer than the training"
STILL = "the denoiser stands still"
NOT_FINITE = "losses are not finite"
TEXT = "text is not used"
EXCUSES = {SCALE, CUT, RATE, WARMUP, STILL, NOT_FINITE}
"""Alarms that by themselves explain a text that is not used."""
MAX_NULL_DIFFERENCE = 1e-3
"""rms over rms: above rounding."""
MAX_HALF_NULL_DIFFERENCE = 0.03
"""The same of a text encoder in bfloat16."""
MAX_CUT_TOKENS = 0.25
LEAST_RATE = 0.1
"""Share of ``optim.learning_rate`` that a warm-up must reach before the training ends."""
SKIPPED, SKIPPED_SHARE = 3, 0.01
"""Steps, and share of the steps so far, that may be skipped before it is said."""
LEARNED = 0.1
"""`explained_share` from which a model knows what latents look like, and can be asked what it reads."""
SMALL_GAIN = 0.02
"""Share of the loss: a text that is used is worth more, one that is not is worth 0."""
IMAGES, EPOCHS = (2_000, 100_000), 4
"""A text is given this many epochs to be used, but no fewer and no more images than these, ..."""
LEAST_SHARE = 0.1
"""... and this share of the training, and its warm-up."""
LoggedRow = Mapping[str, float]


class Alarms:
    """Reads every row of metrics that a run logs, and says what it shows to be wrong."""

    def __init__(
        self, run: Run, progress: Progress, optim: OptimConfig, epoch: int, not_finite_at: Callable[[], Sequence[float]]
    ):
        """Read the rows of `run`, as its `watch`; `epoch` is the number of its training images.

        For `not_finite_at` see `DiffusionStep`.
        """
        self.run, self.progress, self.optim, self.epoch, self.not_finite_at = run, progress, optim, epoch, not_finite_at
        self.said: set[str] = set()
        self._rate = math.inf
        self._unused = False
        self._skipped, self._finite_losses, self._levels = 0, True, list[float]()

    def say(self, name: str, sentence: str | None, global_step: int) -> None:
        """Log an alarm, unless there is nothing to say or it has been said."""
        if sentence is not None and name not in self.said:
            self.said.add(name)
            self.run.log_alarm(name, sentence, global_step)

    def say_all(self, alarms: Iterable[tuple[str, str]]) -> None:
        """Log alarms by name and sentence, as `say`, at the step reached."""
        for name, sentence in alarms:
            self.say(name, sentence, self.progress.global_step)

    def __call__(self, row: LoggedRow, global_step: int) -> None:
        """Say what a row shows together with those before it."""
        if "skipped_steps" in row:
            # with float16 gradients alone overflow while its scale is looked for
            if not row["finite_loss"] or self.run.accelerator.scaler is None:
                self._skipped += 1
                self._finite_losses &= bool(row["finite_loss"])
                self._levels += self.not_finite_at()
            if self._skipped >= max(SKIPPED, SKIPPED_SHARE * global_step):
                skipped = int(row["skipped_steps"])
                self.say(
                    NOT_FINITE,
                    skipped_sentence(skipped, global_step, self._finite_losses, self._levels),
                    global_step,
                )
        if "learning_rate" in row:
            rates = self._rate, row["learning_rate"]
            self.say(RATE, no_rate(rates, global_step), global_step)
            self.say(WARMUP, long_warmup(self.optim, self._steps), global_step)
            self.say(STILL, stands_still(row, global_step), global_step)
            self._rate = row["learning_rate"]
        if "conditional_gain/mean" in row:
            unused = self._has_seen_enough(global_step) and text_is_unused(row)
            if unused and self._unused and not self.said & EXCUSES:
                self.say(TEXT, _text_sentence(row, global_step, self.progress.images), global_step)
            self._unused = unused

    @property
    def _steps(self) -> int | None:
        return expected_steps(self.progress, self.run.config)

    def _has_seen_enough(self, global_step: int) -> bool:
        images, least_steps = self.progress.images, LEAST_SHARE * (self._steps or 0)
        least, most = IMAGES
        return images >= min(max(EPOCHS * self.epoch, least), most) and global_step >= max(
            self.optim.warmup_steps, least_steps
        )


def faults_before(config: StageConfig, validation: Validation, train: PositionDataset) -> Iterator[tuple[str, str]]:
    """Yield name and sentence of each alarm that shows before the first step."""
    scale, cut, guidance = validation.scale, validation.truncation, config.validation.guidance_scale
    if not scale.unit and validation.step.stage.space.networks:  # pixels are as they are
        yield (
            SCALE,
            f"mean {scale.mean:.2f} and std {scale.std:.2f} over the held-out images before step 1, where noise has "
            "0 and 1: noise levels are not what they are called, and samples come out grey or glaring; use an "
            "autoencoder that train_vae.py has finished, or one with the right scaling_factor in its config.json",
        )
    difference = null_difference(validation.step, validation.batch, validation.pipeline)
    text = config.conditioners.text
    most = MAX_NULL_DIFFERENCE if text is None or text.dtype != "bfloat16" else MAX_HALF_NULL_DIFFERENCE
    if difference is not None and difference > most:
        yield (
            NULL,
            f'what training shows for a dropped caption and what the pipeline makes of "" differ by {difference:.0%} '
            "of their size: guidance leads away from a prompt that the denoiser does not know; let both encode the "
            "same text",
        )
    asked, condition = validation.step.asked, validation.step.condition
    never = asked is not None and validation.step.stage.model.conditioner(asked).dropout == 0
    if never and validation.guided and guidance > 1 and condition.nothing not in validation.asked(train.rows):
        yield (
            NULL,
            f"conditioners.{asked}.dropout is 0, no image is without {condition.noun}, and validation.guidance_scale "
            f"is {guidance:g}: guidance leads away from the null, which the denoiser is never shown; set a dropout, "
            "0.1 is usual, or validation.guidance_scale to 1",
        )
    yield from cut_captions(cut, "conditioners.text.max_length")


def cut_captions(cut: Truncation, limit: str) -> Iterator[tuple[str, str]]:
    """Yield the alarm if too many tokens of the training captions are cut; `limit` names the field that decides it."""
    if cut.tokens > MAX_CUT_TOKENS:
        yield (
            CUT,
            f"{cut.captions:.0%} of the training captions are longer than the tokenizer's limit, and {cut.tokens:.0%} "
            f"of all tokens are cut off: the model never sees them; raise {limit} or shorten the captions (ldm "
            "validate counts their tokens)",
        )


def skipped_sentence(skipped: int, global_step: int, finite_losses: bool, levels: Sequence[float]) -> str:
    """Return the alarm of a training that has skipped steps.

    finite_losses: the losses of all of them were finite. levels: the noise levels at which they were not, as far as
    this process knows.
    """
    where, check = "the loss is not finite", "the images, optim.learning_rate and loop.mixed_precision"
    if finite_losses:
        where, check = "their losses are finite, their gradients are not", check.removeprefix("the images, ")
    elif levels:
        where += f" at noise levels from {min(levels):.2f} to {max(levels):.2f} (0: image, 1: noise)"
        check = f"objective (its weight at those levels), {check}"
    return f"{skipped:,} of {global_step:,} steps were skipped: {where}; what is skipped is not learned; check {check}"


def no_rate(rates: tuple[float, float], global_step: int) -> str | None:
    """Return the alarm if the last two `rates` logged are 0."""
    if rates != (0, 0):
        return None
    return (
        f"at step {global_step:,} and when it was logged last: steps go on and change nothing; check "
        "optim.warmup_steps, optim.decay and optim.final_fraction"
    )


def long_warmup(optim: OptimConfig, total_steps: int | None) -> str | None:
    """Return the alarm if the warm-up has hardly begun when the training of `total_steps` ends."""
    if total_steps is None or total_steps >= LEAST_RATE * optim.warmup_steps:
        return None
    return (
        f"training ends after {total_steps:,} of {optim.warmup_steps:,} steps of warm-up, at "
        f"{total_steps / optim.warmup_steps:.1%} of optim.learning_rate; lower optim.warmup_steps"
    )


def stands_still(row: LoggedRow, global_step: int) -> str | None:
    """Return the alarm if the row's step did not move the denoiser at all, though the learning rate is not 0."""
    moved = {name: value for name, value in row.items() if name.startswith("update_norm/")}
    if not row["learning_rate"] or moved.pop("update_norm/denoiser.denoiser", None) != 0:
        return None
    others = "while other parts moved" if any(moved.values()) else "and nothing else moved"
    return (
        f"step {global_step:,} changed none of its weights at a learning rate of {row['learning_rate']:.2g}, {others}; "
        "check that they require grad, that the optimiser holds them, and the learning rates of its groups"
    )


def text_is_unused(row: LoggedRow) -> bool:
    """Return whether a model that has learned gains nothing from captions, as far as the held-out images can tell.

    Nothing: not two standard errors, and with them still less than `SMALL_GAIN` of the loss.
    """
    gain, error = row["conditional_gain/mean"], row["conditional_gain/standard_error"]
    small = gain + 2 * error < SMALL_GAIN * row["validation/loss"]
    return row["explained_share"] > LEARNED and gain <= 2 * error and small


def _text_sentence(row: LoggedRow, global_step: int, images: int) -> str:
    gain, error = row["conditional_gain/mean"], row["conditional_gain/standard_error"]
    return (
        f"conditional gain {gain:.4f} +- {error:.4f} of a loss of {row['validation/loss']:.4f} after {global_step:,} "
        f"steps ({images:,} images): held-out images are denoised as well with captions of others; check that "
        "captions belong to their images, conditioners.text.dropout and the text encoder"
    )
