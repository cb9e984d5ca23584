"""VideoLDM on held-out clips: directions, sizes, subjects, consistency, with floors and ceilings.

python -m benchmarks.video out/video_ldm/openmoji/video/model OUT.json --sheet docs/video.png
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages
from ldm.data.clips import DIRECTIONS, MOTIONS
from ldm.data.pixels import to_uint8
from ldm.data.sources import build_source
from ldm.evaluation.baselines import other_values
from ldm.evaluation.images import comparison_sheet
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.motion import (
    asymmetric,
    changes,
    displacements,
    grown_as_asked,
    growths,
    moved_as_asked,
    rotation_errors,
    turned_as_asked,
)
from ldm.evaluation.samples import ClipSamples, strips
from ldm.evaluation.sampling import sample_clips
from ldm.machine import cores, hardware
from ldm.models.autoencoder import reconstruct
from ldm.models.pipeline import load_pipeline

LISTS = {"test": "configs/openmoji/clips_heldout.txt", "validation": "configs/openmoji/clips_validation.txt"}
GROUPS = ("Animals & Nature", "Food & Drink")
SHOWN = 12


class Held:
    """Held-out clips, those that a pipeline samples of their captions, and the motion that each asks for."""

    def __init__(self, model: str, split: str, guidance_scale: float | None, seed: int):
        self.pipeline = load_pipeline(model, trust_remote_code=True)
        config = DataConfig("openmoji_clips", groups=GROUPS, held_out=LISTS)
        self.images = CaptionedImages(build_source(config), config)
        self.rows = list(self.images.splits[split])
        self.captions = [self.images.source.captions(row)[0] for row in self.rows]
        self.true = np.stack([to_uint8(self.images.pixel_values(row)).numpy() for row in self.rows])
        self.motions = [MOTIONS[row % len(MOTIONS)] for row in self.rows]
        self.seed, self.call = seed, {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        self.clips = sample_clips(self.pipeline, self.captions, seed, "prompt", **self.call)

    def of(self, *motions: Any) -> list[int]:
        """Return the places of the clips with one of these motions."""
        return [place for place, motion in enumerate(self.motions) if motion in motions]


def measures(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield each measure with its name."""
    moving = held.of(*DIRECTIONS)
    towards = np.array([held.motions[place].towards for place in moving])
    true, made = displacements(held.true[moving]), displacements(held.clips[moving])
    lengths = np.linalg.norm(true, axis=1)
    flat = torch.from_numpy(held.true).permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 127.5 - 1
    decoded = to_uint8(reconstruct(held.pipeline.vae, flat)).numpy().reshape(held.true.shape)
    yield "directions", mean_of(moved_as_asked(made, towards, lengths))
    yield (
        "directions, true clips through the autoencoder",
        mean_of(moved_as_asked(displacements(decoded[moving]), towards, lengths)),
    )
    exchanged = np.array(other_values([tuple(one) for one in towards]))
    yield "directions, captions exchanged", mean_of(moved_as_asked(made, exchanged, lengths))
    still = held.clips[moving][:, :1].repeat(held.clips.shape[1], 1)
    yield "directions, the first frame repeated", mean_of(moved_as_asked(displacements(still), towards, lengths))
    yield "length of the way, share of the true one", mean_of(np.linalg.norm(made, axis=1) / lengths)
    yield "way along the direction, share of the true one", mean_of((made * towards).sum(1) / lengths)
    sized = held.of(MOTIONS[8], MOTIONS[9])
    yield "sizes", mean_of(grown_as_asked(growths(held.clips[sized]), growths(held.true[sized])))
    yield (
        "sizes, true clips through the autoencoder",
        mean_of(grown_as_asked(growths(decoded[sized]), growths(held.true[sized]))),
    )
    turning = np.array(held.of(MOTIONS[10], MOTIONS[11]))
    angles = np.array([held.motions[place].degrees for place in turning])
    some = asymmetric(rotation_errors(held.true[turning]), angles)
    turning, angles = turning[some], angles[some]
    yield "turns, of asymmetric subjects", mean_of(turned_as_asked(rotation_errors(held.clips[turning]), angles))
    yield (
        "turns, true clips through the autoencoder",
        mean_of(turned_as_asked(rotation_errors(decoded[turning]), angles)),
    )
    yield "change from frame to frame, of 255", mean_of(changes(held.clips[moving]))
    yield "change from frame to frame, true clips", mean_of(changes(held.true[moving]))
    captions = [held.captions[place] for place in moving for _ in range(held.clips.shape[1])]
    alone = sample_clips(held.pipeline, captions, held.seed + 1, "prompt", num_frames=1, **held.call)
    apart = alone.reshape(held.clips[moving].shape)
    yield "change from frame to frame, frames sampled one by one", mean_of(changes(apart))
    samples = ClipSamples(held.images, None, held.true.shape[2])
    own = np.array([samples.places[row] for row in held.rows])
    yield "subject, R@1 of the middle frame", mean_of(samples.ranks(held.clips, own) < 1)
    middle = held.clips.shape[1] // 2
    alone = sample_clips(held.pipeline, held.captions, held.seed, "prompt", num_frames=1, **held.call)
    # its frames come from anywhere in a motion, and are looked up among the middle ones all the same: a hard test
    yield "subject, R@1 of the image model's frames among middle frames", mean_of(samples.ranks(alone, own) < 1)
    yield (
        "subject, R@1 of true middle frames through the autoencoder",
        mean_of(samples.ranks(decoded[:, middle : middle + 1], own) < 1),
    )


def main() -> None:
    """Sample, measure, and write the numbers."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline of clips")
    parser.add_argument("out", type=Path, help="file for the numbers")
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own, if it is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="measure on the validation list, to choose by it")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of strips, evenly spread, none chosen")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    split = "validation" if arguments.validation else "test"
    held = Held(arguments.model, split, arguments.guidance_scale, arguments.seed)
    if arguments.sheet is not None:
        some = range(0, len(held.rows), max(1, len(held.rows) // SHOWN))
        made, true = (strips(clips[[*some]]) for clips in (held.clips, held.true))
        comparison_sheet([held.captions[place] for place in some], made, true).save(arguments.sheet)
    numbers: dict[str, Measure] = {}
    for name, measure in measures(held):
        print(f"{name}: {measure}", flush=True)
        numbers[name] = measure
    asked = {"model": Path(arguments.model).name, "split": split, "seed": arguments.seed, **held.call}
    found = {"hardware": hardware(), **asked, "numbers": {name: asdict(one) for name, one in numbers.items()}}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
