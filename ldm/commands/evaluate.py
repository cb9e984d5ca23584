"""``ldm evaluate``: a report on a pipeline's samples for held-out images, beside baselines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Unpack, cast

from accelerate import PartialState

from ldm.config import DataOptions
from ldm.config.places import made_folder
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.markdown import markdown
from ldm.evaluation.page import html
from ldm.evaluation.report import Report
from ldm.evaluation.summary import summary
from ldm.export.evaluation_card import merge_into_card

VARIETY_SEED = 2**20
"""Added to the seed for images of one prompt; larger than the number of captions."""


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
    """Sample the held-out captions, measure, write ``report.json``, ``report.md``, ``report.html``, ``samples.png``.

    The data are read as the model's training read them, by its ``training.json``, unless `options` say otherwise.

    Args:
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        data: Data, as in `validate`; unreadable images are left out. None: openmoji, if the model was trained on it.
        out: Folder for the results.
        captions: File of captions, a line each, whose images the model was not trained on: held_out.test. None: those
            that its training held out, by a file or by hash.
        validation_captions: File of the validation captions, which the model was not trained on either:
            held_out.validation.
        classes: Classes to sample and to judge, such as 0,3,5; none: all of class_column.
        seed: Seed of the first image; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance scale; 1 turns guidance off. Default: the pipeline's own, else 3, if it has guidance.
        network: Network of the features: efficientnet_lite0, inception, or a CLIP or DINOv2 by folder or Hub name.
        clip: Folder or Hub name of a CLIP, for the CLIP score; none: not measured.
        factors: YAML or JSON file of the words that captions are composed of, by factor; none: not measured.
        variety_prompts: Number of first captions that get several images each, 2 or more; 0: not measured.
        num_images_per_prompt: Images of each of these captions, and of each class, 2 or more.
        guidance_sweep: Guidance scales to sample the validation captions with, such as 1,1.25,1.5,2.
        steps_sweep: Numbers of steps to sample the validation captions with, such as 5,10,25,50.
        bound_timesteps: Timesteps per image for the bits per dimension of a model of pixels; 0: not measured.
        card: Put the results into the model's README.md, if the model is a folder that has one.
        trust_remote_code: Run the pipeline code that came with the model.
        options: Fields of data, as in a training's config.

    """
    sweeps = _sweeps(guidance_sweep, steps_sweep)
    named = named_captions(captions, validation_captions)
    chosen = None if classes is None else whole_numbers("classes", classes)
    measuring = Evaluation(model, data, options, named, network, trust_remote_code)
    measuring.check(variety_prompts, chosen, num_images_per_prompt, bound_timesteps, sweeps)
    further = measuring.further(factors, clip)
    call = measuring.call(num_inference_steps, guidance_scale)
    made_folder(out)
    parts = measuring.sections(seed, further, **call)
    parts += measuring.repeated(variety_prompts, chosen, num_images_per_prompt, seed + VARIETY_SEED, **call)
    parts += [measuring.bound(bound_timesteps, seed)] if bound_timesteps else []
    parts += measuring.sweeps(sweeps, seed, **call)
    return write(measuring.report(parts, seed, call), Path(out), Path(model) if card else None)


def _sweeps(guidance: str | None, steps: str | None) -> dict[str, list[float]]:
    """Return the values of each setting to sweep."""
    texts = {"guidance_scale": guidance, "num_inference_steps": steps}
    return {setting: numbers(setting, text) for setting, text in texts.items() if text is not None}


def named_captions(test: str | None, validation: str | None) -> dict[str, str]:
    """Return the given files of captions, by split."""
    return {split: file for split, file in {"test": test, "validation": validation}.items() if file is not None}


def numbers(where: str, text: str) -> list[float]:
    """Return the numbers in a text, separated by commas, whole ones as int; a ValueError names the option `where`."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{where}: got {text!r}; expected numbers separated by commas, such as 1,2,5") from None
    return [int(number) if number.is_integer() else number for number in found]


def whole_numbers(where: str, text: str) -> list[int]:
    """Return the whole numbers in a text, as `numbers`."""
    found = numbers(where, text)
    if wrong := [number for number in found if not isinstance(number, int)]:
        raise ValueError(f"{where}: got {wrong[0]}; expected whole numbers separated by commas, such as 0,3,5")
    return cast("list[int]", found)


def write(report: Report, folder: Path, model: Path | None) -> Report:
    """Write the report into `folder` and into the card of the folder `model`, if there is one; return the report."""
    if not PartialState().is_main_process:
        return report
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    sheet = report.sections[0].figures[0].image
    sheet.save(folder / "samples.png")
    if model is not None and model.is_dir():
        merge_into_card(model, report)
    print(f"\n{summary(report)}\n")
    print(f"images:           {folder / 'samples.png'}")
    print(f"the whole report: {folder / 'report.html'}")
    return report
