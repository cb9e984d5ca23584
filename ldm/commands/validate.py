"""``ldm validate``: the problems of a data set's images and captions, as text, JSON and a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.config import DataConfig, DataOptions
from ldm.config.check import checked
from ldm.config.conditioners import TextConfig
from ldm.config.places import made_folder
from ldm.data.batches import CaptionedImages
from ldm.data.inspection import CountTokens, Inspection, inspect
from ldm.data.items import Source
from ldm.data.preflight import place
from ldm.data.sources import build_source, source_config
from ldm.errors import explained
from ldm.evaluation.images import CELL_WIDTH, contact_sheet
from ldm.machine import cores
from ldm.models.foreign import own_code_refused
from ldm.models.text_encoder import load_tokenizer, train_tokenizer

SHEET_PROBLEMS = 4
"""Problems of each kind on the sheet."""
SHEET_LIKE = 5
"""Images that are shown beside the one that repeats them or looks like them."""


def validate(
    data: str,
    out: str = "out/validation",
    image_size: int = 64,
    tokenizer: str | None = None,
    max_length: int = 77,
    workers: int | None = None,
    **options: Unpack[DataOptions],
) -> Inspection:
    """Check every image and caption; print the problems, write ``validation.json`` and ``contact_sheet.png``.

    Args:
        data: A folder of images with a metadata file, Parquet, a saved or named data set, openmoji or openmoji_clips.
        out: Folder for the results.
        image_size: Images of fewer pixels on a side are counted.
        tokenizer: Folder of a tokenizer or of a model with one; none: one is learned from the captions.
        max_length: Greatest number of tokens of a caption, as conditioners.text.max_length.
        workers: Processes that decode images; none: one for each core.
        options: Fields of data, as in a training's config.

    """
    config = checked(source_config(data, image_size=image_size, **options), "data")
    source = build_source(config)
    workers = cores() if workers is None else workers
    inspection = inspect(source, config, token_counter(tokenizer, max_length), max_length, workers)
    folder = made_folder(out)
    (folder / "validation.json").write_text(json.dumps(inspection.as_json(), indent=2) + "\n", encoding="utf-8")
    _problem_sheet(inspection, source, config).save(folder / "contact_sheet.png")
    print(inspection.text())
    return inspection


def token_counter(tokenizer: str | None, max_length: int) -> CountTokens:
    """Return a function that counts the tokens of captions, with the tokenizer in a folder or one trained on them."""

    def count(captions: Sequence[str]) -> list[int]:
        if tokenizer is None:
            chosen = train_tokenizer(captions, TextConfig.vocab_size, max_length)
        else:
            with explained(f"--tokenizer {tokenizer}"), own_code_refused("--tokenizer", tokenizer):
                chosen = load_tokenizer(tokenizer)
        return [len(tokens) for tokens in chosen(list(captions), verbose=False)["input_ids"]]

    return count


def _problem_sheet(inspection: Inspection, source: Source, config: DataConfig) -> Image.Image:
    """Return a sheet of some good images and some problems of each kind; grey cells are images that cannot be shown."""
    images = CaptionedImages(source, replace(config, image_size=CELL_WIDTH))
    cells: list[tuple[int | None, str]] = [
        (row, f"{place(source, row)}: {' / '.join(source.captions(row))}") for row in inspection.examples
    ]
    for kind in dict.fromkeys(problem.kind for problem in inspection.problems):
        for problem in [problem for problem in inspection.problems if problem.kind == kind][:SHEET_PROBLEMS]:
            cells.append((problem.row, str(problem)))
            cells += [(row, place(source, row)) for row in problem.like[:SHEET_LIKE]]

    def shown(row: int | None) -> NDArray[np.uint8]:
        try:
            if row is not None:
                return np.asarray(images.image(row))
        except (ValueError, OSError):
            pass
        return np.full((CELL_WIDTH, CELL_WIDTH, 3), 224, np.uint8)

    captions = [text.encode(errors="backslashreplace").decode() for _, text in cells]  # a file name may be any bytes
    return contact_sheet(captions, np.stack([shown(row) for row, _ in cells]))
