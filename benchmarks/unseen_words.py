"""Prompts of words that occur in no caption: how often a model draws what they mean.

python -m benchmarks.unseen_words out/imagen/openmoji/model OUT.json --against out/demo/model
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.held_out import LISTS
from ldm.evaluation.baselines import derangement
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.images import labelled_sheet
from ldm.evaluation.measure import Indices, Measure, bootstrap, mean_of
from ldm.evaluation.retrieval import RECALL_DRAWS, retrieval_ranks
from ldm.evaluation.sampling import sample_images
from ldm.machine import cores, hardware
from ldm.models.vision import Images

PROMPTS = {
    "test": Path("configs/openmoji/unseen_words.json"),
    "validation": Path("configs/openmoji/unseen_words_validation.json"),
}
"""Prompts with the caption of the image that each should find; settings are chosen on the second list."""

NEAREST = 5
SHOWN = 24


def seen_words(captions: Sequence[str]) -> set[str]:
    """Return the words of captions, in lower case."""
    return {word for caption in captions for word in re.findall("[a-z]+", caption.lower())}


class Prompts:
    """The prompts, and the places of the images that they should find among all distinct ones."""

    def __init__(self, evaluation: Evaluation, split: str):
        targets: dict[str, str] = json.loads(PROMPTS[split].read_text(encoding="utf-8"))
        self.prompts = [*targets]
        rows = evaluation.images.rows_of([*targets.values()])
        self.own: Indices = np.array([evaluation.place[row] for row in rows])
        self.gallery: Images = evaluation.gallery

    def ranks(self, pipeline: Any, seed: int, **call: Any) -> tuple[Images, Indices, Indices]:
        """Return an image of each prompt, the rank of what it should find, and that of what another one should."""
        drawn = sample_images(pipeline, self.prompts, seed, "prompt", **call)
        others = self.own[derangement(self.own)]
        return drawn, retrieval_ranks(drawn, self.gallery, self.own), retrieval_ranks(drawn, self.gallery, others)


def difference(one: Indices, other: Indices) -> Measure:
    """Return by how much more often the first ranks are among the `NEAREST`, paired by prompt."""
    hits = (one < NEAREST).astype(float) - (other < NEAREST)
    return bootstrap(lambda rows: float(hits[rows].mean()), len(hits), RECALL_DRAWS)


def main() -> None:
    """Sample, measure, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline of prompts")
    parser.add_argument("out", type=Path, help="file for the numbers")
    parser.add_argument("--against", help="folder of another pipeline, to be compared prompt by prompt")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the model")
    parser.add_argument("--other_guidance_scale", type=float, default=1.25, help="of the other one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="other words, to choose by them")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of the first images, none chosen")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    numbers: dict[str, Measure] = {}
    evaluation = Evaluation(arguments.model, "openmoji", {}, LISTS, "efficientnet_lite0", trust_remote_code=True)
    asked = Prompts(evaluation, "validation" if arguments.validation else "test")
    images, ranks, shuffled = asked.ranks(evaluation.pipeline, arguments.seed, guidance_scale=arguments.guidance_scale)
    numbers["R@1"], numbers["R@5"] = mean_of(ranks < 1, RECALL_DRAWS), mean_of(ranks < NEAREST, RECALL_DRAWS)
    numbers["R@5, shuffled prompts"] = mean_of(shuffled < NEAREST, RECALL_DRAWS)
    numbers["R@5, more than shuffled"] = difference(ranks, shuffled)
    rows = {"generated": images[:SHOWN], "meant": asked.gallery[asked.own[:SHOWN]]}
    if arguments.against is not None:
        pipeline = Evaluation(
            arguments.against, "openmoji", {}, LISTS, "efficientnet_lite0", trust_remote_code=True
        ).pipeline
        others, found, _ = asked.ranks(pipeline, arguments.seed, guidance_scale=arguments.other_guidance_scale)
        numbers["R@5 of the other model"] = mean_of(found < NEAREST, RECALL_DRAWS)
        numbers["R@5, more than the other model"] = difference(ranks, found)
        rows["other model"] = others[:SHOWN]
    if arguments.sheet is not None:
        labelled_sheet(asked.prompts[:SHOWN], rows).save(arguments.sheet)
    for name, measure in numbers.items():
        print(f"{name}: {measure}")
    result = {"hardware": hardware(), "prompts": len(asked.prompts)} | {
        "numbers": {name: asdict(one) for name, one in numbers.items()}
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
