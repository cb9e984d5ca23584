"""``ldm evaluate_clip``: a report on a CLIP: held-out captions find their images, and images their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from ldm.commands.evaluate import named_captions, write
from ldm.config import DataOptions
from ldm.config.places import made_folder
from ldm.evaluation.clip import ClipEvaluation
from ldm.evaluation.report import Report


def evaluate_clip(
    model: str,
    data: str | None = None,
    out: str = "out/evaluation",
    captions: str | None = None,
    validation_captions: str | None = None,
    card: bool = True,
    **options: Unpack[DataOptions],
) -> Report:
    """Measure a CLIP on held-out captions; write ``report.json``, ``report.md``, ``report.html``, ``samples.png``.

    The data are read as the model's training read them, by its ``training.json``, unless `options` say otherwise.

    Args:
        model: Folder or Hub name of a CLIP; user/name@revision is a commit, branch or tag.
        data: Data, as in `validate`; unreadable images are left out. None: openmoji, if the model was trained on it.
        out: Folder for the results.
        captions: File of captions, a line each, whose images the model was not trained on: held_out.test. None: those
            that its training held out, by a file or by hash.
        validation_captions: File of the validation captions, which the model was not trained on either:
            held_out.validation.
        card: Put the results into the model's README.md, if the model is a folder that has one.
        options: Fields of data, as in a training's config.

    """
    measuring = ClipEvaluation(model, data, options, named_captions(captions, validation_captions))
    made_folder(out)
    return write(measuring.report(), Path(out), Path(model) if card else None)
