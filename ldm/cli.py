"""The ``ldm`` command: acts on model folders and data."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import AutoTokenizer

from ldm.config import DataConfig, TextConfig
from ldm.data.batches import CaptionedImages
from ldm.data.inspection import CountTokens, Report, inspect, place
from ldm.data.pixels import to_pixel_values, to_uint8
from ldm.data.preflight import checked_source
from ldm.data.sources import Source, build_source, source_config
from ldm.data.splits import read_captions
from ldm.evaluation.baselines import ceiling, copy_baseline, shuffled_baseline
from ldm.evaluation.pictures import CELL_WIDTH, comparison_sheet, contact_sheet
from ldm.evaluation.retrieval import report, retrieval_ranks
from ldm.models.autoencoder import downsampling_factor
from ldm.models.text_encoder import resolve, train_tokenizer
from ldm.provenance import read_provenance, refuse_leak
from ldm.training.autoencoding import reconstruct
from ldm.training.validation import sample_pictures

SHEET_PICTURES = 24
SHEET_PROBLEMS = 4
"""Of each kind."""
LEARNED_FROM = 2000
"""Captions that the tokenizer of `validate` is learned from at most: its counts are an estimate."""


def load_pipeline(model: str, trust_remote_code: bool) -> Any:
    """Return the pipeline in folder or Hub repository `model`.

    As the stock class that ``model_index.json`` names, or with `trust_remote_code` as the folder's own
    ``pipeline.py``, which runs code that came with the model.
    """
    own = {"custom_pipeline": model, "trust_remote_code": True} if trust_remote_code else {}
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True, low_cpu_mem_usage=False, **own)
    pipeline.set_progress_bar_config(leave=False)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def sample(
    prompts: Sequence[str],
    model: str,
    out: str = ".",
    negative_prompt: str = "",
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write one PNG per prompt and return their paths; prompt, seed and settings stand in its text chunk.

    Args:
        prompts: What to draw, one picture each.
        model: Folder or Hub name of a pipeline.
        out: Folder for the pictures.
        negative_prompt: What to steer away from.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        trust_remote_code: Run the pipeline code that came with the model.

    """
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    pipeline = load_pipeline(model, trust_remote_code)
    written = []
    for number, prompt in enumerate(prompts):
        draw = torch.Generator().manual_seed(seed + number)
        picture = pipeline(prompt, negative_prompt=negative_prompt or None, generator=draw, **settings).images[0]
        text = PngInfo()
        described = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed + number, **settings}
        for key, value in described.items():
            text.add_itxt(key, str(value))
        path = Path(out) / f"{slug(prompt)}-{seed + number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, pnginfo=text)
        print(path)
        written.append(path)
    return written


def evaluate(
    model: str,
    data: str,
    captions: str,
    out: str,
    validation_captions: str | None = None,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Sample held-out captions, measure retrieval beside its baselines, write ``retrieval.json`` and ``samples.png``.

    Args:
        model: Folder or Hub name of a pipeline.
        data: What `validate` takes; what cannot be read is left out.
        captions: File of captions, a line each, whose pictures the model has not seen.
        out: Folder for the results.
        validation_captions: File of the validation captions, which the model was not trained on either.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        trust_remote_code: Run the pipeline code that came with the model.

    """
    pipeline = load_pipeline(model, trust_remote_code)
    image_size = pipeline.unet.config.sample_size * downsampling_factor(pipeline.vae)
    held_out = {"test": captions} | ({"validation": validation_captions} if validation_captions else {})
    config = source_config(data, image_size=image_size, held_out=held_out, on_bad_data="skip")
    images = CaptionedImages(checked_source(config), config)
    refuse_leak(model, images.splits.held_out_hash)
    wanted = read_captions(captions)
    settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    generated = sample_pictures(pipeline, wanted, seed, **settings)
    gallery, place = images.gallery()
    own_index = np.array([place[picture] for picture in images.pictures_of(wanted)])
    provenance = read_provenance(model)
    results = {
        **asdict(report(retrieval_ranks(generated, gallery, own_index))),
        **_baselines(images, pipeline.vae, wanted, generated),
        "images_per_second": provenance.images_per_second if provenance else None,
        "train_seconds": provenance.train_seconds if provenance else None,
        "seed": seed,
        **settings,
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "retrieval.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    shown = slice(0, SHEET_PICTURES)
    comparison_sheet(wanted[shown], generated[shown], gallery[own_index[shown]]).save(folder / "samples.png")
    print(json.dumps(results, indent=2))
    return results


def _baselines(
    images: CaptionedImages, vae: AutoencoderKL, wanted: Sequence[str], generated: NDArray[np.uint8]
) -> dict[str, Any]:
    """Return what a perfect denoiser, a copier of training pictures and a shuffler of captions reach."""
    gallery, place = images.gallery()
    own_index = np.array([place[picture] for picture in images.pictures_of(wanted)])
    known = [(place[p], caption) for p in images.splits["train"] for caption in images.source.captions(p)]
    training_index, training_captions = np.array([index for index, _ in known]), [caption for _, caption in known]

    def rebuild(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
        pixel_values = torch.stack([to_pixel_values(Image.fromarray(picture)) for picture in pictures])
        return to_uint8(reconstruct(vae, pixel_values)).numpy()

    return {
        "ceiling": asdict(ceiling(rebuild, gallery, own_index)),
        "copy": asdict(copy_baseline(wanted, own_index, training_captions, training_index, gallery)),
        "shuffled": asdict(shuffled_baseline(generated, gallery, own_index)),
    }


def validate(
    data: str,
    out: str = "out/validation",
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    image_size: int = 64,
    background: str = "white",
    held_out: dict[str, str] | None = None,
    held_out_percent: float = 2.0,
    tokenizer: str | None = None,
    max_length: int = 77,
    workers: int | None = None,
) -> Report:
    """Look at every picture and caption; print what is wrong, write ``validation.json`` and ``contact_sheet.png``.

    Args:
        data: A folder of pictures with a metadata file, Parquet, a saved or named data set, or "openmoji".
        out: Folder for the results.
        split: As data.split of a training.
        image_column: As data.image_column.
        caption_column: As data.caption_column.
        image_size: Pictures of fewer pixels on a side are counted.
        background: As data.background.
        held_out: As data.held_out.
        held_out_percent: As data.held_out_percent.
        tokenizer: Folder of a tokenizer or of a model with one; none: one is learned from the captions.
        max_length: Tokens a caption may have, as conditioners.text.max_length.
        workers: Processes that decode; none: one a core.

    """
    columns = {"split": split, "image_column": image_column, "caption_column": caption_column}
    held = {"held_out": held_out or {}, "held_out_percent": held_out_percent}
    config = source_config(data, image_size=image_size, background=background, **columns, **held)
    source = build_source(config)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    report = inspect(source, config, _token_counter(tokenizer, max_length), max_length, workers)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "validation.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    _problem_sheet(report, source, config).save(folder / "contact_sheet.png")
    print(report.text())
    return report


def _token_counter(tokenizer: str | None, max_length: int) -> CountTokens:
    """Return what counts the tokens of captions, with the tokenizer in a folder or one learned from them."""

    def count(captions: Sequence[str]) -> list[int]:
        if tokenizer is None:
            some = captions[:: 1 + len(captions) // LEARNED_FROM]
            chosen = train_tokenizer(some, TextConfig.vocab_size, max_length)
        else:
            folder = resolve(tokenizer)
            below = f"{folder}/tokenizer"
            chosen = AutoTokenizer.from_pretrained(below if Path(below).is_dir() else folder)
        return [len(tokens) for tokens in chosen(list(captions), verbose=False)["input_ids"]]

    return count


def _problem_sheet(report: Report, source: Source, config: DataConfig) -> Image.Image:
    """Return a sheet of some good pictures and of some problems of each kind; grey: no picture can be shown."""
    images = CaptionedImages(source, replace(config, image_size=CELL_WIDTH))
    cells: list[tuple[int | None, str]] = [
        (row, f"{place(source, row)}: {' / '.join(source.captions(row))}") for row in report.examples
    ]
    for kind in dict.fromkeys(problem.kind for problem in report.problems):
        for problem in [problem for problem in report.problems if problem.kind == kind][:SHEET_PROBLEMS]:
            if problem.like is not None:
                cells.append((problem.like, place(source, problem.like)))
            cells.append((problem.row, str(problem)))

    def picture(row: int | None) -> NDArray[np.uint8]:
        try:
            if row is not None:
                return np.asarray(images.image(row))
        except (ValueError, OSError):
            pass
        return np.full((CELL_WIDTH, CELL_WIDTH, 3), 224, np.uint8)

    captions = [text.encode(errors="backslashreplace").decode() for _, text in cells]  # a file name may be any bytes
    return contact_sheet(captions, np.stack([picture(row) for row, _ in cells]))


def slug(text: str) -> str:
    """Return a file name of at most 80 characters of ``a-z0-9._-`` that reminds of the text."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9._]+", "-", plain).strip("-.")[:80] or "picture"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = ArgumentParser(prog="ldm", description=__doc__)
    commands = parser.add_subcommands(required=True)
    sampling = ArgumentParser(description="Draw pictures from prompts.")
    sampling.add_argument("prompts", nargs="+", help="what to draw, one picture each")
    sampling.add_function_arguments(sample, skip={"prompts"}, as_positional=False)
    commands.add_subcommand("sample", sampling)
    evaluating = ArgumentParser(description="Measure a model on held-out captions.")
    evaluating.add_argument("model", help="folder or Hub name of a pipeline")
    evaluating.add_function_arguments(evaluate, skip={"model"}, as_positional=False)
    commands.add_subcommand("evaluate", evaluating)
    validating = ArgumentParser(description="Look at every picture and caption; exit code 1: a training would stop.")
    validating.add_argument("data", help="a folder of pictures, Parquet, a data set, or openmoji")
    validating.add_function_arguments(validate, skip={"data"}, as_positional=False)
    commands.add_subcommand("validate", validating)
    chosen = parser.parse_args(argv)
    arguments = chosen[chosen.subcommand].as_dict()
    if chosen.subcommand == "sample":
        sample(**arguments)
    elif chosen.subcommand == "evaluate":
        evaluate(**arguments)
    elif validate(**arguments).stops:
        sys.exit(1)
