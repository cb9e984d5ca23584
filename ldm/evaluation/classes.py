"""The accuracy of class-conditional images, by a linear classifier on features, and its section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from ldm.evaluation.distances import Features
from ldm.evaluation.images import contact_sheet
from ldm.evaluation.measure import Indices, mean_of
from ldm.evaluation.report import Figure, Row, Section
from ldm.models.vision import Images

RIDGE = 0.1
"""Share of the features' mean variance that is added to the variance of each."""
SHOWN_CLASSES = 12
SHOWN_IMAGES = 8


class ClassJudge:
    """Ridge regression from the features of true training images to their classes; every class has the same weight.

    The features are of a network that the evaluated model was not trained with.
    """

    def __init__(self, features: Features, labels: Sequence[int], chosen: Sequence[int] | None = None):
        """Fit to features, (N, D), and class numbers `labels`, (N,); `chosen` limits the classes.

        Raises ValueError for a chosen class that no image has, and for fewer than two classes.
        """
        known = sorted(set(labels))
        if missing := sorted(set(chosen or ()) - set(known)):
            raise ValueError(f"classes: no training image has {missing[0]}; there are {known}")
        self.classes: Indices = np.array(sorted(set(chosen)) if chosen else known)
        if len(self.classes) < 2:
            raise ValueError(f"classes: got {self.classes.tolist()}; expected two or more")
        rows = np.isin(labels, self.classes)
        x, place = features[rows].astype(np.float64), np.searchsorted(self.classes, np.array(labels)[rows])
        weight = 1 / np.bincount(place)[place] / len(self.classes)
        self._mean = weight @ x
        x = x - self._mean
        y = np.eye(len(self.classes))[place] - 1 / len(self.classes)
        covariance = (x * weight[:, None]).T @ x
        ridge = RIDGE * covariance.trace() / len(covariance) * np.eye(len(covariance))
        self._slopes = np.linalg.solve(covariance + ridge, (x * weight[:, None]).T @ y)

    def __call__(self, features: Features) -> Indices:
        """Return the class of each image, (N,)."""
        return cast(Indices, self.classes[((features - self._mean) @ self._slopes).argmax(1)])


def class_section(
    images: Images, answers: Mapping[str, tuple[Indices, Indices]], classes: Indices, per_class: int, network: str
) -> Section:
    """Return the share of images in which the judge finds the class that they are conditioned on.

    images: `per_class` generated images of each of the `classes` in turn. answers: the classes that the judge found
    and the right ones, (N,) each, of the "generated" images and, if any are held out, of the true images as "ceiling".
    """
    right = {name: mean_of(found == asked) for name, (found, asked) in answers.items()}
    found, asked = answers["generated"]
    others = np.roll(asked, per_class)
    beside = {
        "chance": mean_of(np.full(len(asked), 1 / len(classes))),
        "shuffled": mean_of(found == others),
    }
    if "ceiling" in right:
        beside["ceiling"] = right["ceiling"]
    rows = [Row(f"class told apart, {network}", right["generated"], "higher", beside)]
    rows += [
        Row(f"class {label}", mean_of(found[asked == label] == label), "higher",
            {"shuffled": mean_of(found[others == label] == label)})
        for label in classes
    ]  # fmt: skip
    columns = min(per_class, SHOWN_IMAGES)
    shown = np.arange(len(images)).reshape(-1, per_class)[:SHOWN_CLASSES, :columns].flatten()
    sheet = contact_sheet([f"class {label}" for label in asked[shown]], images[shown], columns)
    text = (
        f"{per_class} images of each of {len(classes)} classes. A linear judge, fitted to the features of the true "
        "training images, says which class each image shows. Ceiling: the true held-out images of these "
        "classes. Shuffled: the generated images of the class before."
    )
    meaning = "Share of the images that a judge, trained on true ones, puts into the class that was asked for."
    return Section("Which class is it?", text, rows, (), [Figure("Images of classes", "", sheet)], meaning)
