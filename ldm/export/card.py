"""The model card: README.md of a model folder, with what the Hub and its readers want to know of the model."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePath

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ldm.config import AutoencoderConfig, DataConfig, StageConfig
from ldm.config.file import config_text
from ldm.config.places import on_hub, pinned, portable
from ldm.models.provenance import Provenance

CARD = "README.md"
EVALUATION_MARKS = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
"""Around what `ldm evaluate` has written into a card."""
EVALUATION = re.compile("{0}(?:(?!{0}).)*?{1}".format(*EVALUATION_MARKS), re.DOTALL)
KNOWN_DATA = {"openmoji": ("[OpenMoji](https://openmoji.org)", "CC BY-SA 4.0")}
"""Name and licence of pictures that are always the same."""
HUB_LICENCES = {
    *("mit", "apache-2.0", "unlicense", "cc", "cc0-1.0", "pddl", "odc-by", "odbl"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
}
"""Those of the Hub's identifiers that pictures come under; it refuses a card with one that it does not know."""
METRICS = {
    "loss": "loss",
    "r_at_1": "retrieval R@1",
    "r_at_5": "retrieval R@5",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "perceptual": "distance in the features of EfficientNet-lite0",
    **{f"loss_at_{level / 100:.2f}": f"loss at noise level {level / 100:.2f}" for level in range(100)},
}
STAGE_LOADING = """\
```python
from diffusers import DiffusionPipeline

model = "{name}"
pipe = DiffusionPipeline.from_pretrained({arguments})
picture = pipe({asked}, num_inference_steps={steps}{guided}).images[0]
picture.save("picture.png")
```
"""
PIXART = ", use_resolution_binning=False, max_sequence_length={}, clean_caption=False"
CLIPPED = (
    ", whose images are other and worse ones: where DDIM clips the image that it thinks of, `DDPMPipeline` goes on "
    "with noise that does not lead there. `DDIMPipeline(pipe.unet, pipe.scheduler)` draws as ours does if its call is "
    "told `use_clipped_model_output=True`"
)
STAGE = """\
# {title}

A {kind} that draws pictures of {size} x {size} pixels {drawn}.
{picture}
## How to load it

{loading}"""
CAPTIONS = {
    "title": "Text to image",
    "drawn": "from captions",
    "asked": '"a cat"',
    "told": "Captions of the validation split",
}
CLASSES = {
    "title": "Pictures of classes",
    "drawn": "of classes, which have numbers",
    "asked": "class_labels=[0]",
    "told": "Classes of pictures of the validation split",
}
NOTHING = {
    "title": "Pictures from noise",
    "drawn": "like those that it was trained on",
    "asked": "batch_size=1",
    "told": "Some pictures, none of which has to do with the one beneath it",
}
"""What is said of a stage that is told captions, classes, nothing."""
STAGE_MEASURED = """\
At step {step}, with the averaged weights: the loss on validation pictures, at most {loss_images}, none of them trained
on, with the same noise each time, at several noise levels (0: picture, 1: noise) and as their mean.{retrieval}
"""
STAGE_PICTURE = """
![generated pictures over true pictures of the validation split](samples.png)

*{told}, at most {count}: generated in {steps} steps with guidance {guidance} and the seeds
from {seed} on, over the true pictures, which were not trained on.*
"""
RETRIEVAL = """
Retrieval: of {count} validation captions, drawn in the same way, the share whose generated picture is nearest to the
caption's own picture, or has it among its five nearest, of all distinct pictures of the data."""
AUTOENCODER = """\
# Autoencoder

An autoencoder of pictures, for latent diffusion. Its latents have mean 0 and standard deviation 1, and its
`scaling_factor` is 1.
{picture}
## How to load it

```python
import torch
from diffusers import AutoencoderKL

model = "{name}"
vae = AutoencoderKL.from_pretrained(model)
pictures = torch.zeros(1, 3, {size}, {size})  # in [-1, 1]
latents = vae.encode(pictures).latent_dist.mode()
reconstructions = vae.decode(latents).sample
```
"""
AUTOENCODER_MEASURED = """\
At step {step}, with the averaged weights: reconstructions, from the mean of the posterior, of validation pictures, at
most {loss_images}, none of them trained on.
"""
AUTOENCODER_PICTURE = """
![validation pictures, which were not trained on, over their reconstructions](samples.png)
"""
AVERAGE = """
## Which weights

The average over the training with a power function whose standard deviation is {sigma_rel} of it (Karras et al. 2024),
made of snapshots afterwards. The numbers and pictures here are those of another average, the training's own.
"""
MEASURED = "\n## How good it is\n"
TRAINING = (
    MEASURED
    + """
{measured}
## Data

{data}: {pictures:,} training pictures, fingerprint `{fingerprint}`. The pictures that were held out have the hash
`{held_out}`. Licence of the pictures: {licence}.

## Training

{step:,} steps in {seconds:,.0f} s, {rate:,.0f} pictures/s, on {hardware}. Made with {versions}.

```yaml
{config}```
"""
)


def write_card(model: Path, run: Path, config: StageConfig | AutoencoderConfig, record: Provenance) -> None:
    """Write README.md into the folder `model`, and the newest validation sheet of the folder `run` as samples.png.

    The metrics are those of the newest validation in the run's ``metrics.jsonl``. No path of this machine is named, see
    `portable`.
    """
    stage, data = isinstance(config, StageConfig), config.data
    sheets = sorted((run / ("samples" if stage else "reconstructions")).glob("step-*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], model / "samples.png")
    measured_at, metrics = _newest_metrics(run / "metrics.jsonl")
    results = [_result(_task(config), data, metric, value) for metric, value in metrics.items() if math.isfinite(value)]
    name, licence = _data(data)
    identifier = (licence or "").lower().replace(" ", "-")
    card = ModelCardData(
        license=identifier if identifier in HUB_LICENCES else "other" if licence else None,
        library_name="diffusers",
        pipeline_tag=_task(config) if stage else None,
        tags=[_task(config) if stage else "autoencoder", f"{'pixel' if _pixels(config) else 'latent'}-diffusion"],
        datasets=[known] if (known := _hub_data(data)) else None,
        model_name=_called(config.output_dir, model.name) if results else None,
        eval_results=results or None,
    )
    fields = {key: value for key, value in portable(asdict(config)).items() if not key.startswith("push_")}
    training = TRAINING.format(
        measured=_measured(config, measured_at, metrics),
        data=name,
        pictures=record.train_pictures,
        fingerprint=record.data,
        held_out=record.held_out_hash,
        licence=licence or "not stated",
        step=record.global_step,
        seconds=record.train_seconds,
        rate=record.images_per_second,
        hardware=record.hardware,
        versions=", ".join(f"{package} {number}" for package, number in record.versions.items()),
        config=config_text(fields),
    )
    text = f"---\n{card.to_yaml()}\n---\n\n{_body(config, model.name, bool(sheets))}{training}"
    ModelCard(text).save(model / CARD)


def tell_average(model: Path, name: str, sigma_rel: float) -> None:
    """Change the card in the folder `model`, to be called `name`, to that of a power-function average.

    What training measured stays, with word that it was on other weights; an evaluation of them goes. The Hub's metadata
    holds neither.
    """
    card = ModelCard.load(model / CARD)
    card.data.eval_results = card.data.model_name = None
    told = AVERAGE.format(sigma_rel=sigma_rel) + MEASURED
    card.text = with_name(EVALUATION.sub("", card.text).replace(MEASURED, told, 1), name)
    card.save(model / CARD)


def with_name(text: str, name: str) -> str:
    """Return a card's text with `name`, folder or repository, as the model that it tells to load."""
    return re.sub(r'^model = "[^"\n]*"$', f'model = "{name}"', text, flags=re.MULTILINE)


def _called(path: str, otherwise: str) -> str:
    """Return the last name of a path, or `otherwise` where that tells of a user or there is none."""
    return PurePath(portable(path)).name or otherwise


def _hub_data(data: DataConfig) -> str | None:
    """Return the data set's name on the Hub, without its revision; None if it is not there."""
    return pinned(data.path)[0] if data.source == "dataset" and data.path is not None and on_hub(data.path) else None


def _data(data: DataConfig) -> tuple[str, str | None]:
    """Return what the pictures are called, in Markdown, and their licence, None if it is not stated."""
    if data.source in KNOWN_DATA:
        name, licence = KNOWN_DATA[data.source]
        return name, data.licence or licence
    known = _hub_data(data)
    name = f"[{known}](https://huggingface.co/datasets/{known})" if known else _called(data.path or "", "pictures")
    return f"{name} ({data.source})", data.licence


def _body(config: StageConfig | AutoencoderConfig, name: str, picture: bool) -> str:
    """Return what the model is and draws, and how to load it from folder `name`."""
    looked, size = config.validation, config.data.image_size
    if isinstance(config, AutoencoderConfig):
        return AUTOENCODER.format(name=name, size=size, picture=AUTOENCODER_PICTURE if picture else "")
    words = _words(config)
    call = {
        "asked": words["asked"],
        "steps": str(looked.num_inference_steps),
        "guided": "" if words is NOTHING else f", guidance_scale={looked.guidance_scale}",
        "alone": "With diffusers alone",
    }
    own = STAGE_LOADING.format(name=name, **call, arguments="model, custom_pipeline=model, trust_remote_code=True")
    loading = f"With its own pipeline, `pipeline.py`, which checks what it is given:\n\n{own}"
    # the stock pipelines sample no learned variance and know no classes
    if config.objective.variational_weight is None and config.conditioners.label is None:
        if (text := config.conditioners.text) and "encoder_attention_mask" in text.keywords:  # PixArt, of its own ways
            call["guided"] += PIXART.format(text.max_length)
            call["alone"] += ", which reads captions in lower case"
        if _pixels(config) and config.sampler.kind == "ddim":
            call["alone"] += CLIPPED
        stock = STAGE_LOADING.format(name=name, **call, arguments="model")
        loading = f"{call['alone']}:\n\n{stock}\n{loading}"
    seen = {"guidance": looked.guidance_scale, "count": looked.num_images, "seed": config.seed}
    shown = STAGE_PICTURE.format(**seen, steps=call["steps"], **words) if picture else ""
    kind = "diffusion model of pixels" if _pixels(config) else "latent diffusion model"
    return STAGE.format(size=size, picture=shown, loading=loading, kind=kind, **words)


def _words(config: StageConfig) -> Mapping[str, str]:
    """Return what a stage is called, by what it is told."""
    return CAPTIONS if config.conditioners.text else CLASSES if config.conditioners.label else NOTHING


def _task(config: StageConfig | AutoencoderConfig) -> str:
    """Return the Hub's name for what a model does."""
    if isinstance(config, AutoencoderConfig):
        return "image-to-image"
    return "text-to-image" if config.conditioners.text else "unconditional-image-generation"


def _pixels(config: StageConfig | AutoencoderConfig) -> bool:
    return isinstance(config, StageConfig) and config.space.kind == "pixel"


def _measured(config: StageConfig | AutoencoderConfig, step: int, metrics: dict[str, float]) -> str:
    """Return what was measured at `step`, how, and a table of it."""
    if not metrics:
        return "Nothing was measured.\n"
    looked = config.validation
    retrieval = RETRIEVAL.format(count=looked.retrieval_images) if "r_at_1" in metrics else ""
    template = STAGE_MEASURED if isinstance(config, StageConfig) else AUTOENCODER_MEASURED
    how = template.format(step=step, loss_images=looked.loss_images, retrieval=retrieval)
    rows = [f"| {METRICS.get(metric, metric)} | {value:.4g} |" for metric, value in metrics.items()]
    return "\n".join([how, "| held-out | |", "|---|---|", *rows, ""])


def _newest_metrics(file: Path) -> tuple[int, dict[str, float]]:
    """Return the step of the last validation and its values by their names, (0, {}) if there was none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        values = {key: float(value) for key, value in row.items() if key.startswith("validation/")}
        if values:
            return int(row["step"]), {key.removeprefix("validation/"): value for key, value in values.items()}
    return 0, {}


def _result(task: str, data: DataConfig, metric: str, value: float) -> EvalResult:
    known = _hub_data(data)
    return EvalResult(
        task_type=task,
        dataset_type=known or data.source,
        dataset_name=known or (_called(data.path, "pictures") if data.path else data.source),
        dataset_split="validation",
        metric_type=metric,
        metric_name=METRICS.get(metric, metric),
        metric_value=round(value, 6),
    )
