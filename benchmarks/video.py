"""VideoLDM on held-out clips: motion, subjects, consistency, prediction, interpolation, with floors and ceilings.

python -m benchmarks.video out/video_ldm/openmoji/video/model OUT.json --sheet docs/video.png
python -m benchmarks.video out/video_ldm/openmoji/prediction/model OUT.json --parts prediction interpolation
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.commands.clip_files import write_gif
from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages
from ldm.data.clips import DIRECTIONS, MOTIONS
from ldm.data.pixels import to_uint8
from ldm.data.sources import build_source
from ldm.evaluation.baselines import derangement, other_values
from ldm.evaluation.images import comparison_sheet
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.motion import (
    Clips,
    asymmetric,
    changes,
    displacements,
    grown_as_asked,
    growths,
    moved_as_asked,
    rotation_errors,
    turned_as_asked,
)
from ldm.evaluation.neighbours import euclidean, share_nearer
from ldm.evaluation.quality import flicker, psnr
from ldm.evaluation.samples import ClipSamples, strips
from ldm.evaluation.sampling import sample_clips
from ldm.machine import cores, hardware
from ldm.models.autoencoder import reconstruct
from ldm.models.pipeline import load_pipeline
from ldm.models.resolution import shrunk
from ldm.spaces import frame_by_frame, time_first

LISTS = {"test": "configs/openmoji/clips_heldout.txt", "validation": "configs/openmoji/clips_validation.txt"}
GROUPS = ("Animals & Nature", "Food & Drink")
GIVEN, LONG = 8, 24
"""Frames that a prediction is given, and those of the whole motion."""
SMALL = 16
"""Pixels, height and width, at which a clip is compared with all training clips."""
SHOWN = 12


class Held:
    """Held-out clips, those that a pipeline samples of their captions, and the motion that each asks for."""

    def __init__(self, model: str, split: str, guidance_scale: float | None, seed: int):
        self.pipeline = load_pipeline(model, trust_remote_code=True)
        self.pipeline.set_progress_bar_config(disable=True)  # `sample_clips` has one over all its calls
        self.images = clips_of(8)
        self.rows = list(self.images.splits[split])
        self.captions = [self.images.source.captions(row)[0] for row in self.rows]
        self.true = self.true_of(self.images)
        self.motions = [MOTIONS[row % len(MOTIONS)] for row in self.rows]
        self.moving = self.of(*DIRECTIONS)
        self.towards = np.array([self.motions[place].towards for place in self.moving])
        self.seed, self.call = seed, {} if guidance_scale is None else {"guidance_scale": guidance_scale}

    @cached_property
    def clips(self) -> Clips:
        """The clips of the captions."""
        return sample_clips(self.pipeline, self.captions, self.seed, "prompt", **self.call)

    @cached_property
    def long(self) -> Clips:
        """The true motions in `LONG` frames."""
        return self.true_of(clips_of(LONG))

    @cached_property
    def decoded(self) -> Clips:
        """The true clips through the autoencoder."""
        return through(self.pipeline.vae, self.true)

    def of(self, *motions: Any) -> list[int]:
        """Return the places of the clips with one of these motions."""
        return [place for place, motion in enumerate(self.motions) if motion in motions]

    def true_of(self, images: CaptionedImages) -> Clips:
        """Return the held-out clips of a data set with the same rows."""
        return np.stack([to_uint8(images.pixel_values(row)).numpy() for row in self.rows])


def clips_of(num_frames: int) -> CaptionedImages:
    """Return the moving images with their held-out lists."""
    config = DataConfig("openmoji_clips", num_frames=num_frames, groups=GROUPS, held_out=LISTS)
    return CaptionedImages(build_source(config), config)


def pixels(clips: Clips) -> Tensor:
    """Return clips of 8 bits as (N, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def through(vae: Any, clips: Clips) -> Clips:
    """Return clips through an autoencoder, as clips if its decoder has temporal layers."""
    if hasattr(vae, "temporal"):
        return to_uint8(time_first(reconstruct(vae, pixels(clips)))).numpy()
    return to_uint8(frame_by_frame(lambda frames: reconstruct(vae, frames), time_first(pixels(clips)))).numpy()


def motion(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield the measures of motion, with the autoencoder's as ceilings."""
    moving, towards, decoded = held.moving, held.towards, held.decoded
    true, made = displacements(held.true[moving]), displacements(held.clips[moving])
    lengths = np.linalg.norm(true, axis=1)
    ceiling = "true clips through the autoencoder"
    yield "directions", mean_of(moved_as_asked(made, towards, lengths))
    yield f"directions, {ceiling}", mean_of(moved_as_asked(displacements(decoded[moving]), towards, lengths))
    exchanged = np.array(other_values([tuple(one) for one in towards]))
    yield "directions, captions exchanged", mean_of(moved_as_asked(made, exchanged, lengths))
    still = held.clips[moving][:, :1].repeat(held.clips.shape[1], 1)
    yield "directions, the first frame repeated", mean_of(moved_as_asked(displacements(still), towards, lengths))
    yield "length of the way, share of the true one", mean_of(np.linalg.norm(made, axis=1) / lengths)
    yield "way along the direction, share of the true one", mean_of((made * towards).sum(1) / lengths)
    sized = held.of(MOTIONS[8], MOTIONS[9])
    for name, clips in (("sizes", held.clips), (f"sizes, {ceiling}", decoded)):
        yield name, mean_of(grown_as_asked(growths(clips[sized]), growths(held.true[sized])))
    turning = np.array(held.of(MOTIONS[10], MOTIONS[11]))
    angles = np.array([held.motions[place].degrees for place in turning])
    some = asymmetric(rotation_errors(held.true[turning]), angles)
    for name, clips in (("turns, of asymmetric subjects", held.clips), (f"turns, {ceiling}", decoded)):
        yield name, mean_of(turned_as_asked(rotation_errors(clips[turning[some]]), angles[some]))


def subject(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield whether the subject is right, and whether it stays what it is."""
    moving = held.moving
    yield "change from frame to frame, of 255", mean_of(changes(held.clips[moving]))
    yield "change from frame to frame, true clips", mean_of(changes(held.true[moving]))
    yield "change from frame to frame, true clips through the autoencoder", mean_of(changes(held.decoded[moving]))
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
    through_it = samples.ranks(held.decoded[:, middle : middle + 1], own)
    yield "subject, R@1 of true middle frames through the autoencoder", mean_of(through_it < 1)


def copies(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield the share of the clips that are nearer to a training clip than the true clip is."""

    def features(frames: Tensor) -> Any:
        return frame_by_frame(lambda one: shrunk(one, SMALL), frames).flatten(1).numpy()

    train = [features(held.images.pixel_values(row)[None]) for row in held.images.splits["train"]]
    near = [euclidean(features(time_first(pixels(of))), np.concatenate(train)).min(1) for of in (held.clips, held.true)]
    yield "nearer to a training clip than the true clip is", share_nearer(*near)


def decoder(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield the flicker of a temporal decoder on true latents, with its temporal layers and without."""
    vae, clips = held.pipeline.vae, pixels(held.true)
    if not hasattr(vae, "temporal"):
        raise SystemExit("--parts decoder: the autoencoder of this pipeline has no temporal layers")
    alone = frame_by_frame(lambda frames: reconstruct(vae, frames), time_first(clips)).movedim(-3, 1)
    for name, made in (("temporal decoder", reconstruct(vae, clips)), ("frame by frame", alone)):
        yield f"flicker, {name}, of 255", mean_of(flicker(made, clips).numpy())
        yield f"PSNR, {name}, dB", mean_of(psnr(*(time_first(one).flatten(0, 1) for one in (made, clips))).numpy())


def prediction(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield whether clips that go on from the first third of a true motion keep its direction."""
    true, captions = held.long[held.moving], [held.captions[place] for place in held.moving]
    given = {"video": [*(true[:, :GIVEN] / 255).astype(np.float32)]}
    lengths = np.linalg.norm(displacements(true[:, GIVEN:]), axis=1)

    def kept(clips: Clips) -> Measure:
        return mean_of(moved_as_asked(displacements(clips[:, GIVEN:]), held.towards, lengths))

    def gone_on(asked: list[str]) -> Clips:
        return sample_clips(held.pipeline, asked, held.seed, "prompt", given, num_frames=LONG, **held.call)

    made = gone_on(captions)
    yield "prediction, direction kept", kept(made)
    yield "prediction, direction kept by the true clips through the autoencoder", kept(through(held.pipeline.vae, true))
    yield "prediction, direction kept by the last given frame", kept(true[:, GIVEN - 1 : GIVEN].repeat(LONG, 1))
    ways = displacements(made[:, GIVEN:])
    yield "prediction, length of the way, share of the true one", mean_of(np.linalg.norm(ways, axis=1) / lengths)
    others = derangement(np.arange(len(captions)))
    yield "prediction, direction kept with another clip's caption", kept(gone_on([captions[one] for one in others]))


def interpolation(held: Held) -> Iterator[tuple[str, Measure]]:
    """Yield the PSNR of the frames between two given ones, the second third of a true motion."""
    true = held.long[:, GIVEN : 2 * GIVEN]
    ends = {name: [Image.fromarray(clip[at]) for clip in true] for name, at in (("image", 0), ("last_image", -1))}
    filled = sample_clips(held.pipeline, held.captions, held.seed, "prompt", ends, **held.call)
    share = np.linspace(0, 1, GIVEN)[None, :, None, None, None]
    faded = ((1 - share) * true[:, :1] + share * true[:, -1:]).round().astype(np.uint8)
    decoded = through(held.pipeline.vae, true)
    kinds = {"filled in": filled, "cross-fade": faded, "true clips through the autoencoder": decoded}
    for name, clips in kinds.items():
        yield f"interpolation, PSNR of {name}, dB", between(clips, true)


def between(made: Clips, true: Clips) -> Measure:
    """Return the mean PSNR of the frames of each clip but the first and the last."""
    one, other = (time_first(pixels(clips[:, 1:-1])) for clips in (made, true))
    return mean_of(psnr(one.flatten(0, 1), other.flatten(0, 1)).view(one.shape[:2]).mean(1).numpy())


PARTS: dict[str, Callable[[Held], Iterator[tuple[str, Measure]]]] = {
    "motion": motion,
    "subject": subject,
    "copies": copies,
    "decoder": decoder,
    "prediction": prediction,
    "interpolation": interpolation,
}


def main() -> None:
    """Sample, measure, and write the numbers."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a pipeline of clips")
    parser.add_argument("out", type=Path, help="file for the numbers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["motion", "subject", "copies"])
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own, if it is left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validation", action="store_true", help="measure on the validation list, to choose by it")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of strips, evenly spread, none chosen")
    parser.add_argument("--gif", type=Path, help="file for the same clips beside one another, generated over true")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    split = "validation" if arguments.validation else "test"
    held = Held(arguments.model, split, arguments.guidance_scale, arguments.seed)
    some = [*range(0, len(held.rows), max(1, len(held.rows) // SHOWN))]
    if arguments.sheet is not None:
        made, true = (strips(clips[some]) for clips in (held.clips, held.true))
        comparison_sheet([held.captions[place] for place in some], made, true).save(arguments.sheet)
    if arguments.gif is not None:
        rows = [np.concatenate([*clips[some]], 2) for clips in (held.clips, held.true)]
        captions = {"captions": [held.captions[place] for place in some]}
        write_gif([Image.fromarray(frame) for frame in np.concatenate(rows, 1)], arguments.gif, captions)
    numbers: dict[str, Measure] = {}
    for part in arguments.parts:
        for name, measure in PARTS[part](held):
            print(f"{name}: {measure}", flush=True)
            numbers[name] = measure
    asked = {"model": Path(arguments.model).name, "split": split, "seed": arguments.seed, **held.call}
    found = {"hardware": hardware(), **asked, "numbers": {name: asdict(one) for name, one in numbers.items()}}
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
