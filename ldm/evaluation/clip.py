"""The measurement of a CLIP: captions find their images, and images their captions, among all of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.config import DataOptions
from ldm.config.places import portable
from ldm.data.batches import CaptionedImages
from ldm.data.preflight import checked_source
from ldm.evaluation.baselines import derangement, nearest_training_captions
from ldm.evaluation.evaluation import held_out_captions, read_as_trained, refuse_clips, training_in_short
from ldm.evaluation.images import nearest_sheet, pixel_values
from ldm.evaluation.leaks import refuse_leaks
from ldm.evaluation.measure import Indices, mean_of
from ldm.evaluation.report import Curve, Figure, Report, Row, Section
from ldm.evaluation.retrieval import feature_distances, ranks_among, recalls
from ldm.machine import hardware
from ldm.models.clip import embedded_captions, embedded_images, load_clip
from ldm.models.provenance import read_provenance, versions

SHEET_CAPTIONS = 12
DEPTHS = (1, 2, 3, 5, 10, 20, 50, 100)
"""The k of the curves of R@k."""
Embeds = NDArray[np.float32]


class ClipEvaluation:
    """A CLIP, and the held-out captions and images that it is measured on."""

    def __init__(self, model: str, data: str | None, options: DataOptions, captions: Mapping[str, str]):
        """Load everything; `read_as_trained` says which images are held out.

        Raises ValueError if the model was trained on these images.
        """
        self.name, self.record = Path(portable(model)).name or "model", read_provenance(model)
        self.clip, self.tokenizer = load_clip(model, "model")
        size = self.clip.config.vision_config.image_size
        config = read_as_trained(self.record, data, options, captions, image_size=size, on_bad_data="skip")
        self.images = CaptionedImages(checked_source(config), config)
        refuse_clips(self.images)
        refuse_leaks([model], self.images)
        self.captions, rows = held_out_captions(self.images, worded=True)
        self.gallery, place = self.images.gallery()
        self.own = np.array([place[row] for row in rows])
        train = [(place[row], caption) for row in self.images.splits["train"] for caption in self._of(row)]
        nearest = nearest_training_captions(self.captions, [caption for _, caption in train])
        self.copied = np.array([train[number][0] for number in nearest])
        self.all_captions = self.images.gallery_captions(
            place, dict(zip(self.own.tolist(), self.captions, strict=True))
        )

    def _of(self, row: int) -> Sequence[str]:
        return self.images.source.captions(row)

    def report(self) -> Report:
        """Return the report."""
        images = embedded_images(self.clip, pixel_values(self.gallery)).numpy()
        texts = embedded_captions(self.clip, self.tokenizer, self.all_captions).numpy()
        sections = [self._images_of_captions(images, texts), self._captions_of_images(images, texts)]
        return Report("Evaluation", self.name, self._settings(), sections)

    def _images_of_captions(self, images: Embeds, texts: Embeds) -> Section:
        distances = feature_distances(texts[self.own], images)
        copied = feature_distances(images[self.copied], images)
        found = {"caption": ranks_among(distances, self.own), **self._floors(distances)}
        found["copy"] = ranks_among(copied, self.own)
        count = len(images)
        text = (
            f"R@k is the share of the {len(self.own)} held-out captions whose own image is among the k nearest of all "
            f"{count} distinct images of the data, training images included. The distance is one minus the cosine of "
            "the embeddings. Ties are misses. Copy: the image of the nearest training caption, in place of the caption."
        )
        meaning = f"Share of the held-out captions whose own image is the nearest of {count:,}."
        shown = slice(SHEET_CAPTIONS)
        sheet = nearest_sheet(self.captions[shown], self.gallery, self.own[shown], distances[shown])
        figures = [Figure("Captions, their own images, and the nearest", "", sheet)]
        return _section("Do captions find their images?", text, found, count, figures, meaning)

    def _captions_of_images(self, images: Embeds, texts: Embeds) -> Section:
        distances = feature_distances(images[self.own], texts)
        found = {"image": ranks_among(distances, self.own), **self._floors(distances)}
        text = f"The same from the held-out images to one caption of each of the {len(texts)} images."
        meaning = f"Share of the held-out images whose own caption is the nearest of {len(texts):,}."
        return _section("Do images find their captions?", text, found, len(texts), (), meaning)

    def _floors(self, distances: NDArray[np.float64]) -> dict[str, Indices]:
        return {"shuffled": ranks_among(distances, self.own[derangement(self.own)])}

    def _settings(self) -> dict[str, Any]:
        return {
            "captions": len(self.own),
            "images in the data": len(self.gallery),
            "dataset": self.images.config.source,
            "split": "test",
            "images": self.images.source.fingerprint,
            "held out": self.images.splits.held_out_hash,
            "interval": "central 95 % of a bootstrap over the captions",
            "training": training_in_short(self.record),
            "hardware": hardware(),
            "versions": versions(),
        }


def _section(
    title: str, text: str, found: Mapping[str, Indices], count: int, figures: Sequence[Figure], meaning: str
) -> Section:
    """Return the section on ranks, (N,) each: the first of `found` are the model's, the others baselines."""
    own, *others = found
    at = {name: recalls(of) for name, of in found.items()}
    rows = [
        Row(f"R@{k}, {own}", value, "higher", {name: at[name][k] for name in others}, f"chance {k / count:.2g}")
        for k, value in at[own].items()
    ]
    lines = {name: [(float(k), mean_of(of < k)) for k in DEPTHS if k <= count] for name, of in found.items()}
    curve = Curve(title, "k", "R@k", lines, log_x=True)
    return Section(title, text, rows, [curve], figures, meaning)
