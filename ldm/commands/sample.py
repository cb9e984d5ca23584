"""``ldm sample``: images of prompts from any pipeline, as PNG files that hold prompt, seed and settings."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.commands.clip_files import write_gif, write_mp4
from ldm.config.places import made_folder
from ldm.data.films import film_at
from ldm.data.headers import ImageError, decode_pixels, open_image
from ldm.data.pixels import to_rgb
from ldm.evaluation.conditions import condition_by
from ldm.evaluation.samples import strips
from ldm.models.pipeline import call_settings, load_pipeline, plain_call, size_arguments, starting_from

BESIDE = (".gif", ".mp4")
"""Ends of the names of what is written of a clip, beside the strip."""
NAME_LETTERS, NAME_BYTES = 80, 200
"""Limits of the prompt in a file name. File systems take 255 bytes, and seed, number and suffix follow."""


def sample(
    prompts: Sequence[str],
    model: str,
    out: str = ".",
    negative_prompt: str = "",
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    image: str | None = None,
    mask_image: str | None = None,
    strength: float | None = None,
    last_image: str | None = None,
    video: str | None = None,
    num_frames: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write one PNG per prompt and return their paths; prompt, seed and settings are in its text chunk.

    Of a pipeline of clips the PNG is a strip of the frames, and beside it are a GIF and, where PyAV is installed
    (``pip install -e .[video]``), an MP4, with the same texts in their comments.

    Args:
        prompts: Prompts, one image each: texts; or numbers of classes; or "" for an unconditional model.
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        out: Folder for the images.
        negative_prompt: Prompt that guidance steers away from.
        seed: Seed of the first image; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance scale; 1 turns guidance off. Default: the pipeline's own, else 3, if it has guidance.
        image: Image to start from, whose size is kept; transparent parts become white. Of a clip, its first frame.
        mask_image: Mask, white where the image is sampled anew; transparent parts become black.
        strength: Share of the steps that are run on the start image. Default: 0.8, and 1 with a mask.
        last_image: Last frame of a clip.
        video: GIF, animated WEBP or MP4 whose frames are the first ones of a clip, which goes on from them.
        num_frames: Frames of a clip, given ones included. Default: the pipeline's own.
        overwrite: Replace files of the same name; otherwise the next free name is used (a-cat-0-2.png).
        trust_remote_code: Run the pipeline code that came with the model.

    """
    if not -(2**62) <= seed <= 2**62:
        raise ValueError(f"seed: got {seed:#x}; expected a number from -2**62 to 2**62")
    for name, text in [("negative_prompt", negative_prompt), *(("prompts", prompt) for prompt in prompts)]:
        if not _is_unicode(text):
            raise ValueError(f"{name}: got {text!r:.80}, which is not valid Unicode; leave out what is not text")
    paths = [Path(out) / f"{slug(prompt)}-{seed + number}.png" for number, prompt in enumerate(prompts)]
    if image is None and (mask_image is not None or strength is not None):
        raise ValueError("mask_image, strength: need an image to start from; name --image")
    if overwrite:
        refuse_overwriting(paths, image, mask_image, last_image, video)
    if strength is not None:  # before the model is loaded: a wrong one is known at once
        image_strength(strength, num_inference_steps, mask_image is not None)
    pipeline, images = load_pipeline(model, trust_remote_code), {}
    takes = inspect.signature(pipeline.__call__).parameters
    if "output_type" not in takes:
        raise ValueError(f"{type(pipeline).__name__} samples no images; name a pipeline that does")
    settings = call_settings(pipeline, num_inference_steps, guidance_scale)
    if {"num_frames", "image", "video"} <= takes.keys():
        if mask_image is not None or strength is not None:
            raise ValueError("mask_image, strength: a clip goes on from its first frames as they are; leave them out")
        if overwrite:
            beside = [path.with_suffix(kind) for path in paths for kind in BESIDE]
            refuse_overwriting(beside, image, last_image, video)
        images = started(image=image, last_image=last_image)
        if video is not None:
            images["video"] = film_frames(video, num_frames or pipeline.config.num_frames)
        settings |= {} if num_frames is None else {"num_frames": num_frames}
    elif last_image is not None or video is not None or num_frames is not None:
        raise ValueError(f"last_image, video, num_frames: {type(pipeline).__name__} samples no clips; leave them out")
    elif image is not None:
        images = started(image=image, mask_image=mask_image)
        pipeline = starting_from(pipeline, masked=mask_image is not None)
        settings["strength"] = image_strength(strength, num_inference_steps, mask_image is not None)
        settings |= size_arguments(pipeline, *images["image"].size)
    made_folder(out)
    written = []
    for number, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        call = asked(pipeline, prompt, negative_prompt) | plain_call(pipeline)
        output = pipeline(**call, **images, generator=generator, output_type="pil", **settings)
        described: dict[str, Any] = {"prompt": condition_by(pipeline).shown(prompt), "negative_prompt": negative_prompt}
        described |= {"seed": seed + number, **settings}
        for file in write_output(output, path, described, overwrite):
            print(file)
            written.append(file)
    return written


def write_output(output: Any, path: Path, described: Mapping[str, object], overwrite: bool) -> list[Path]:
    """Write the first image, or clip, of a pipeline's output, and return the paths of its files."""
    if not hasattr(output, "frames"):
        return [write_image(output.images[0], path, described, overwrite)]
    frames, beside = output.frames[0], BESIDE
    if not overwrite:  # a name that is free for all of its files
        path = next(
            one for one in _names(path) if not any(one.with_suffix(kind).exists() for kind in (".png", *beside))
        )
    for kind in beside:  # an old film beside a new strip would be another clip
        path.with_suffix(kind).unlink(missing_ok=True)
    side_by_side = strips(np.stack([np.asarray(frame.convert("RGB")) for frame in frames])[None])[0]
    shown = write_image(Image.fromarray(side_by_side), path, described, overwrite)
    gif = write_gif(frames, shown.with_suffix(".gif"), described)
    mp4 = write_mp4(frames, shown.with_suffix(".mp4"), described)
    return [shown, gif] if mp4 is None else [shown, gif, mp4]


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def image_strength(strength: float | None, num_inference_steps: int, masked: bool) -> float:
    """Return the share of the steps that a start image goes through; ValueError unless it is at least one step.

    The default is 0.8, and 1 with a mask.
    """
    share = (1.0 if masked else 0.8) if strength is None else strength
    if not 0 < share <= 1 or int(share * num_inference_steps) < 1:
        raise ValueError(
            f"strength: got {share:g}; expected at most 1, and at least one of the {num_inference_steps} steps"
        )
    return share


def refuse_overwriting(paths: Sequence[Path], *read: str | None) -> None:
    """Raise ValueError if one of `paths`, which will be written, is one of the files to read."""
    sources = {Path(file).resolve() for file in read if file is not None}
    for path in paths:
        if path.resolve() in sources:
            raise ValueError(f"{path} is an input and would be overwritten; name another --out, or another --seed")


def film_frames(file: str, num_frames: int) -> list[Image.Image]:
    """Return all frames of a film in RGB; ValueError for a file that is not one, or has `num_frames` or more."""
    try:
        film = film_at(file)
        if (count := len(film.times())) >= num_frames:
            raise ValueError(f"num_frames: got {num_frames}; expected more than the {count} frames of {file}")
        return [to_rgb(frame, "white") for frame in film.frames(range(count))]
    except (OSError, ImageError) as error:
        raise ValueError(f"video: {file}: {error}") from error


def started(**files: str | None) -> dict[str, Any]:
    """Return the images of the given `files`, by argument; ValueError for a file that is not an image."""
    images: dict[str, Any] = {}
    for name, file in files.items():
        if file is not None:
            try:
                behind = "black" if name == "mask_image" else "white"
                images[name] = to_rgb(decode_pixels(open_image(file)), behind)
            except (OSError, ImageError) as error:
                raise ValueError(f"{name}: {file}: {error}") from error
    return images


def asked(pipeline: Any, prompt: str, negative_prompt: str) -> dict[str, Any]:
    """Return the keywords of a pipeline's call for a prompt; ValueError if the pipeline does not take it."""
    condition, takes = condition_by(pipeline), inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    if negative_prompt and not (condition.worded and "negative_prompt" in takes):
        raise ValueError(f"negative_prompt: {name} takes none; leave it out")
    if (value := condition.parsed(prompt)) is not None:
        return {condition.keyword: value, **({"negative_prompt": negative_prompt} if negative_prompt else {})}
    if not prompt and takes[condition.keyword].default is not inspect.Parameter.empty:
        return {}
    raise ValueError(f"prompts: got {prompt!r}; {name} takes {condition.written_as}")


def slug(text: str) -> str:
    """Return a readable part of a file name for a text, of at most `NAME_LETTERS` letters and `NAME_BYTES` bytes.

    It keeps letters, digits and marks of every script, and emoji, in lower case and normalised (NFC). Everything else
    becomes "-": separators, punctuation, control, invisible and bidirectional characters. If nothing is left, it is a
    hash of the text, or "image" for an empty text.
    """
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    words = "".join(letter if _is_name(letter) else " " for letter in plain).split()
    name = "-".join(words)[:NAME_LETTERS].encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    return name or (digest if text.strip() else "image")


def _is_name(letter: str) -> bool:
    kind = unicodedata.category(letter)
    is_skin_tone = "\U0001f3fb" <= letter <= "\U0001f3ff"
    return letter == "_" or kind[0] in "LN" or kind in ("Mn", "Mc", "So") or is_skin_tone


def write_image(image: Image.Image, path: Path, described: Mapping[str, object], overwrite: bool = False) -> Path:
    """Write an image as PNG with the texts `described`, and return its path: `path`, or the next free name.

    An existing file is replaced only if `overwrite` is true.
    """
    text, data = PngInfo(), BytesIO()
    for key, value in described.items():
        text.add_itxt(key, str(value))
    image.save(data, "PNG", pnginfo=text)
    for free in _names(path):
        try:
            with free.open("wb" if overwrite else "xb") as file:
                file.write(data.getbuffer())
        except FileExistsError:
            continue
        return free
    raise AssertionError("there is always a next name")


def _names(path: Path) -> Iterator[Path]:
    yield path
    yield from (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
