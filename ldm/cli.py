"""The ``ldm`` command: acts on model folders and data."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.data.batches import CaptionedImages
from ldm.data.pixels import to_pixel_values, to_uint8
from ldm.data.preflight import checked_source
from ldm.data.sources import source_config
from ldm.data.splits import read_captions
from ldm.evaluation.baselines import ceiling, copy_baseline, shuffled_baseline
from ldm.evaluation.pictures import comparison_sheet
from ldm.evaluation.retrieval import report, retrieval_ranks
from ldm.hub import HubError, push
from ldm.models.autoencoder import downsampling_factor
from ldm.models.foreign import checked_pipeline
from ldm.provenance import read_provenance, refuse_leak
from ldm.training.autoencoding import reconstruct
from ldm.training.model_folder import averaged_model
from ldm.training.validation import sample_pictures
from ldm.validate import validate

SHEET_PICTURES = 24


def load_pipeline(model: str, trust_remote_code: bool) -> Any:
    """Return the pipeline in folder or Hub repository `model`, ``user/name`` or ``user/name@revision``.

    As the stock class that ``model_index.json`` names, or with `trust_remote_code` as the folder's own
    ``pipeline.py``, which runs code that came with the model. Raises ValueError as `checked_pipeline`.
    """
    name, revision = checked_pipeline(model, trust_remote_code)
    own: dict[str, Any] = {}
    if trust_remote_code:
        own = {"custom_pipeline": name, "trust_remote_code": True, "custom_revision": revision.get("revision")}
    pipeline = DiffusionPipeline.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False, **revision, **own)
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
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        out: Folder for the pictures.
        negative_prompt: What to steer away from.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        trust_remote_code: Run the pipeline code that came with the model.

    """
    if not -(2**62) <= seed <= 2**62:
        raise ValueError(f"seed: got {seed:#x}; expected a number from -2**62 to 2**62")
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
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
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


def average(run: str, sigma_rel: str, to: str | None = None) -> list[Path]:
    """Write a pipeline folder for each length of the average and return them; nothing is trained.

    Args:
        run: Folder of a training with snapshots, its output_dir.
        sigma_rel: Lengths, shares of the training, separated by commas, such as 0.02,0.05,0.1.
        to: Folder to write, for one length; default is RUN/model-LENGTH.

    """
    try:
        lengths = [float(length) for length in sigma_rel.split(",")]
    except ValueError as error:
        raise ValueError(f"sigma_rel: got {sigma_rel}; expected numbers separated by commas: 0.02,0.05,0.1") from error
    if to is not None and len(lengths) > 1:
        raise ValueError(f"to: names one folder, for {len(lengths)} lengths; leave it out for RUN/model-LENGTH")
    written = []
    for length in lengths:
        written.append(averaged_model(Path(run), length, Path(to or f"{run}/model-{length}")))
        print(written[-1])
    return written


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
