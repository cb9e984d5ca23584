"""``ldm evaluate``: how good a pipeline is on images that it has never seen, and what that has to be read beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Unpack

from accelerate import PartialState

from ldm.config import DataOptions
from ldm.config.places import made_folder
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.markdown import markdown
from ldm.evaluation.page import html
from ldm.evaluation.report import Report
from ldm.export.evaluation_card import merge_into_card

VARIETY_SEED = 2**20
"""Above the seeds of the captions."""


def evaluate(
    model: str,
    data: str | None = None,
    out: str = "out/evaluation",
    captions: str | None = None,
    validation_captions: str | None = None,
    classes: str | None = None,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    network: str = "efficientnet_lite0",
    clip: str | None = None,
    factors: str | None = None,
    variety_prompts: int = 12,
    num_images_per_prompt: int = 8,
    guidance_sweep: str | None = None,
    steps_sweep: str | None = None,
    bound_timesteps: int = 0,
    card: bool = True,
    trust_remote_code: bool = False,
    **options: Unpack[DataOptions],
) -> Report:
    """Draw what is held out, measure, write ``report.json``, ``report.md``, ``report.html`` and ``samples.png``.

    The data are read as the model's training read them, by its ``training.json``, unless `options` say otherwise.

    Args:
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        data: What `validate` takes; what cannot be read is left out. None: openmoji, if the model was trained on that.
        out: Folder for the results.
        captions: File of captions, a line each, whose images the model has not seen: held_out.test. None: as its
            training held them out, by a file or by hash.
        validation_captions: File of the validation captions, which the model was not trained on either:
            held_out.validation.
        classes: Those to draw and tell apart, such as 0,3,5; none: all of class_column.
        seed: Seed of the first image; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none. Left out: 3, if the pipeline has guidance.
        network: What measures: efficientnet_lite0, inception, or a vision model's folder or Hub name (CLIP, DINOv2).
        clip: Folder or Hub name of a CLIP, for the CLIP score; none: not measured.
        factors: YAML or JSON file of the words that captions are composed of, by factor; none: not measured.
        variety_prompts: The first captions, of which several images are drawn, 2 or more; 0: not measured.
        num_images_per_prompt: How many of each, and of each class, 2 or more.
        guidance_sweep: Guidance scales to draw the validation captions with, such as 1,1.25,1.5,2.
        steps_sweep: Numbers of steps to draw the validation captions with, such as 5,10,25,50.
        bound_timesteps: Of a model of pixels, timesteps of the bound of each image, for bits per dimension; 0: none.
        card: Put the results into the model's README.md, if the model is a folder that has one.
        trust_remote_code: Run the pipeline code that came with the model.
        options: As the fields of data of a training.

    """
    sweeps = _sweeps(guidance_sweep, steps_sweep)
    named = named_captions(captions, validation_captions)
    measuring = Evaluation(model, data, options, named, network, trust_remote_code)
    chosen = None if classes is None else [int(number) for number in numbers("classes", classes)]
    measuring.check(variety_prompts, chosen, num_images_per_prompt, bound_timesteps, sweeps)
    made_folder(out)
    call = measuring.call(num_inference_steps, guidance_scale)
    parts = measuring.sections(seed, clip, factors, **call)
    parts += measuring.repeated(variety_prompts, chosen, num_images_per_prompt, seed + VARIETY_SEED, **call)
    parts += [measuring.bound(bound_timesteps, seed)] if bound_timesteps else []
    parts += measuring.sweeps(sweeps, seed, **call)
    return write(measuring.report(parts, seed, call), Path(out), Path(model) if card else None)


def _sweeps(guidance: str | None, steps: str | None) -> dict[str, list[float]]:
    """Return the values of each setting that is swept."""
    texts = {"guidance_scale": guidance, "num_inference_steps": steps}
    return {setting: numbers(setting, text) for setting, text in texts.items() if text is not None}


def named_captions(test: str | None, validation: str | None) -> dict[str, str]:
    """Return the files of captions that are named, by split."""
    return {split: file for split, file in {"test": test, "validation": validation}.items() if file is not None}


def numbers(where: str, text: str) -> list[float]:
    """Return the numbers in a text, separated by commas, whole ones as int; ValueError, which names `where`."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{where}: got {text!r}; expected numbers separated by commas, such as 1,2,5") from None
    return [int(number) if number.is_integer() else number for number in found]


def write(report: Report, folder: Path, model: Path | None) -> Report:
    """Write a report into `folder` and, where `model` is the folder of a model with a card, into that; return it."""
    if not PartialState().is_main_process:
        return report
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    sheet = report.sections[0].figures[0].image
    sheet.save(folder / "samples.png")
    if model is not None and model.is_dir():
        merge_into_card(model, report)
    for row in report.headlines:
        print(f"{row.name}: {row.measure}{'; a copier reaches this' if row.copied else ''}")
    print(f"the whole report: {folder / 'report.html'}")
    return report
