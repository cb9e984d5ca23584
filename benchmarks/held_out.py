"""A joined pipeline on the held-out images of OpenMoji: what the benchmarks of systems share."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.measure import Measure
from ldm.machine import cores, hardware
from ldm.models.vision import Images

LISTS = {"test": "configs/openmoji/heldout.txt", "validation": "configs/openmoji/validation.txt"}
H = TypeVar("H", bound="Held")


class Held:
    """The pipeline, and the held-out images with their captions."""

    def __init__(self, model: str, validation: bool = False):
        """Take the validation list in place of the held-out one, to choose by it, if asked to."""
        lists = dict(zip(LISTS, reversed(LISTS.values()), strict=True)) if validation else LISTS
        self.evaluation = Evaluation(model, "openmoji", {}, lists, "efficientnet_lite0", trust_remote_code=True)
        self.pipeline, self.captions = self.evaluation.pipeline, self.evaluation.captions
        self.gallery, self.place = self.evaluation.gallery, self.evaluation.place
        self.own = np.array([self.place[row] for row in self.evaluation.rows])
        self.true: Images = self.gallery[self.own]


Parts = Mapping[str, Callable[[H], Iterator[tuple[str, Measure]]]]
"""What can be measured, by name: each yields measures with their names."""


def parser_of(description: str | None, pipeline: str, parts: Parts[H]) -> ArgumentParser:
    """Return the parser of a benchmark's arguments; `pipeline` says of which pipeline the model's folder is."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"folder of {pipeline}")
    parser.add_argument("out", type=Path, help="file for the numbers")
    parser.add_argument("--parts", default=",".join(parts), help="what to measure")
    parser.add_argument("--validation", action="store_true", help="measure on the validation list, to choose by it")
    return parser


def measured(held: H, parts: Parts[H], arguments: Namespace) -> dict[str, Measure]:
    """Return the measures of the parts that were asked for; they are printed, and written after each."""
    torch.set_num_threads(cores())
    numbers: dict[str, Measure] = {}
    for part in filter(None, arguments.parts.split(",")):
        for name, measure in parts[part](held):
            print(f"{name}: {measure}", flush=True)
            numbers[name] = measure
            found = {"hardware": hardware(), "numbers": {key: asdict(one) for key, one in numbers.items()}}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return numbers
