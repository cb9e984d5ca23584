"""What an evaluation looks at: generated images, the true held-out ones, and what a copier and a decoder make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.baselines import derangement
from ldm.evaluation.measure import Indices
from ldm.evaluation.retrieval import pixel_distances
from ldm.models.vision import Images

Features = NDArray[np.float32]
"""Of images, (N, D), in a network that the model was not trained against."""


@dataclass(frozen=True)
class Subject:
    """N held-out images and their captions, among the M distinct images of the data set."""

    captions: Sequence[str]
    generated: Images
    """Of the model, in the order of the captions."""
    rebuilt: Images | None
    """The true images through the model's autoencoder and back; None without one."""
    gallery: Images
    own_index: Indices
    """Place in the gallery of each caption's own image."""
    copied_index: Indices
    """Place of what a copier answers to each, a training image."""
    training_images: Indices
    """Places of the distinct training images, in ascending order."""
    embed: Callable[[Images], Features]
    """The network that measures."""
    gallery_features: Features

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.captions)

    @cached_property
    def exchanged(self) -> Indices:
        """A permutation of the captions in which none keeps its own image."""
        return derangement(self.own_index)

    @property
    def true(self) -> Images:
        """The captions' own images."""
        return self.gallery[self.own_index]

    @property
    def copied(self) -> Images:
        """What a copier answers."""
        return self.gallery[self.copied_index]

    @cached_property
    def features(self) -> Mapping[str, Features]:
        """Of "generated", "true" and "copy", and of "ceiling" if there is an autoencoder, (N, D) each."""
        found = {
            "generated": self.embed(self.generated),
            "true": self.gallery_features[self.own_index],
            "copy": self.gallery_features[self.copied_index],
        }
        return found if self.rebuilt is None else found | {"ceiling": self.embed(self.rebuilt)}

    @cached_property
    def pixel_distances(self) -> Mapping[str, NDArray[np.float64]]:
        """Of the same images from each of the gallery, (N, M); see `ldm.evaluation.retrieval`."""
        shown = {"generated": self.generated, "true": self.true, "copy": self.copied}
        if self.rebuilt is not None:
            shown["ceiling"] = self.rebuilt
        return {name: pixel_distances(images, self.gallery) for name, images in shown.items()}
