"""A pipeline, the held-out pictures that it is measured on, and the network that measures: question by question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config_conditioners import UNKNOWN_CLASS
from ldm.data.batches import CaptionedImages
from ldm.data.cache import CachedRows
from ldm.data.pixels import to_uint8
from ldm.data.preflight import checked_source
from ldm.data.sources import source_config
from ldm.evaluation import sections
from ldm.evaluation.baselines import nearest_training_captions
from ldm.evaluation.classes import ClassJudge, class_section
from ldm.evaluation.distances import kid
from ldm.evaluation.factors import read_factors
from ldm.evaluation.gain import LEVELS, losses_with_and_without
from ldm.evaluation.likelihood import bound_section, check_bound, variational_bound
from ldm.evaluation.measure import Indices, Measure, mean_of
from ldm.evaluation.pictures import Images, pixel_values
from ldm.evaluation.report import Report, Section
from ldm.evaluation.retrieval import retrieval_ranks
from ldm.evaluation.sampling import sample_pictures
from ldm.evaluation.subject import Subject
from ldm.models.pipeline import image_size, load_pipeline, told_by
from ldm.models.vision import ClipScore, FeatureNetwork, build_feature_network
from ldm.places import portable
from ldm.provenance import hardware, read_provenance, refuse_teacher, versions
from ldm.text_file import read_lines
from ldm.training.autoencoding import reconstruct
from ldm.training.record import refuse_leaks


class Evaluation:
    """A pipeline, the data that it is measured on, and the network that measures."""

    def __init__(
        self,
        model: str,
        data: str,
        captions: str | None,
        validation: str | None,
        held_out_percent: float,
        network: str,
        trust_remote_code: bool,
        class_column: str | None = None,
    ):
        """Measure on the pictures of a file of captions, or of the test split by hash, `held_out_percent` of them.

        ValueError if the model, a part of it included, has seen what it is measured on or by.
        """
        self.model, self.validation = model, validation
        self.pipeline = load_pipeline(model, trust_remote_code)
        self.told = told_by(self.pipeline)
        files = {"test": captions, "validation": validation}
        held_out = {split: file for split, file in files.items() if file is not None}
        if captions is None and validation is not None:
            raise ValueError("validation_captions: without captions pictures are held out by hash; name both")
        if class_column is not None and self.told != "class_labels":
            raise ValueError(f"class_column: {self.model_name} is told no classes; leave it out")
        config = source_config(
            data,
            image_size=image_size(self.pipeline),
            held_out=held_out,
            held_out_percent=held_out_percent,
            class_column=class_column,
            on_bad_data="skip",
        )
        self.images = CaptionedImages(checked_source(config), config)
        refuse_leaks([model], self.images)
        self.network: FeatureNetwork = build_feature_network(network)
        refuse_teacher(model, self.network.name, self.network.sha256)
        self.gallery, self.place = self.images.gallery()
        self.gallery_features = self._gallery_features()
        self.captions, self.rows = self._held_out(captions)

    def _held_out(self, captions: str | None) -> tuple[list[str], list[int]]:
        """Return what is measured on, captions and their pictures' rows."""
        if captions is not None:
            wanted = read_lines(captions)
            return wanted, self.images.pictures_of(wanted)
        source, rows = self.images.source, self.images.splits["test"]
        known = [(next(iter(source.captions(row)), ""), row) for row in rows]
        found = [(caption, row) for caption, row in known if caption or self.told != "prompt"]
        if not found:
            raise ValueError("the test split by hash has no pictures to measure on; raise held_out_percent")
        return [caption for caption, _ in found], [row for _, row in found]

    def refuse_untold(self, what: str) -> None:
        """Raise ValueError, which says that `what` needs captions, if the model is told none."""
        if self.told != "prompt":
            raise ValueError(f"{what} are measured on captions, and {self.model_name} is told none; leave them out")

    def check(
        self, prompts: int, classes: Sequence[int] | None, several: int, timesteps: int, sweeps: Mapping[str, Any]
    ) -> None:
        """Raise ValueError, before anything is drawn, for what `repeated`, `bound` and `sweeps` cannot measure."""
        if prompts and min(prompts, several) < 2:
            raise ValueError(f"got {prompts} prompts, {several} pictures of each; expected 2 or more")
        if self.images.config.class_column is not None:
            self._judge(classes)
        elif classes is not None:
            raise ValueError("classes: the data has none; name their column in class_column")
        if timesteps:
            check_bound(self.pipeline, timesteps)
        if sweeps:
            self.refuse_untold("sweeps")

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

    def sections(self, seed: int, clip: str | None, factors: str | None, **call: Any) -> list[Section]:
        """Return what is measured on one picture of each caption, or as many pictures of a model that is told none."""
        subject, name = self.subject(seed, **call), self.network.name
        if self.told != "prompt":
            what = sections.drawn(subject)
            return [what, sections.likeness(subject, name), sections.memorisation(subject, name)]
        found = [sections.retrieval(subject, name)]
        if factors is not None:
            found.append(sections.caption_factors(subject, read_factors(factors), self.known_captions()))
        if clip is not None:
            score = ClipScore(clip).image_text_similarity
            found.append(sections.clip_scores(subject, score, Path(portable(clip)).name))
        found += [self.gain(seed), sections.likeness(subject, name)]
        if subject.rebuilt is not None:
            found.append(sections.autoencoder(subject, subject.rebuilt, name))
        return [*found, sections.memorisation(subject, name)]

    def call(self, num_inference_steps: int, guidance_scale: float) -> dict[str, Any]:
        """Return the settings of sampling that the pipeline takes."""
        guided = {} if self.told == "batch_size" else {"guidance_scale": guidance_scale}
        return {"num_inference_steps": num_inference_steps} | guided

    def repeated(
        self, prompts: int, classes: Sequence[int] | None, several: int, seed: int, **call: Any
    ) -> list[Section]:
        """Return what only `several` pictures of the same show: of the first captions, or of each class."""
        if self.told == "prompt" and prompts:
            return [self.variety(self.captions[:prompts], several, seed, **call)]
        if self.images.config.class_column is None:
            return []
        return [self.classes(self._judge(classes), several, seed, **call)]

    def variety(self, captions: Sequence[str], per_prompt: int, seed: int, **call: Any) -> Section:
        """Return how much `per_prompt` pictures of each caption differ."""
        repeated = [caption for caption in captions for _ in range(per_prompt)]
        drawn = sample_pictures(self.pipeline, repeated, seed, **call)
        return sections.variety(captions, drawn, self.network(drawn), per_prompt, self.network.name)

    def subject(self, seed: int, **call: Any) -> Subject:
        """Return the pictures that the model draws for the held-out ones, and what they are read beside."""
        own_index, train = self._places(self.rows), self.images.splits["train"]
        return Subject(
            captions=self.captions,
            generated=sample_pictures(self.pipeline, self.asked(), seed, self.told, **call),
            rebuilt=self._rebuilt(self.gallery[own_index]),
            gallery=self.gallery,
            own_index=own_index,
            copied_index=self._places(self._copied(train)),
            training_pictures=np.unique(self._places(train)),
            embed=self.network,
            gallery_features=self.gallery_features,
        )

    def _copied(self, train: Sequence[int]) -> list[int]:
        """Return what a copier answers: the picture of the nearest training caption, or one of the class, or any."""
        source = self.images.source
        if self.told == "prompt":
            known = [(row, caption) for row in train for caption in source.captions(row)]
            nearest = nearest_training_captions(self.captions, [caption for _, caption in known])
            return [known[place][0] for place in nearest]
        of_class: dict[int, list[int]] = defaultdict(list)
        for row, label in zip(train, self._labels(train), strict=True):
            of_class[label].append(row)
        rng = np.random.default_rng(0)
        return [int(rng.choice(of_class.get(label) or train)) for label in self._labels(self.rows)]

    def asked(self) -> list[Any]:
        """Return what the pipeline is told for the held-out pictures: captions, or classes, None for none of them."""
        if self.told == "prompt":
            return list(self.captions)
        return [None if label == UNKNOWN_CLASS else label for label in self._labels(self.rows)]

    def _labels(self, rows: Sequence[int]) -> list[int]:
        labels = (self.images.source.class_label(row) for row in rows)
        return [UNKNOWN_CLASS if label is None else label for label in labels]

    def _places(self, rows: Sequence[int]) -> Indices:
        return np.array([self.place[row] for row in rows])

    def _judge(self, chosen: Sequence[int] | None) -> ClassJudge:
        """Return what tells classes apart, those of the data unless some are `chosen`."""
        train = [row for row in self.images.splits["train"] if self._labels([row]) != [UNKNOWN_CLASS]]
        return ClassJudge(self.gallery_features[self._places(train)], self._labels(train), chosen)

    def classes(self, judge: ClassJudge, per_class: int, seed: int, **call: Any) -> Section:
        """Return whether `per_class` pictures of each of the judge's classes are told apart."""
        asked = np.repeat(judge.classes, per_class)
        drawn = sample_pictures(self.pipeline, asked.tolist(), seed, self.told, **call)
        true = [row for row in self.rows if self._labels([row])[0] in judge.classes]
        answers = {"generated": (judge(self.network(drawn)), asked)}
        if true:
            answers["ceiling"] = judge(self.gallery_features[self._places(true)]), np.array(self._labels(true))
        return class_section(drawn, answers, judge.classes, per_class, self.network.name)

    def bound(self, timesteps: int, seed: int) -> Section:
        """Return the bits per dimension of the held-out pictures."""
        labels = None
        if self.told == "class_labels" and (null := self.pipeline.num_classes):
            labels = [null if label is None else label for label in self.asked()]
        true = self.gallery[self._places(self.rows)]
        bits = variational_bound(self.pipeline, pixel_values(true), labels, timesteps, seed)
        training = self.gallery[np.unique(self._places(self.images.splits["train"]))]
        return bound_section(bits, true, training)

    def _rebuilt(self, pictures: Images) -> Images | None:
        vae = self.pipeline.components.get("vae")
        return None if vae is None else to_uint8(reconstruct(vae, pixel_values(pictures))).numpy()

    def known_captions(self) -> Mapping[str, int]:
        """Return the place in the gallery of every caption of the data."""
        source = self.images.source
        return {caption: self.place[row] for row in range(len(source)) for caption in source.captions(row)}

    def gain(self, seed: int) -> Section:
        """Return the conditional gain, or why it was not measured."""
        true = pixel_values(self.gallery[self._places(self.rows)])
        try:
            losses = losses_with_and_without(self.pipeline, true, self.captions, seed)
        except ValueError as error:
            return Section("What are the captions worth?", f"Not measured: {error}.")
        return sections.conditional_gain(losses, LEVELS)

    def headline(self, captions_file: str, seed: int, **call: Any) -> tuple[Measure, Measure]:
        """Return R@1 in pixels and KID of one picture of each caption in a file."""
        captions = read_lines(captions_file)
        own = self._places(self.images.pictures_of(captions))
        drawn = sample_pictures(self.pipeline, captions, seed, **call)
        hits = retrieval_ranks(drawn, self.gallery, own) == 0
        return mean_of(hits), kid(self.network(drawn), self.gallery_features[own])

    def sweeps(self, values: Mapping[str, Sequence[float]], seed: int, **call: Any) -> list[Section]:
        """Return R@1 and KID of the validation captions at each value of each setting of sampling."""
        captions, found = cast(str, self.validation), []
        for name, several in values.items():
            points = {value: self.headline(captions, seed, **call | {name: value}) for value in several}
            found.append(sections.sweep(name, points, self.network.name, log_x=name == "num_inference_steps"))
        return found

    def report(self, parts: Sequence[Section], seed: int, call: Mapping[str, Any]) -> Report:
        """Return the report that these sections make."""
        return Report("Evaluation", self.model_name, self.settings(seed, call), parts)

    def settings(self, seed: int, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the numbers depend on."""
        record = read_provenance(self.model)
        training = None if record is None else {
            "steps": record.global_step,
            "seconds": record.train_seconds,
            "pictures per second": record.images_per_second,
            "hardware": record.hardware,
        }  # fmt: skip
        return {
            "captions": len(self.rows),
            "pictures in the data": len(self.gallery),
            "dataset": self.images.config.source,
            "split": "test",
            "pictures": self.images.source.fingerprint,
            "held out": self.images.splits.held_out_hash,
            "network that measures": f"{self.network.name}, weights {self.network.sha256[:16]}",
            "resize": self.network.resize,
            "sampler": type(self.pipeline.scheduler).__name__,
            **call,
            "seeds": f"{seed} to {seed + len(self.rows) - 1}",
            "interval": "central 95 % of a bootstrap over the pictures",
            "training": training,
            "hardware": hardware(),
            "versions": versions(),
        }
