"""From captioned images to batches; a batch is a function of its positions alone."""

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
from ldm.data.items import Source
from ldm.data.pixels import READING, resize_and_crop, to_pixel_values, to_rgb
from ldm.data.positions import draw_key, generator, sample_index
from ldm.data.splits import SPLITS, Splits, split_images
from ldm.errors import ConfigError

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
View = tuple[int, bool]
"""The number of an image, and whether it is its mirror image."""


@dataclass(frozen=True)
class Sample:
    """One captioned item at one position: pixels in [-1, 1], ``mean`` and ``std`` of x0, or both.

    Pixels are (3, H, W), of a clip (F, 3, H, W).
    """

    position: int
    row: int
    caption: str
    class_label: int | None = None
    pixel_values: Tensor | None = None
    moments: Tensors | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Batch:
    """Samples, stacked."""

    positions: list[int]
    rows: list[int]
    captions: list[str]
    pixel_values: Tensor | None = None
    moments: Tensors | None = None
    class_labels: Tensor | None = None
    mirrored: Sequence[bool] = ()
    """One value for each image; empty means that none is mirrored."""

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.positions)

    @property
    def views(self) -> list[View]:
        """The images by number, and whether each is mirrored: what their encodings are kept by."""
        return [*zip(self.rows, self.mirrored or [False] * len(self), strict=True)]

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
        [sample.row for sample in samples],
        [sample.caption for sample in samples],
        torch.stack(pixels) if pixels else None,
        {name: torch.stack([one[name] for one in moments]) for name in moments[0]} if moments else None,
        torch.tensor(labels) if labels else None,
        [sample.mirrored for sample in samples],
    )


class CaptionedImages:
    """The images, or clips, of a source at one size, and their split."""

    def __init__(self, source: Source, config: DataConfig):
        self.source, self.config = source, config

    def image(self, row: int) -> Image.Image:
        """Return image `row` of the source in RGB, resized and cropped for training; of a clip the middle frame."""
        return self._sized(self.source.image(row))

    def _sized(self, image: Image.Image) -> Image.Image:
        return resize_and_crop(to_rgb(image, self.config.background), self.config.image_size)

    def pixel_values(self, row: int, mirrored: bool = False) -> Tensor:
        """Return item `row` of the source in [-1, 1]: (3, H, W) of an image, (F, 3, H, W) of a clip."""
        frames = torch.stack([to_pixel_values(self._sized(frame)) for frame in self.source.item(row)])
        values = frames[0] if self.source.num_frames is None else frames
        return values.flip(-1) if mirrored else values

    @cached_property
    def hashes(self) -> list[str]:
        """Hash of each image's content: equal pixels, equal hashes. Computed once and cached.

        The pixels are hashed before they are resized, so that stages of different sizes split alike. If the source
        has its own names, they take the place of the hashes (`lasting_names`), so that machines that render
        differently split alike too.
        """
        hashes = [value for value in pixel_hashes(self.source, self.config.background) if value is not None]
        if len(hashes) < len(self.source):
            bad = len(self.source) - len(hashes)
            raise ValueError(f"{bad} of {len(self.source)} images cannot be decoded; ldm validate says which")
        return lasting_names(hashes, self.source.names)

    @cached_property
    def splits(self) -> Splits:
        """Train, validation and test images; see `split_images`."""
        held_out, percent, limit = self.config.held_out, self.config.held_out_percent, self.config.limit
        return split_images(self.hashes, self.source.all_captions, held_out, percent, limit, self.source.origins)

    def gallery(self) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the distinct images, (M, S, S, 3) uint8, and the index in them of each image of the source."""
        place: dict[str, int] = {}
        shown = []
        for row, value in enumerate(self.hashes):
            if value not in place:
                place[value] = len(place)
                shown.append(np.asarray(self.image(row)))
        return np.stack(shown), [place[value] for value in self.hashes]

    def gallery_captions(self, places: Sequence[int], known: Mapping[int, str]) -> list[str]:
        """Return a caption of each image of the `gallery`: that in `known`, by its place there, or its first, or "".

        places: the index in the gallery of each image of the source.
        """
        found = dict(known)
        for row, place in enumerate(places):
            found.setdefault(place, next(iter(self.source.captions(row)), ""))
        return [found[place] for place in range(len(found))]

    def rows_of(self, captions: Sequence[str]) -> list[int]:
        """Return the row of the first image with each caption, in any language; ValueError if there is none."""
        owner: dict[str, int] = {}
        for row in range(len(self.source)):
            for caption in self.source.all_captions(row):
                owner.setdefault(caption, row)
        if unknown := [caption for caption in captions if caption not in owner]:
            raise ValueError(f"{len(unknown)} of {len(captions)} captions belong to no image, such as {unknown[0]!r}")
        return [owner[caption] for caption in captions]

    def captions(self, split: str) -> list[str]:
        """Return every caption of a split's images."""
        return [caption for row in self.splits[split] for caption in self.source.captions(row)]

    def names(self, *splits: str) -> set[str]:
        """Return the names, for the record, of what the items of some splits are or are a part of."""
        known = self.source.wholes or self.hashes
        found = {known[row] for split in splits for row in self.splits[split]}
        # a clip of which one frame equals that of a held-out clip is trained on, and not held out with it
        return found if "train" in splits else found.difference(known[row] for row in self.splits["train"])

    def first_images(self, split: str, count: int) -> Tensor:
        """Return up to `count` items of a split, (N, 3, H, W), in the order of their hashes: a random choice.

        Of clips: (N, F, 3, H, W).
        """
        rows = sorted(self.splits[split], key=lambda row: self.hashes[row])[:count]
        return torch.stack([self.pixel_values(row) for row in rows])

    @property
    def key(self) -> str:
        """Name of the images as they are trained on: equal keys, equal images."""
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
        """Return every caption of the training and validation splits, and "", in alphabetical order."""
        rows = (*self.splits["train"], *self.splits["validation"])
        return sorted({""}.union(*(self.source.captions(row) for row in rows)))


class EncodedImages(Mapping[View, Tensors]):
    """The cached outputs of a frozen network on images, by ``(row, mirrored)``; see `CachedRows`.

    Each entry is the mapping of names to tensors that `encode` returns of a batch (B, 3, H, W), for one image.
    """

    def __init__(self, images: CaptionedImages, kind: str, key: str, encode: Callable[[Tensor], Tensors]):
        self.views = 1 + images.config.flip
        encoded_rows = sorted(row for split in SPLITS for row in images.splits[split])
        self._place = {row: place for place, row in enumerate(encoded_rows)}

        def compute(rows: range) -> Tensors:
            views = (images.pixel_values(encoded_rows[row // self.views], bool(row % self.views)) for row in rows)
            return {name: tensor.cpu() for name, tensor in encode(torch.stack([*views])).items()}

        named = f"{images.key}/{self.views}/{key}"
        if len(encoded_rows) < len(images.source):
            named += f"/{blake2b(','.join(map(str, encoded_rows)).encode(), digest_size=16).hexdigest()}"
        self._rows = CachedRows(kind, named, len(encoded_rows) * self.views, compute)

    def __getitem__(self, view: View) -> Tensors:
        """Return the tensors of one image, or with flips of its mirror image."""
        row, mirrored = view
        if mirrored and self.views == 1:
            raise KeyError(view)
        return self._rows[self._place[row] * self.views + mirrored]

    def __iter__(self) -> Iterator[View]:
        """Iterate over the images, each before its mirror image."""
        return ((row, mirrored) for row in self._place for mirrored in (False, True)[: self.views])

    def __len__(self) -> int:
        """Return the number of images and mirror images."""
        return len(self._place) * self.views


class PositionDataset(Dataset[Sample]):
    """A split as an endless stream: the sample at position p is a function of p and the seed."""

    def __init__(
        self,
        images: CaptionedImages,
        split: str,
        seed: int,
        encoded: Mapping[View, Tensors] | None = None,
        with_pixels: bool = False,
    ):
        """Take moments from `encoded` if it is given; load pixels without it, or if `with_pixels`."""
        self.images, self.seed, self.encoded = images, seed, encoded
        self.with_pixels = with_pixels or encoded is None
        self.crop_size = images.config.crop_size if split == "train" else None
        self.rows = images.splits.filled(split)
        self._alike = _alike(images, self.rows) if split == "train" else [[row] for row in self.rows]
        without = sum(not images.source.captions(row) for row in self.rows)
        if without:
            log.warning("%d of %d images have no caption; they train unconditionally", without, len(self.rows))

    def __len__(self) -> int:
        """Return the number of samples in an epoch: one of each item, or with ``data.balance`` of each kind."""
        return len(self._alike)

    def row(self, position: int) -> int:
        """Return the row of the item at any position >= 0; those of one kind take turns, one in an epoch."""
        kind, epoch = sample_index(self.seed, position, len(self)), position // len(self)
        rows = self._alike[kind]
        return rows[(epoch + draw_key(self.seed, kind, "turn")) % len(rows)]

    def __getitem__(self, position: int) -> Sample:
        """Return the sample at any position >= 0."""
        row = self.row(position)
        draw = torch.rand(2, generator=generator(self.seed, position, "sample")).tolist()
        captions = self.images.source.captions(row)
        caption = captions[int(draw[0] * len(captions))] if captions else ""
        mirrored = self.images.config.flip and draw[1] < 0.5
        moments = None if self.encoded is None else self.encoded[row, mirrored]
        pixel_values = self._pixel_values(position, row, mirrored) if self.with_pixels else None
        class_label = self.images.source.class_label(row)
        return Sample(position, row, caption, class_label, pixel_values, moments, mirrored)

    def _pixel_values(self, position: int, row: int, mirrored: bool) -> Tensor:
        """Return the image, or the crop of it that belongs to the position."""
        whole, size = self.images.pixel_values(row, mirrored), self.crop_size
        if size is None:
            return whole
        left = whole.shape[-1] - size
        top, side = torch.randint(left + 1, (2,), generator=generator(self.seed, position, "crop")).tolist()
        return whole[..., top : top + size, side : side + size]


def _alike(images: CaptionedImages, rows: Sequence[int]) -> list[list[int]]:
    """Return the rows by kind, as ``data.balance`` says; ConfigError if the data have no such kinds."""
    source = images.source
    match images.config.balance:
        case "items":
            return [[row] for row in rows]
        case "subjects":
            if source.subjects is None:
                raise ConfigError("data.balance: got subjects, and the data have none; expected items, or classes")
            kinds: Sequence[object] = [source.subjects[row] for row in rows]
        case "classes":
            kinds = [source.class_label(row) for row in rows]
            if set(kinds) == {None}:
                raise ConfigError("data.balance: got classes, and the data have none; name them in data.class_column")
    members: dict[object, list[int]] = {}
    for row, kind in zip(rows, kinds, strict=True):
        members.setdefault(kind, []).append(row)
    return [*members.values()]


def fixed_batch(dataset: PositionDataset, count: int) -> Batch:
    """Return the samples at the first `count` positions (fewer if the data set is smaller): equal in every run."""
    return collate([dataset[position] for position in range(min(count, len(dataset)))])
