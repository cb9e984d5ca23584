"""The recipe of a CLIP: images and captions brought into one space of embeddings."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from ldm.config import ClipConfig
from ldm.data.batches import Batch, CaptionedImages, PositionDataset
from ldm.doctor.examination import clip_findings
from ldm.errors import ConfigError
from ldm.export.card import CardText
from ldm.models.clip import build_clip, save_clip
from ldm.recipes.recipe import Recipe
from ldm.training.alarms import cut_captions
from ldm.training.contrastive import ContrastiveStep, ContrastiveValidation
from ldm.training.loop import Event, Loop
from ldm.training.record import recorded_tokenizer
from ldm.training.rehearsal import first_batch, rehearse
from ldm.training.run import Run

FIELDS = "clip, contrastive"
"""Parts of the config that must fit together."""
LOADING = """\
```python
import torch
from transformers import CLIPModel, CLIPTokenizer

model = "model"
clip, tokenizer = CLIPModel.from_pretrained(model), CLIPTokenizer.from_pretrained(model)
tokens = tokenizer(["red heart"], padding="max_length", truncation=True, return_tensors="pt")
text_embeds = clip.get_text_features(tokens.input_ids)
```
"""
MEASURED = """\
of the first caption of each validation image, the share whose own image is the nearest (R@1) or among the five nearest
of all distinct images of the data, those of training included; and back, of each validation image, the share whose own
caption is the nearest of theirs. None of the validation images was trained on."""


def clip_recipe(config: ClipConfig, run: Run, images: CaptionedImages) -> Recipe:
    """Return the recipe of a CLIP.

    Raises:
        ConfigError: there are no captions to train on.

    """
    captions = images.captions("train")
    if not captions:
        raise ConfigError("data: no training image has a caption; name them in data.caption_column")
    torch.manual_seed(config.seed)
    clip, tokenizer = build_clip(config.clip, captions, recorded_tokenizer(run.saved))
    step = ContrastiveStep(clip, tokenizer, config, run)
    train = PositionDataset(images, "train", config.seed)
    validation = ContrastiveValidation(config, images, step, run)

    def rehearse_all() -> None:
        rehearse(step, first_batch(images, 2), FIELDS)

    def alarms(dataset: PositionDataset) -> Iterator[tuple[str, str]]:
        yield from cut_captions(validation.truncation, "clip.max_length")

    def events(loop: Loop[Batch]) -> Sequence[Event]:
        return ((config.loop.validate_every_steps, validation),)

    def save(folder: Path) -> None:
        finished = copy.deepcopy(step.averaged.clip)
        finished.logit_scale.data.clamp_(max=math.log(config.contrastive.max_logit_scale))
        save_clip(finished, tokenizer, folder, getattr(torch, config.save_dtype))

    return Recipe(
        step=step,
        parts=[] if config.clip.pretrained is None else [config.clip.pretrained],
        rehearse=rehearse_all,
        dataset=lambda: train,
        events=events,
        alarms=alarms,
        findings=partial(clip_findings, config, step, validation),
        save=save,
        card=CARD,
    )


CARD = CardText(
    title="CLIP",
    about="A CLIP: an image and a text encoder into one space, where an image and its caption are near each other.",
    sheet="![validation captions, their own images, and the five nearest of all images](samples.png)",
    sheets="nearest",
    loading=LOADING,
    measured=MEASURED,
    notes={},
    task="zero-shot-image-classification",
    pipeline_tag="zero-shot-image-classification",
    tags=("clip",),
    library="transformers",
)
