"""``ldm evaluate``: how good a pipeline is on captions that it has never seen, and what that has to be read beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ldm.data.batches import CaptionedImages
from ldm.data.cache import CachedRows
from ldm.data.pixels import to_pixel_values, to_uint8
from ldm.data.preflight import checked_source
from ldm.data.sources import source_config
from ldm.data.splits import read_captions
from ldm.evaluation import sections
from ldm.evaluation.card import merge_into_card
from ldm.evaluation.distances import kid
from ldm.evaluation.factors import read_factors
from ldm.evaluation.gain import LEVELS, losses_with_and_without
from ldm.evaluation.markdown import markdown
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.page import html
from ldm.evaluation.quality import psnr, ssim
from ldm.evaluation.report import Report, Row, Section
from ldm.evaluation.retrieval import Images, retrieval_ranks
from ldm.evaluation.sampling import sample_pictures
from ldm.evaluation.subject import Subject
from ldm.models.pipeline import image_size, load_pipeline, told_by
from ldm.models.vision import ClipScore, FeatureNetwork, build_feature_network
from ldm.places import portable
from ldm.provenance import hardware, read_provenance, refuse_leak, refuse_teacher, versions
from ldm.training.autoencoding import reconstruct

VARIETY_SEED = 2**20
"""Above the seeds of the captions."""


def evaluate(
    model: str,
    data: str,
    captions: str,
    out: str,
    validation_captions: str | None = None,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    network: str = "efficientnet_lite0",
    clip: str | None = None,
    factors: str | None = None,
    variety_prompts: int = 12,
    num_images_per_prompt: int = 8,
    guidance_sweep: str | None = None,
    steps_sweep: str | None = None,
    card: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Draw held-out captions, measure, write ``report.json``, ``report.md``, ``report.html`` and ``samples.png``.

    Args:
        model: Folder or Hub name of a pipeline; user/name@revision is a commit, branch or tag.
        data: What `validate` takes; what cannot be read is left out.
        captions: File of captions, a line each, whose pictures the model has not seen.
        out: Folder for the results.
        validation_captions: File of the validation captions, which the model was not trained on either.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        network: What measures: efficientnet_lite0, inception, or a vision model's folder or Hub name (CLIP, DINOv2).
        clip: Folder or Hub name of a CLIP, for the CLIP score; none: not measured.
        factors: YAML or JSON file of the words that captions are composed of, by factor; none: not measured.
        variety_prompts: The first captions, of which several pictures are drawn, 2 or more; 0: not measured.
        num_images_per_prompt: How many of each, 2 or more.
        guidance_sweep: Guidance scales to draw the validation captions with, such as 1,1.25,1.5,2.
        steps_sweep: Numbers of steps to draw the validation captions with, such as 5,10,25,50.
        card: Put the results into the model's README.md, if the model is a folder that has one.
        trust_remote_code: Run the pipeline code that came with the model.

    """
    sweeps = ("guidance_scale", guidance_sweep), ("num_inference_steps", steps_sweep)
    values = {setting: numbers(setting, text) for setting, text in sweeps if text is not None}
    if values and validation_captions is None:
        raise ValueError(f"{next(iter(values))} is chosen on the validation captions: name --validation_captions")
    if variety_prompts and min(variety_prompts, num_images_per_prompt) < 2:
        raise ValueError(f"got {variety_prompts} prompts, {num_images_per_prompt} pictures of each; expected 2 or more")
    measuring = Evaluation(model, data, captions, validation_captions, network, trust_remote_code)
    if values:
        measuring.refuse_untold("sweeps")
    guided = {} if measuring.told == "batch_size" else {"guidance_scale": guidance_scale}
    call: dict[str, Any] = {"num_inference_steps": num_inference_steps} | guided
    wanted = read_captions(captions)
    parts = measuring.sections(wanted, seed, clip, factors, **call)
    if variety_prompts and measuring.told == "prompt":
        parts.append(measuring.variety(wanted[:variety_prompts], num_images_per_prompt, seed + VARIETY_SEED, **call))
    parts += [measuring.sweep(setting, points, seed, **call) for setting, points in values.items()]
    report = Report("Evaluation", measuring.model_name, measuring.settings(seed, wanted, call), parts)
    write(report, Path(out), Path(model) if card else None)
    return report


class Evaluation:
    """A pipeline, the data that it is measured on, and the network that measures."""

    def __init__(
        self, model: str, data: str, captions: str, validation: str | None, network: str, trust_remote_code: bool
    ):
        """Raise ValueError if the model, a part of it included, has seen what it is measured on or by."""
        self.model, self.validation = model, validation
        self.pipeline = load_pipeline(model, trust_remote_code)
        self.told = told_by(self.pipeline)
        held_out = {"test": captions} | ({"validation": validation} if validation else {})
        config = source_config(data, image_size=image_size(self.pipeline), held_out=held_out, on_bad_data="skip")
        self.images = CaptionedImages(checked_source(config), config)
        refuse_leak(model, self.images.splits.held_out_hash)
        self.network: FeatureNetwork = build_feature_network(network)
        refuse_teacher(model, self.network.name, self.network.sha256)
        self.gallery, self.place = self.images.gallery()
        self.gallery_features = self._gallery_features()

    def refuse_untold(self, what: str) -> None:
        """Raise ValueError, which says that `what` needs captions, if the model is told none."""
        if self.told != "prompt":
            raise ValueError(f"{what} are measured on captions, and {self.model_name} is told none; leave them out")

    @property
    def model_name(self) -> str:
        """What the model is called, without where it lies."""
        return Path(portable(self.model)).name or "model"

    def _gallery_features(self) -> NDArray[np.float32]:
        """Return the features of the gallery, (M, D), computed once and kept."""
        key = f"{self.images.key}/{self.network.sha256}/{self.network.resize}"

        def compute(rows: range) -> dict[str, Tensor]:
            return {"features": torch.from_numpy(self.network(self.gallery[rows.start : rows.stop]))}

        cached = CachedRows("features", key, len(self.gallery), compute)
        return np.stack([cached[row]["features"].numpy() for row in range(len(self.gallery))])

    def sections(
        self, captions: Sequence[str], seed: int, clip: str | None, factors: str | None, **call: Any
    ) -> list[Section]:
        """Return what is measured on one picture of each caption."""
        subject, name = self.subject(captions, seed, **call), self.network.name
        if self.told != "prompt":
            what = sections.drawn(subject)
            return [what, sections.likeness(subject, name), sections.memorisation(subject, name)]
        found = [sections.retrieval(subject, name)]
        if factors is not None:
            found.append(sections.caption_factors(subject, read_factors(factors), self.known_captions()))
        if clip is not None:
            score = ClipScore(clip).image_text_similarity
            found.append(sections.clip_scores(subject, score, Path(portable(clip)).name))
        found += [self.gain(captions, seed), sections.likeness(subject, name)]
        if subject.rebuilt is not None:
            found.append(autoencoder(subject, subject.rebuilt, name))
        return [*found, sections.memorisation(subject, name)]

    def variety(self, captions: Sequence[str], per_prompt: int, seed: int, **call: Any) -> Section:
        """Return how much `per_prompt` pictures of each caption differ."""
        repeated = [caption for caption in captions for _ in range(per_prompt)]
        drawn = sample_pictures(self.pipeline, repeated, seed, **call)
        return sections.variety(captions, drawn, self.network(drawn), per_prompt, self.network.name)

    def subject(self, captions: Sequence[str], seed: int, **call: Any) -> Subject:
        """Return the pictures that the model draws of `captions`, and what they are read beside."""
        own_index = np.array([self.place[picture] for picture in self.images.pictures_of(captions)])
        known = [
            (self.place[picture], caption)
            for picture in self.images.splits["train"]
            for caption in self.images.source.captions(picture)
        ]
        return Subject(
            captions=captions,
            generated=sample_pictures(self.pipeline, self.asked(captions), seed, self.told, **call),
            rebuilt=self._rebuilt(self.gallery[own_index]),
            gallery=self.gallery,
            own_index=own_index,
            training_captions=[caption for _, caption in known],
            training_index=np.array([place for place, _ in known]),
            embed=self.network,
            gallery_features=self.gallery_features,
        )

    def asked(self, captions: Sequence[str]) -> list[Any]:
        """Return what the pipeline is told for held-out captions: themselves, or None, no class in particular."""
        return list(captions) if self.told == "prompt" else [None] * len(captions)

    def _rebuilt(self, pictures: Images) -> Images | None:
        vae = self.pipeline.components.get("vae")
        return None if vae is None else to_uint8(reconstruct(vae, pixel_values(pictures))).numpy()

    def known_captions(self) -> Mapping[str, int]:
        """Return the place in the gallery of every caption of the data."""
        source = self.images.source
        return {caption: self.place[row] for row in range(len(source)) for caption in source.captions(row)}

    def gain(self, captions: Sequence[str], seed: int) -> Section:
        """Return the conditional gain, or why it was not measured."""
        own = [self.place[picture] for picture in self.images.pictures_of(captions)]
        try:
            losses = losses_with_and_without(self.pipeline, pixel_values(self.gallery[own]), captions, seed)
        except ValueError as error:
            return Section("What are the captions worth?", f"Not measured: {error}.")
        return sections.conditional_gain(losses, LEVELS)

    def headline(self, captions_file: str, seed: int, **call: Any) -> tuple[Measure, Measure]:
        """Return R@1 in pixels and KID of one picture of each caption in a file."""
        captions = read_captions(captions_file)
        own = np.array([self.place[picture] for picture in self.images.pictures_of(captions)])
        drawn = sample_pictures(self.pipeline, captions, seed, **call)
        hits = retrieval_ranks(drawn, self.gallery, own) == 0
        return mean_of(hits), kid(self.network(drawn), self.gallery_features[own])

    def sweep(self, setting: str, values: Sequence[float], seed: int, **call: Any) -> Section:
        """Return R@1 and KID of the validation captions at each value of a setting of sampling."""
        captions = cast(str, self.validation)
        points = {value: self.headline(captions, seed, **call | {setting: value}) for value in values}
        return sections.sweep(setting, points, self.network.name, log_x=setting == "num_inference_steps")

    def settings(self, seed: int, captions: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the numbers depend on."""
        record = read_provenance(self.model)
        training = None if record is None else {
            "steps": record.global_step,
            "seconds": record.train_seconds,
            "pictures per second": record.images_per_second,
            "hardware": record.hardware,
        }  # fmt: skip
        return {
            "captions": len(captions),
            "pictures in the data": len(self.gallery),
            "dataset": self.images.config.source,
            "split": "test",
            "pictures": self.images.source.fingerprint,
            "held out": self.images.splits.held_out_hash,
            "network that measures": f"{self.network.name}, weights {self.network.sha256[:16]}",
            "resize": self.network.resize,
            "sampler": type(self.pipeline.scheduler).__name__,
            **call,
            "seeds": f"{seed} to {seed + len(captions) - 1}",
            "interval": "central 95 % of a bootstrap over the pictures",
            "training": training,
            "hardware": hardware(),
            "versions": versions(),
        }


def autoencoder(subject: Subject, rebuilt_pictures: Images, network: str) -> Section:
    """Return how near the true pictures, (N, S, S, 3), come back from the autoencoder: no denoiser can be better."""
    true, rebuilt = pixel_values(subject.true), pixel_values(rebuilt_pictures)
    features = subject.features
    rows = [
        Row("PSNR, dB", mean_of(psnr(rebuilt, true).double().numpy()), "higher", {}),
        Row("SSIM", mean_of(ssim(rebuilt, true).double().numpy()), "higher", {}),
        Row(f"KID of reconstructions, {network}", kid(features["ceiling"], features["true"]), "lower", {}),
    ]
    text = "The true pictures of the held-out captions through the autoencoder and back."
    return Section("What can the latents carry?", text, rows)


def numbers(where: str, text: str) -> list[float]:
    """Return the numbers in a text, separated by commas, whole ones as int; ValueError, which names `where`."""
    try:
        found = [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{where}: got {text!r}; expected numbers separated by commas, such as 1,2,5") from None
    return [int(number) if number.is_integer() else number for number in found]


def pixel_values(pictures: Images) -> Tensor:
    """Return pictures, (N, H, W, 3) uint8, as (N, 3, H, W) in [-1, 1]."""
    return torch.stack([to_pixel_values(Image.fromarray(picture)) for picture in pictures])


def write(report: Report, folder: Path, model: Path | None) -> None:
    """Write a report into `folder` and, where `model` is the folder of a model with a card, into that."""
    if not PartialState().is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    sheet = report.sections[0].pictures[0].image
    sheet.save(folder / "samples.png")
    if model is not None and model.is_dir():
        merge_into_card(model, report)
    for row in report.headlines:
        print(f"{row.name}: {row.measure}{'; a copier reaches this' if row.copied else ''}")
    print(f"the whole report: {folder / 'report.html'}")
