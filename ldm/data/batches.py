"""From captioned pictures to typed batches; which and how is a function of the position."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.config import DataConfig
from ldm.data.cache import CachedCaptions, CachedRows
from ldm.data.hashes import lasting_names, pixel_hashes
from ldm.data.pixels import READING, resize_and_crop, to_pixel_values, to_rgb
from ldm.data.positions import generator, sample_index
from ldm.data.sources import Source
from ldm.data.splits import SPLITS, Splits, split_pictures

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
View = tuple[int, bool]
"""The number of an image, and whether it is its mirror image."""


@dataclass(frozen=True)
class Sample:
    """One captioned picture at one position: pixels (3, H, W) in [-1, 1], ``mean`` and ``std`` of x0, or both."""

    position: int
    picture: int
    caption: str
    class_label: int | None = None
    pixel_values: Tensor | None = None
    moments: Tensors | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples, stacked."""

    positions: list[int]
    pictures: list[int]
    captions: list[str]
    pixel_values: Tensor | None = None
    moments: Tensors | None = None
    class_labels: Tensor | None = None
    mirrored: Sequence[bool] = ()
    """Empty if no image is."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.positions)

    @property
    def views(self) -> list[View]:
        """The images by number, and whether each is mirrored: what their encodings are kept by."""
        return [*zip(self.pictures, self.mirrored or [False] * len(self), strict=True)]

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with each of its tensors changed, in the order of its fields."""
        return replace(
            self,
            pixel_values=None if self.pixel_values is None else change(self.pixel_values),
            moments=None if self.moments is None else {name: change(one) for name, one in self.moments.items()},
            class_labels=None if self.class_labels is None else change(self.class_labels),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Return the samples as one batch."""
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    moments = [sample.moments for sample in samples if sample.moments is not None]
    labels = [sample.class_label for sample in samples if sample.class_label is not None]
    return Batch(
        [sample.position for sample in samples],
        [sample.picture for sample in samples],
        [sample.caption for sample in samples],
        torch.stack(pixels) if pixels else None,
        {name: torch.stack([one[name] for one in moments]) for name in moments[0]} if moments else None,
        torch.tensor(labels) if labels else None,
        [sample.mirrored for sample in samples],
    )


class CaptionedImages:
    """The pictures of a source at one size, and their split."""

    def __init__(self, source: Source, config: DataConfig):
        self.source, self.config = source, config

    def image(self, picture: int) -> Image.Image:
        """Return picture number `picture` of the source in RGB, as it is trained on."""
        return resize_and_crop(self._rgb(picture), self.config.image_size)

    def _rgb(self, picture: int) -> Image.Image:
        return to_rgb(self.source.image(picture), self.config.background)

    def pixel_values(self, picture: int, mirrored: bool = False) -> Tensor:
        """Return picture number `picture` of the source, (3, H, W) in [-1, 1]."""
        values = to_pixel_values(self.image(picture))
        return values.flip(2) if mirrored else values

    @cached_property
    def hashes(self) -> list[str]:
        """Name of each picture's content: equal pixels, equal names. Computed once and kept.

        From the pixels before they are resized, so that stages of different sizes split alike; where the source
        has names of its own, the first of those with equal pixels, the same on machines that render differently.
        """
        hashes = [value for value in pixel_hashes(self.source, self.config.background) if value is not None]
        if len(hashes) < len(self.source):
            bad = len(self.source) - len(hashes)
            raise ValueError(f"{bad} of {len(self.source)} pictures cannot be decoded; ldm validate says which")
        return lasting_names(hashes, self.source.names)

    @cached_property
    def splits(self) -> Splits:
        """Train, validation and test pictures; see `split_pictures`."""
        held_out, percent, limit = self.config.held_out, self.config.held_out_percent, self.config.limit
        return split_pictures(self.hashes, self.source.all_captions, held_out, percent, limit)

    def gallery(self) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the distinct pictures, (M, S, S, 3), and for each picture of the source its place among them."""
        place: dict[str, int] = {}
        pictures = []
        for picture, value in enumerate(self.hashes):
            if value not in place:
                place[value] = len(place)
                pictures.append(np.asarray(self.image(picture)))
        return np.stack(pictures), [place[value] for value in self.hashes]

    def pictures_of(self, captions: Sequence[str]) -> list[int]:
        """Return the first picture that has each caption, in any language; raises ValueError if one has none."""
        owner: dict[str, int] = {}
        for picture in range(len(self.source)):
            for caption in self.source.all_captions(picture):
                owner.setdefault(caption, picture)
        if unknown := [caption for caption in captions if caption not in owner]:
            raise ValueError(f"{len(unknown)} of {len(captions)} captions belong to no picture, such as {unknown[0]!r}")
        return [owner[caption] for caption in captions]

    def captions(self, split: str) -> list[str]:
        """Return every caption of a split's pictures."""
        return [caption for picture in self.splits[split] for caption in self.source.captions(picture)]

    def names(self, *splits: str) -> set[str]:
        """Return the names, as in `hashes`, of the images of some splits."""
        return {self.hashes[picture] for split in splits for picture in self.splits[split]}

    def first_pictures(self, split: str, count: int) -> Tensor:
        """Return up to `count` pictures of a split, (N, 3, H, W), in the order of their hashes: as good as random."""
        pictures = sorted(self.splits[split], key=lambda picture: self.hashes[picture])[:count]
        return torch.stack([self.pixel_values(picture) for picture in pictures])

    @property
    def key(self) -> str:
        """Name of what the pictures look like: equal keys, equal pictures."""
        return f"{self.source.fingerprint}/{self.config.image_size}/{self.config.background}/{READING}"

    def encoded_images(self, kind: str, key: str, encode: Callable[[Tensor], Tensors]) -> EncodedImages:
        """Return what `encode` makes of each image of the splits, and with flips of its mirror image.

        It is cached as a `kind`; `key` names what `encode` computes of (B, 3, H, W). With ``data.limit`` the others are
        not encoded.
        """
        return EncodedImages(self, kind, key, encode)

    def encoded_captions(
        self, key: Callable[[Sequence[str]], str], encode: Callable[[Sequence[str]], Tensors]
    ) -> CachedCaptions:
        """Return what `encode` makes of each of `known_captions`, which `key` names; it is cached."""
        captions = self.known_captions()
        return CachedCaptions(captions, key(captions), encode)

    def known_captions(self) -> list[str]:
        """Return every caption that training or validation may show, "" included, in alphabetical order."""
        pictures = (*self.splits["train"], *self.splits["validation"])
        return sorted({""}.union(*(self.source.captions(picture) for picture in pictures)))


class EncodedImages(Mapping[View, Tensors]):
    """What a frozen network makes of images, by their number and whether they are mirrored, kept as `CachedRows`."""

    def __init__(self, images: CaptionedImages, kind: str, key: str, encode: Callable[[Tensor], Tensors]):
        self.views = 1 + images.config.flip
        pictures = sorted(picture for split in SPLITS for picture in images.splits[split])
        self._place = {picture: place for place, picture in enumerate(pictures)}

        def compute(rows: range) -> Tensors:
            views = (images.pixel_values(pictures[row // self.views], bool(row % self.views)) for row in rows)
            return {name: tensor.cpu() for name, tensor in encode(torch.stack([*views])).items()}

        named = f"{images.key}/{self.views}/{key}"
        if len(pictures) < len(images.source):
            named += f"/{blake2b(','.join(map(str, pictures)).encode(), digest_size=16).hexdigest()}"
        self._rows = CachedRows(kind, named, len(pictures) * self.views, compute)

    def __getitem__(self, view: View) -> Tensors:
        """Return the tensors of one image, or with flips of its mirror image."""
        picture, mirrored = view
        return self._rows[self._place[picture] * self.views + mirrored]

    def __iter__(self) -> Iterator[View]:
        """Iterate over the images, each before its mirror image."""
        return ((picture, mirrored) for picture in self._place for mirrored in (False, True)[: self.views])

    def __len__(self) -> int:
        """Return the number of images and mirror images."""
        return len(self._place) * self.views


class PositionDataset(Dataset[Sample]):
    """A split as the endless stream of positions that training runs along."""

    def __init__(
        self,
        images: CaptionedImages,
        split: str,
        seed: int,
        encoded: Mapping[View, Tensors] | None = None,
        with_pixels: bool = False,
    ):
        """Read moments from `encoded` if it is given, the pictures if it is not or if `with_pixels` asks for both."""
        self.images, self.seed, self.encoded = images, seed, encoded
        self.with_pixels = with_pixels or encoded is None
        self.pictures = images.splits.filled(split)
        without = sum(not images.source.captions(picture) for picture in self.pictures)
        if without:
            log.warning("%d of %d pictures have no caption; they train unconditionally", without, len(self.pictures))

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return len(self.pictures)

    def picture(self, position: int) -> int:
        """Return the number of the picture at any position >= 0."""
        return self.pictures[sample_index(self.seed, position, len(self.pictures))]

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at any position >= 0."""
        picture = self.picture(position)
        draw = torch.rand(2, generator=generator(self.seed, position, "sample")).tolist()
        captions = self.images.source.captions(picture)
        caption = captions[int(draw[0] * len(captions))] if captions else ""
        mirrored = self.images.config.flip and draw[1] < 0.5
        moments = None if self.encoded is None else self.encoded[picture, mirrored]
        pixel_values = self.images.pixel_values(picture, mirrored) if self.with_pixels else None
        class_label = self.images.source.class_label(picture)
        return Sample(position, picture, caption, class_label, pixel_values, moments, mirrored)


def fixed_batch(dataset: PositionDataset, count: int) -> Batch:
    """Return the first `count` positions of a data set (fewer if it is smaller): the same in every run."""
    return collate([dataset[position] for position in range(min(count, len(dataset)))])
