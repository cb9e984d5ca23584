"""The ``ldm`` command: acts on model folders and data."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.average import average
from ldm.data.headers import PictureError, decode, open_picture
from ldm.data.pixels import to_rgb
from ldm.evaluate import evaluate
from ldm.hub import HubError, push
from ldm.models.pipeline import kept_size, load_pipeline, plain_call, starting_from, told_by
from ldm.validate import validate


def sample(
    prompts: Sequence[str],
    model: str,
    out: str = ".",
    negative_prompt: str = "",
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    image: str | None = None,
    mask_image: str | None = None,
    strength: float | None = None,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write one PNG per prompt and return their paths; prompt, seed and settings stand in its text chunk.

    Args:
        prompts: What to draw, one picture each: texts; numbers of classes; or "" of a model that is told nothing.
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        out: Folder for the pictures.
        negative_prompt: What to steer away from.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        image: Picture to start from, which keeps its size; transparent parts are white.
        mask_image: Picture, white where it is drawn anew; transparent parts are black.
        strength: Share of the steps that the picture goes through; left out: 0.8, and with a mask all.
        trust_remote_code: Run the pipeline code that came with the model.

    """
    if not -(2**62) <= seed <= 2**62:
        raise ValueError(f"seed: got {seed:#x}; expected a number from -2**62 to 2**62")
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    paths = [Path(out) / f"{slug(prompt)}-{seed + number}.png" for number, prompt in enumerate(prompts)]
    if image is not None:
        settings["strength"] = checked_strength(strength, num_inference_steps, mask_image is not None)
        refuse_overwriting(paths, image, mask_image)
    elif mask_image is not None or strength is not None:
        raise ValueError("mask_image, strength: say of which --image")
    pipeline, pictures = load_pipeline(model, trust_remote_code), {}
    if image is not None:
        pictures = started(image=image, mask_image=mask_image)
        pipeline = starting_from(pipeline, masked=mask_image is not None)
        settings |= kept_size(pipeline, *pictures["image"].size)
    for number, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        draw = torch.Generator().manual_seed(seed + number)
        call = asked(pipeline, prompt, negative_prompt) | plain_call(pipeline)
        picture = pipeline(**call, **pictures, generator=draw, **settings).images[0]
        text = PngInfo()
        described = {"prompt": prompt, "negative_prompt": negative_prompt, "seed": seed + number, **settings}
        for key, value in described.items():
            text.add_itxt(key, str(value))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, pnginfo=text)
        print(path)
    return paths


def checked_strength(strength: float | None, num_inference_steps: int, masked: bool) -> float:
    """Return the share of the steps that a picture goes through; ValueError if that is not one of them."""
    share = (1.0 if masked else 0.8) if strength is None else strength
    if not 0 < share <= 1 or int(share * num_inference_steps) < 1:
        raise ValueError(
            f"strength: got {share:g}; expected at most 1, and at least one of the {num_inference_steps} steps"
        )
    return share


def refuse_overwriting(paths: Sequence[Path], *read: str | None) -> None:
    """Raise ValueError if one of `paths`, to be written, is a file that is to be read."""
    sources = {Path(file).resolve() for file in read if file is not None}
    for path in paths:
        if path.resolve() in sources:
            raise ValueError(f"{path} would be written over itself: name another --out, or another --seed")


def started(**files: str | None) -> dict[str, Image.Image]:
    """Return the pictures in `files`, those that are named; ValueError if one is none."""
    pictures = {}
    for name, file in files.items():
        if file is not None:
            try:
                behind = "black" if name == "mask_image" else "white"
                pictures[name] = to_rgb(decode(open_picture(file)), behind)
            except (OSError, PictureError) as error:
                raise ValueError(f"{name}: {file}: {error}") from error
    return pictures


def asked(pipeline: Any, prompt: str, negative_prompt: str) -> dict[str, Any]:
    """Return how a pipeline is asked for a prompt; ValueError if it takes no such thing."""
    told = told_by(pipeline)
    if told == "prompt":
        return {"prompt": prompt, **({"negative_prompt": negative_prompt} if negative_prompt else {})}
    if told == "class_labels" and not negative_prompt and (not prompt or prompt.isdecimal()):
        return {"class_labels": [int(prompt) if prompt else None]}
    raise ValueError(f"prompts: got {prompt!r}; {type(pipeline).__name__} takes {told} and no text")


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
    evaluating.add_argument("model", help="folder or Hub name of a pipeline, user/name or user/name@revision")
    evaluating.add_function_arguments(evaluate, skip={"model"}, as_positional=False)
    commands.add_subcommand("evaluate", evaluating)
    pushing = ArgumentParser(description="Push a model folder to the Hugging Face Hub.")
    pushing.add_argument("folder", help="folder of a pipeline or an autoencoder, such as a training's OUTPUT_DIR/model")
    pushing.add_argument("repo_id", help="repository, user/name")
    pushing.add_function_arguments(push, skip={"folder", "repo_id"}, as_positional=False)
    commands.add_subcommand("push", pushing)
    validating = ArgumentParser(description="Look at every picture and caption; exit code 1: a training would stop.")
    validating.add_argument("data", help="a folder of pictures, Parquet, a data set, or openmoji")
    validating.add_function_arguments(validate, skip={"data"}, as_positional=False)
    commands.add_subcommand("validate", validating)
    averaging = ArgumentParser(description="Make an average of another length of a training that is over.")
    averaging.add_argument("run", help="folder of a training with snapshot_every_steps, its output_dir")
    averaging.add_function_arguments(average, skip={"run"}, as_positional=False)
    commands.add_subcommand("average", averaging)
    chosen = parser.parse_args(argv)
    arguments = chosen[chosen.subcommand].as_dict()
    try:
        match chosen.subcommand:
            case "sample":
                sample(**arguments)
            case "evaluate":
                evaluate(**arguments)
            case "average":
                average(**arguments)
            case "push":
                print(push(**arguments))
            case "validate" if validate(**arguments).stops:
                sys.exit(1)
    except (HubError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
