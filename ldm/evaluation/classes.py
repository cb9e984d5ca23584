"""Whether images show the class that was asked for: a linear judge of features, and the section of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from ldm.evaluation.images import contact_sheet
from ldm.evaluation.measure import Indices, mean_of
from ldm.evaluation.report import Figure, Row, Section
from ldm.evaluation.subject import Features
from ldm.models.vision import Images

RIDGE = 0.1
"""Share of the mean variance of the features that is added to each."""
SHOWN_CLASSES = 12
SHOWN_IMAGES = 8


class ClassJudge:
    """Ridge regression from features of true training images to their classes, each class of the same weight.

    The network of the features is one that the judged model was not trained against, so neither is the judge.
    """

    def __init__(self, features: Features, labels: Sequence[int], chosen: Sequence[int] | None = None):
        """Tell the classes of `labels`, (N,), apart, or those `chosen` of them; ValueError if there are not two."""
        known = sorted(set(labels))
        if missing := sorted(set(chosen or ()) - set(known)):
            raise ValueError(f"classes: no training image has {missing[0]}; there are {known}")
        self.classes: Indices = np.array(sorted(set(chosen)) if chosen else known)
        if len(self.classes) < 2:
            raise ValueError(f"classes: got {self.classes.tolist()}; expected two or more, to tell them apart")
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
    drawn: Images, answers: Mapping[str, tuple[Indices, Indices]], classes: Indices, per_class: int, network: str
) -> Section:
    """Return how often the judge finds the class that was asked for.

    drawn: `per_class` images of each of the `classes` in turn. answers: what the judge found and what was asked for,
    (N,) each, of "generated" images, and of the true ones of these classes as "ceiling", if any are held out.
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
    shown = np.arange(len(drawn)).reshape(-1, per_class)[:SHOWN_CLASSES, :columns].flatten()
    sheet = contact_sheet([f"class {label}" for label in asked[shown]], drawn[shown], columns)
    text = (
        f"{per_class} images of each of {len(classes)} classes. A linear judge, fitted to the features of the true "
        "training images, says which class each image shows. Ceiling: the true held-out images, of whichever "
        "classes they are of. Shuffled: our images of the class before."
    )
    meaning = "Share of the images that a judge, trained on true ones, puts into the class that was asked for."
    return Section("Which class is it?", text, rows, (), [Figure("Images of classes", "", sheet)], meaning)
