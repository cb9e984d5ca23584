"""The evaluation of a pipeline on held-out images: it samples, measures, and fills the sections of a report."""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config import DataConfig, DataOptions
from ldm.config.check import checked
from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.config.places import portable
from ldm.data.batches import CaptionedImages
from ldm.data.cache import CachedRows
from ldm.data.pixels import to_uint8
from ldm.data.preflight import checked_source
from ldm.data.sources import OWN, source_config
from ldm.evaluation import sections
from ldm.evaluation.baselines import derangement, nearest_training_captions
from ldm.evaluation.classes import ClassJudge, class_section
from ldm.evaluation.conditions import CONDITIONS, condition_by
from ldm.evaluation.distances import kid
from ldm.evaluation.factors import read_factors
from ldm.evaluation.gain import LEVELS, losses_with_and_without
from ldm.evaluation.images import pixel_values
from ldm.evaluation.leaks import refuse_leaks, refuse_teacher
from ldm.evaluation.likelihood import bound_section, check_bound, variational_bound
from ldm.evaluation.measure import Indices, Measure, mean_of
from ldm.evaluation.report import Report, Section
from ldm.evaluation.retrieval import retrieval_ranks
from ldm.evaluation.sampling import sample_images
from ldm.evaluation.subject import Subject
from ldm.files import read_lines
from ldm.machine import hardware
from ldm.models.autoencoder import reconstruct
from ldm.models.pipeline import call_settings, image_size, load_pipeline, own_settings
from ldm.models.provenance import Provenance, read_provenance, versions
from ldm.models.vision import ClipScore, FeatureNetwork, Images, build_feature_network

log = logging.getLogger(__name__)
OF_ITEMS = ("groups", "items", "num_frames", "video_frames", "stride", "frame_rate", "short_films")
"""Fields that say which items are taken of one source, and mean nothing of another."""
FEWEST = 4
"""Held-out images that an evaluation needs: some distances compare one half of them with the other, of two each."""


def read_as_trained(
    record: Provenance | None, data: str | None, options: DataOptions, captions: Mapping[str, str], **more: Any
) -> DataConfig:
    """Return the data config of an evaluation: `options`, completed by what the model's training recorded.

    Settings that are taken from the `record` and used are logged. captions: files of held-out captions by split, which
    replace those of the record. If the options have held_out or held_out_percent, nothing is held out by the record.
    more: other fields of the config.

    Raises:
        ValueError: no data are named and the model was not trained on openmoji; a file of captions that its training
            held out is not here; or, ConfigError, an option is out of its range.

    """
    trained = {} if record is None else dict(record.data_options)
    source = trained.pop("source", None)
    if data is None and source not in OWN:
        raise ValueError("data: name the images to measure on, --data")
    if data not in (None, source):
        trained = {name: value for name, value in trained.items() if name not in OF_ITEMS}
    recorded: dict[str, str] = portable(trained.pop("held_out", {}))
    if {"held_out", "held_out_percent"} & options.keys():
        recorded = {}
    listed = {split: file for split, file in recorded.items() if split not in captions}
    for split, file in listed.items():
        if not Path(file).is_file():
            option = "--captions" if split == "test" else "--validation_captions"
            raise ValueError(
                f"the model's training held out the captions in {file}, and there is no such file here; name it, "
                f"{option}, or say --held_out {{}} for a split by hash"
            )
    files = {**options.get("held_out", listed), **captions}
    if files:
        trained.pop("held_out_percent", None)
    taken = {"held_out": listed} | {name: value for name, value in trained.items() if name not in options}
    values: dict[str, Any] = {**more, **taken, **options, "held_out": files}
    config = source_config(data or str(source), **values)
    usual = DataConfig()
    if read := [f"{name} {value}" for name, value in taken.items() if value != getattr(usual, name)]:
        _say(f"read as the model's training read its data, where no option says otherwise: {', '.join(read)}")
    if source is not None and source != config.source and "source" not in options:
        _say(f"read as {config.source}; the model's training read its data as {source} (--source)")
    if "test" not in files and files:
        raise ValueError("validation_captions: without captions images are held out by hash; name both")
    return checked(config, "data")


@cache
def _say(message: str) -> None:
    """Log a message once; the same message again is not logged."""
    log.info(message)


def held_out_captions(images: CaptionedImages, worded: bool) -> tuple[list[str], list[int]]:
    """Return the held-out captions and the rows of their images in the source, one of each per image.

    worded: images without a caption are left out. ValueError if none is left.
    """
    if (listed := images.config.held_out.get("test")) is not None:
        wanted = read_lines(listed)
        return wanted, images.rows_of(wanted)
    source, rows = images.source, images.splits["test"]
    known = [(next(iter(source.captions(row)), ""), row) for row in rows]
    found = [(caption, row) for caption, row in known if caption or not worded]
    if not rows:
        raise ValueError("the test split by hash has no images to measure on; raise held_out_percent")
    if not found:
        raise ValueError(
            f"none of the {len(rows)} images of the test split has a caption; name their column in caption_column"
        )
    return [caption for caption, _ in found], [row for _, row in found]


def training_in_short(record: Provenance | None) -> dict[str, Any] | None:
    """Return what a report says of a model's training; None if it is not known."""
    if record is None:
        return None
    return {
        "steps": record.global_step,
        "seconds": record.train_seconds,
        "images per second": record.images_per_second,
        "hardware": record.hardware,
    }


def refuse_clips(images: CaptionedImages) -> None:
    """Raise ValueError for clips and their frames: a caption belongs to all frames of a clip, and to no one image."""
    if images.source.num_frames is not None or images.source.wholes is not None:
        raise ValueError("data: clips, or frames of clips; only images with captions of their own are measured here")


class Evaluation:
    """A pipeline, the held-out images that it is measured on, and the network that the features are of."""

    def __init__(
        self,
        model: str,
        data: str | None,
        options: DataOptions,
        captions: Mapping[str, str],
        network: str,
        trust_remote_code: bool = False,
    ):
        """Load everything; `read_as_trained` says which images are held out.

        Raises ValueError if the model or a part of it was trained on these images, or with the network that measures.
        """
        self.model, self.pipeline = model, load_pipeline(model, trust_remote_code)
        if "num_frames" in inspect.signature(self.pipeline.__call__).parameters:
            raise ValueError(f"{model}: samples clips; only pipelines of images are measured here")
        self.pipeline.set_progress_bar_config(disable=True)  # `sample_images` has one over all its calls
        self.condition, self.record = condition_by(self.pipeline), read_provenance(model)
        if self.condition is not CONDITIONS["class_labels"]:
            if options.get("class_column") is not None:
                raise ValueError(f"class_column: {self.model_name} is conditioned on no classes; leave it out")
            options = {**options, "class_column": None}
        more = {"image_size": image_size(self.pipeline), "on_bad_data": "skip"}
        config = read_as_trained(self.record, data, options, captions, **more)
        self.images = CaptionedImages(checked_source(config), config)
        refuse_clips(self.images)
        refuse_leaks([model], self.images)
        self.network: FeatureNetwork = build_feature_network(network)
        refuse_teacher(model, self.network.name, self.network.sha256)
        self.gallery, self.place = self.images.gallery()
        self.gallery_features = self._gallery_features()
        self.captions, self.rows = held_out_captions(self.images, self.condition.worded)
        self._say_what_is_cut()

    @property
    def validation(self) -> str:
        """The path of the file of validation captions."""
        return self.images.config.held_out["validation"]

    def _say_what_is_cut(self) -> None:
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        if tokenizer is None:
            return
        most = tokenizer.model_max_length
        cut = sum(len(ids) > most for ids in tokenizer(self.captions, verbose=False)["input_ids"])
        if cut:
            log.info("the model reads %d tokens, and cuts %d of %d captions", most, cut, len(self.captions))

    def refuse_unchosen(self, what: str) -> None:
        """Raise ValueError, which names `what`, if there are too few validation captions to choose it on."""
        self._refuse_unworded(what)
        if "validation" not in self.images.config.held_out:
            raise ValueError(f"{what} are chosen on the validation captions: name --validation_captions")
        if len(read_lines(self.validation)) < 2:
            raise ValueError(f"{what} are chosen on the validation captions: got one; expected two or more")

    def _refuse_unworded(self, what: str) -> None:
        if not self.condition.worded:
            raise ValueError(f"{what} are measured on captions, and {self.model_name} takes none; leave them out")

    def check(
        self, prompts: int, classes: Sequence[int] | None, several: int, timesteps: int, sweeps: Mapping[str, Any]
    ) -> None:
        """Raise ValueError for images or settings that cannot be measured; nothing is sampled."""
        if len(self.rows) < FEWEST:
            raise ValueError(
                f"too few held-out images to measure on: got {len(self.rows)}, expected {FEWEST} or more; list more "
                "captions in the file of --captions, or train with a larger data.held_out_percent"
            )
        if self.condition.worded:
            derangement(self._places(self.rows))
        if prompts and min(prompts, several) < 2:
            raise ValueError(f"got {prompts} prompts, {several} images of each; expected 2 or more")
        if self.images.config.class_column is not None:
            self._judge(classes)
        elif classes is not None:
            raise ValueError("classes: the data has none; name their column in class_column")
        if None in self.asked() and "batch_size" not in inspect.signature(self.pipeline.__call__).parameters:
            raise ValueError(f"class_column: {type(self.pipeline).__name__} samples classes; name the column of them")
        if timesteps:
            check_bound(self.pipeline, timesteps)
        if sweeps:
            self.refuse_unchosen("sweeps")
            for name, values in sweeps.items():
                for value in values:
                    if name not in self.call(**{"num_inference_steps": 1, "guidance_scale": None, name: value}):
                        raise ValueError(f"{name}: {type(self.pipeline).__name__} has none to sweep")

    @property
    def model_name(self) -> str:
        """The last part of the model's path or Hub name."""
        return Path(portable(self.model)).name or "model"

    def _gallery_features(self) -> NDArray[np.float32]:
        """Return the features of the gallery, (M, D); they are cached between runs."""
        key = f"{self.images.key}/{self.network.sha256}/{self.network.resize}"

        def compute(rows: range) -> dict[str, Tensor]:
            return {"features": torch.from_numpy(self.network(self.gallery[rows.start : rows.stop]))}

        cached = CachedRows("features", key, len(self.gallery), compute)
        return np.stack([cached[row]["features"].numpy() for row in range(len(self.gallery))])

    def further(self, factors: str | None, clip: str | None) -> list[Callable[[Subject], Section]]:
        """Return what makes the further sections on captions: on the words in the file `factors`, and of a CLIP.

        Both are read here, before anything is sampled. ValueError if the model takes no captions.
        """
        found: list[Callable[[Subject], Section]] = []
        if factors is not None:
            self._refuse_unworded("factors")
            words = read_factors(factors)
            found.append(lambda subject: sections.caption_factors(subject, words, self.known_captions()))
        if clip is not None:
            self._refuse_unworded("CLIP scores")
            score, name = ClipScore(clip).image_text_similarity, Path(portable(clip)).name
            found.append(lambda subject: sections.clip_scores(subject, score, name))
        return found

    def sections(self, seed: int, further: Sequence[Callable[[Subject], Section]], **call: Any) -> list[Section]:
        """Return the sections that need one image for each held-out image: of its caption, or of its class or none."""
        subject, name = self.subject(seed, **call), self.network.name
        if not self.condition.worded:
            return [sections.samples(subject), sections.likeness(subject, name), sections.memorisation(subject, name)]
        found = [sections.retrieval(subject, name), *(measure(subject) for measure in further)]
        found += [self.gain(seed), sections.likeness(subject, name)]
        if subject.rebuilt is not None:
            found.append(sections.autoencoder(subject, subject.rebuilt, name))
        return [*found, sections.memorisation(subject, name)]

    def call(self, num_inference_steps: int, guidance_scale: float | None) -> dict[str, Any]:
        """Return the sampling settings that the pipeline takes; raises as `call_settings`."""
        return call_settings(self.pipeline, num_inference_steps, guidance_scale)

    def repeated(
        self, prompts: int, classes: Sequence[int] | None, several: int, seed: int, **call: Any
    ) -> list[Section]:
        """Return the sections that need `several` images of one condition: of the first captions, or of each class."""
        if self.condition.worded and prompts:
            return [self.variety(self.captions[:prompts], several, seed, **call)]
        if self.images.config.class_column is None:
            return []
        return [self.classes(self._judge(classes), several, seed, **call)]

    def variety(self, captions: Sequence[str], per_prompt: int, seed: int, **call: Any) -> Section:
        """Return the section on how much `per_prompt` images of each caption differ."""
        repeated = [caption for caption in captions for _ in range(per_prompt)]
        images = sample_images(self.pipeline, repeated, seed, self.condition.keyword, **call)
        return sections.variety(captions, images, self.network(images), per_prompt, self.network.name)

    def subject(self, seed: int, **call: Any) -> Subject:
        """Return one sampled image for each held-out one, with the true images and the baselines."""
        own_index, train = self._places(self.rows), self.images.splits["train"]
        return Subject(
            captions=self.captions,
            generated=sample_images(self.pipeline, self.asked(), seed, self.condition.keyword, **call),
            rebuilt=self._rebuilt(self.gallery[own_index]),
            gallery=self.gallery,
            own_index=own_index,
            copied_index=self._places(self._copied(train)),
            training_images=np.unique(self._places(train)),
            embed=self.network,
            gallery_features=self.gallery_features,
        )

    def _copied(self, train: Sequence[int]) -> list[int]:
        """Return the rows of the images that a copier of training images returns, one for each held-out image.

        It is the image of the nearest training caption; without captions, a random one of the class, or of all.
        """
        source = self.images.source
        if self.condition.worded:
            known = [(row, caption) for row in train for caption in source.captions(row)]
            nearest = nearest_training_captions(self.captions, [caption for _, caption in known])
            return [known[place][0] for place in nearest]
        of_class: dict[int, list[int]] = defaultdict(list)
        for row, label in zip(train, self._labels(train), strict=True):
            of_class[label].append(row)
        rng = np.random.default_rng(0)
        return [int(rng.choice(of_class.get(label) or train)) for label in self._labels(self.rows)]

    def asked(self) -> list[Any]:
        """Return the condition of each held-out image: its caption, or its class; None for an image that has none."""
        if self.condition.worded:
            return list(self.captions)
        return [self.condition.of(self.images, row) for row in self.rows]

    def _labels(self, rows: Sequence[int]) -> list[int]:
        labels = (self.images.source.class_label(row) for row in rows)
        return [UNKNOWN_CLASS if label is None else label for label in labels]

    def _places(self, rows: Sequence[int]) -> Indices:
        return np.array([self.place[row] for row in rows])

    def _judge(self, chosen: Sequence[int] | None) -> ClassJudge:
        """Return the judge of the `chosen` classes, or of all classes of the data."""
        train = [row for row in self.images.splits["train"] if self._labels([row]) != [UNKNOWN_CLASS]]
        return ClassJudge(self.gallery_features[self._places(train)], self._labels(train), chosen)

    def classes(self, judge: ClassJudge, per_class: int, seed: int, **call: Any) -> Section:
        """Return the section on `per_class` images of each of the judge's classes."""
        asked = np.repeat(judge.classes, per_class)
        images = sample_images(self.pipeline, asked.tolist(), seed, self.condition.keyword, **call)
        true = [row for row in self.rows if self._labels([row])[0] in judge.classes]
        answers = {"generated": (judge(self.network(images)), asked)}
        if true:
            answers["ceiling"] = judge(self.gallery_features[self._places(true)]), np.array(self._labels(true))
        return class_section(images, answers, judge.classes, per_class, self.network.name)

    def bound(self, timesteps: int, seed: int) -> Section:
        """Return the section on the bits per dimension of the held-out images."""
        null = self.condition.null_class(self.pipeline)
        labels = None if null is None else [null if label is None else label for label in self.asked()]
        true = self.gallery[self._places(self.rows)]
        bits = variational_bound(self.pipeline, pixel_values(true), labels, timesteps, seed)
        training = self.gallery[np.unique(self._places(self.images.splits["train"]))]
        return bound_section(bits, true, training)

    def _rebuilt(self, images: Images) -> Images | None:
        vae = self.pipeline.components.get("vae") or self.pipeline.components.get("movq")
        return None if vae is None else to_uint8(reconstruct(vae, pixel_values(images))).numpy()

    def known_captions(self) -> Mapping[str, int]:
        """Return every caption of the data with the place of its image in the gallery."""
        source = self.images.source
        return {caption: self.place[row] for row in range(len(source)) for caption in source.captions(row)}

    def gain(self, seed: int) -> Section:
        """Return the section on the conditional gain; if it cannot be measured, the section says why."""
        true = pixel_values(self.gallery[self._places(self.rows)])
        try:
            losses = losses_with_and_without(self.pipeline, true, self.captions, seed)
        except ValueError as error:
            return Section("What are the captions worth?", f"Not measured: {error}.")
        return sections.caption_gain(losses, LEVELS)

    def headline(self, captions_file: str, seed: int, **call: Any) -> tuple[Measure, Measure]:
        """Return R@1 in pixels and KID, from one sampled image for each caption in a file."""
        captions = read_lines(captions_file)
        own = self._places(self.images.rows_of(captions))
        images = sample_images(self.pipeline, captions, seed, self.condition.keyword, **call)
        hits = retrieval_ranks(images, self.gallery, own) == 0
        return mean_of(hits), kid(self.network(images), self.gallery_features[own])

    def sweeps(self, values: Mapping[str, Sequence[float]], seed: int, **call: Any) -> list[Section]:
        """Return a section for each swept setting: R@1 and KID of the validation captions at each of its values."""
        found = []
        for name, several in values.items():
            points = {value: self.headline(self.validation, seed, **call | {name: value}) for value in several}
            found.append(sections.sweep(name, points, self.network.name, log_x=name == "num_inference_steps"))
        return found

    def report(self, parts: Sequence[Section], seed: int, call: Mapping[str, Any]) -> Report:
        """Return the report of these sections."""
        return Report("Evaluation", self.model_name, self.settings(seed, call), parts)

    def settings(self, seed: int, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that the numbers depend on, as the report shows them."""
        return {
            "captions": len(self.rows),
            "images in the data": len(self.gallery),
            "dataset": self.images.config.source,
            "split": "test",
            "images": self.images.source.fingerprint,
            "held out": self.images.splits.held_out_hash,
            "network that measures": f"{self.network.name}, weights {self.network.sha256[:16]}",
            "resize": self.network.resize,
            "sampler": type(self.pipeline.scheduler).__name__,
            **own_settings(self.pipeline),
            **call,
            "seeds": f"{seed} to {seed + len(self.rows) - 1}",
            "interval": "central 95 % of a bootstrap over the images",
            "training": training_in_short(self.record),
            "hardware": hardware(),
            "versions": versions(),
        }
