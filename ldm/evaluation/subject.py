"""The images of an evaluation: generated ones, the true held-out ones, and those of the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ldm.evaluation.baselines import derangement
from ldm.evaluation.distances import Features
from ldm.evaluation.measure import Indices
from ldm.evaluation.retrieval import Distances, pixel_distances
from ldm.models.vision import Images


@dataclass(frozen=True)
class Subject:
    """N held-out images and their captions, among the M distinct images of the data set."""

    captions: Sequence[str]
    generated: Images
    """The model's images, in the order of the captions."""
    rebuilt: Images | None
    """The true images through the model's autoencoder and back; None without one."""
    gallery: Images
    own_index: Indices
    """Place in the gallery of each caption's true image."""
    copied_index: Indices
    """Place in the gallery of the training image that a copier returns for each caption."""
    training_images: Indices
    """Places in the gallery of the distinct training images, in ascending order."""
    embed: Callable[[Images], Features]
    """The network that measures: images, (N, H, W, 3), to features."""
    gallery_features: Features

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.captions)

    @cached_property
    def exchanged(self) -> Indices:
        """A permutation of the captions that gives each the image of another."""
        return derangement(self.own_index)

    @property
    def true(self) -> Images:
        """The captions' true images."""
        return self.gallery[self.own_index]

    @property
    def copied(self) -> Images:
        """The images that a copier of training images returns."""
        return self.gallery[self.copied_index]

    @cached_property
    def features(self) -> Mapping[str, Features]:
        """Features of "generated", "true", "copy" and, if there is an autoencoder, "ceiling" images, (N, D) each."""
        found = {
            "generated": self.embed(self.generated),
            "true": self.gallery_features[self.own_index],
            "copy": self.gallery_features[self.copied_index],
        }
        return found if self.rebuilt is None else found | {"ceiling": self.embed(self.rebuilt)}

    @cached_property
    def pixel_distances(self) -> Mapping[str, Distances]:
        """Distances of the same images from each of the gallery, (N, M); see `ldm.evaluation.retrieval`."""
        shown = {"generated": self.generated, "true": self.true, "copy": self.copied}
        if self.rebuilt is not None:
            shown["ceiling"] = self.rebuilt
        return {name: pixel_distances(images, self.gallery) for name, images in shown.items()}
