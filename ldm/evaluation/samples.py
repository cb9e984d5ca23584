"""The samples of a stage, images, clips or embeddings: sampled, shown as images, and looked up among the true ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.data.batches import CaptionedImages
from ldm.data.pixels import to_uint8
from ldm.evaluation.images import pixel_values
from ldm.evaluation.measure import Indices
from ldm.evaluation.retrieval import Distances, feature_distances, pixel_distances, ranks_among, retrieval_ranks
from ldm.evaluation.sampling import sample_clips, sample_embeds, sample_images
from ldm.models.resolution import shrunk
from ldm.models.vision import Images

CHUNK = 256
Sampled = NDArray[Any]


class Samples(Protocol):
    """The samples of one kind of pipeline."""

    sample: Callable[..., Sampled]
    """``sample(pipeline, conditions, seed, keyword, also, **call)``: one sample of each condition."""

    @property
    def places(self) -> Sequence[int]:
        """Return the place in the gallery of each image of the data."""

    def fault(self, sampled: Sampled) -> str | None:
        """Return what is wrong with the shape of samples, with the field to change; None if nothing is."""

    def true(self, rows: Sequence[int]) -> Images:
        """Return images of the data, as large as samples are shown: (N, S, S, 3)."""

    def shown(self, sampled: Sampled) -> Images:
        """Return samples as images, (N, S, S, 3)."""

    def ranks(self, sampled: Sampled, places: Indices) -> Indices:
        """Return the rank of each sample's own image among all distinct ones, (N,); 0 is right."""

    def difference(self, one: Sampled, other: Sampled) -> float:
        """Return the greatest difference, in 255ths of the range of samples."""


class ImageSamples:
    """Images, compared with the true ones pixel by pixel."""

    def __init__(self, images: CaptionedImages, space: Any, image_size: int):
        self.images, self.image_size, self.sample = images, image_size, sample_images

    @cached_property
    def _gallery(self) -> tuple[Images, list[int]]:
        shown, places = self.images.gallery()
        return resized(shown, self.image_size), places

    @property
    def places(self) -> Sequence[int]:
        """The place in the gallery of each image of the data."""
        return self._gallery[1]

    def fault(self, sampled: Sampled) -> str | None:
        """Return what is wrong with the size of samples."""
        found, size = sampled.shape[1:3], self.image_size
        if found == (size, size):
            return None
        return (
            f"denoiser.sample_size: images are sampled at {found[0]} x {found[1]} pixels, and data.image_size or "
            f"space.image_size is {size}; set it to what the space makes of {size} pixels"
        )

    def true(self, rows: Sequence[int]) -> Images:
        """Return images of the data at the size of samples."""
        return resized(np.stack([np.asarray(self.images.image(row)) for row in rows]), self.image_size)

    def shown(self, sampled: Sampled) -> Images:
        """Return the samples."""
        return sampled

    def ranks(self, sampled: Sampled, places: Indices) -> Indices:
        """Return the ranks of the true images by `pixel_distances`."""
        return retrieval_ranks(sampled, self._gallery[0], places)

    def difference(self, one: Sampled, other: Sampled) -> float:
        """Return the greatest difference in levels of 255."""
        return float(abs(one.astype(int) - other.astype(int)).max())


class EmbedSamples:
    """Image embeddings; the nearest true image stands for each, by the cosine of the embeddings."""

    def __init__(self, images: CaptionedImages, space: Any, image_size: int):
        self.images, self.encoder, self.sample = images, space.image_encoder, sample_embeds
        self.width = len(space.mean)

    @cached_property
    def _gallery(self) -> tuple[Images, Sampled, list[int]]:
        shown, places = self.images.gallery()
        parts = [self.encoder(pixel_values(part)).cpu() for part in _chunks(shown)]
        return shown, torch.cat(parts).numpy(), places

    @property
    def places(self) -> Sequence[int]:
        """The place in the gallery of each image of the data."""
        return self._gallery[2]

    def fault(self, sampled: Sampled) -> str | None:
        """Return what is wrong with the width of samples."""
        found = sampled.shape[1]
        if found == self.width:
            return None
        return f"denoiser.embedding_dim: embeddings of width {found} are sampled; set it to the space's, {self.width}"

    def true(self, rows: Sequence[int]) -> Images:
        """Return images of the data."""
        return np.stack([np.asarray(self.images.image(row)) for row in rows])

    def shown(self, sampled: Sampled) -> Images:
        """Return the nearest true image of each sample."""
        nearest: Images = self._gallery[0][self._distances(sampled).argmin(1)]
        return nearest

    def ranks(self, sampled: Sampled, places: Indices) -> Indices:
        """Return the ranks of the true images by the cosine of their embeddings to the samples."""
        return ranks_among(self._distances(sampled), places)

    def difference(self, one: Sampled, other: Sampled) -> float:
        """Return the greatest difference in 255ths of twice the largest value."""
        return float(255 * abs(one - other).max() / (2 * max(abs(one).max(), 1e-12)))

    def _distances(self, sampled: Sampled) -> Distances:
        return feature_distances(sampled, self._gallery[1])


class ClipSamples:
    """Clips, shown as strips of their frames; the middle frame is looked up, and a subject counts, not its motion."""

    def __init__(self, images: CaptionedImages, space: Any, image_size: int):
        self.images, self.image_size, self.sample = images, image_size, sample_clips

    @cached_property
    def _gallery(self) -> tuple[Images, NDArray[np.intp]]:
        """The middle frame of each clip, and the place of what it was made of."""
        origins = self.images.source.origins or self.images.hashes
        place = {origin: number for number, origin in enumerate(dict.fromkeys(origins))}
        shown = np.stack([np.asarray(self.images.image(row)) for row in range(len(origins))])
        return resized(shown, self.image_size), np.array([place[origin] for origin in origins])

    @property
    def places(self) -> Sequence[int]:
        """The place of what each clip was made of."""
        return [int(place) for place in self._gallery[1]]

    def fault(self, sampled: Sampled) -> str | None:
        """Return what is wrong with the shape of samples."""
        found, wanted = sampled.shape[1:4], (self.images.config.num_frames, *[self.image_size] * 2)
        return None if found == wanted else f"denoiser.sample_size: clips of {found} are sampled, expected {wanted}"

    def true(self, rows: Sequence[int]) -> Images:
        """Return the strips of clips of the data."""
        return strips(np.stack([to_uint8(self.images.pixel_values(row)).numpy() for row in rows]))

    def shown(self, sampled: Sampled) -> Images:
        """Return the strips of samples."""
        return strips(sampled)

    def ranks(self, sampled: Sampled, places: Indices) -> Indices:
        """Return the rank of what each sample was to show, by `pixel_distances` of the middle frames."""
        gallery, made_of = self._gallery
        every = pixel_distances(sampled[:, sampled.shape[1] // 2], gallery)
        nearest = np.stack([every[:, made_of == place].min(1) for place in range(made_of.max() + 1)], 1)
        return ranks_among(nearest, places)

    def difference(self, one: Sampled, other: Sampled) -> float:
        """Return the greatest difference in levels of 255."""
        return float(abs(one.astype(int) - other.astype(int)).max())


def strips(clips: Sampled) -> Images:
    """Return clips (N, F, H, W, 3) as images (N, H, F * W, 3), the frames side by side."""
    count, frames, height, width, channels = clips.shape
    return clips.transpose(0, 2, 1, 3, 4).reshape(count, height, frames * width, channels)


SAMPLES: Mapping[str, Callable[[CaptionedImages, Any, int], Samples]] = {
    "images": ImageSamples,
    "image_embeds": EmbedSamples,
    "frames": ClipSamples,
}
"""By `ldm.export.kinds.PipelineKind.samples`; the arguments: the data, the stage's space, the size of its images."""


def resized(images: Images, size: int) -> Images:
    """Return images (N, H, W, 3) at `size` x `size` pixels, made smaller as a stage in pixel space makes them."""
    if images.shape[1:3] == (size, size):
        return images
    return np.concatenate([to_uint8(shrunk(pixel_values(part), size)).numpy() for part in _chunks(images)])


def _chunks(images: Images) -> list[Images]:
    return [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
