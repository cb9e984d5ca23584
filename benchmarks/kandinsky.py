"""What the stages of a joined Kandinsky are worth, on held-out images: MoVQ, prior and decoder, in two languages.

python -m benchmarks.kandinsky out/kandinsky/openmoji/model OUT.json --sheet docs/kandinsky_mixed.png
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.held_out import Held, measured, parser_of
from ldm.config import DataConfig
from ldm.data.sources import build_source
from ldm.evaluation.images import labelled_sheet, pixel_values
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.quality import psnr
from ldm.evaluation.retrieval import feature_distances, ranks_among, retrieval_ranks
from ldm.evaluation.sampling import sample_images
from ldm.models.autoencoder import reconstruct
from ldm.models.bottleneck import bottleneck_of
from ldm.models.clip import ImageEncoder
from ldm.models.vision import Images

CHUNK = 50
LANGUAGES = {"English": "en", "Russian": "ru"}
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of a prompt in mixtures with an image."""
MIXED = (("red", 0), ("cat", 1), ("fire", 2))
"""Prompts, and the numbers of the held-out images that they are mixed with."""


class HeldTwice(Held):
    """The held-out images with their captions in each of `LANGUAGES`, and the embeddings of all images."""

    def captions_in(self, language: str) -> list[str]:
        """Return the caption of each held-out image in a language, in English where it has none in that."""
        source = build_source(DataConfig(source="openmoji", languages=(LANGUAGES[language],)))
        found = [next(iter(source.captions(row)), "") for row in self.evaluation.rows]
        return [one or english for one, english in zip(found, self.captions, strict=True)]

    @cached_property
    def embeds(self) -> Tensor:
        """The embeddings of all distinct images, (N, D)."""
        encoder = ImageEncoder(self.pipeline.image_encoder)
        return torch.cat([encoder(pixel_values(part)) for part in np.array_split(self.gallery, 20)]).cpu()

    def recall(self, name: str, images: Images) -> Iterator[tuple[str, Measure]]:
        """Yield how often an image finds the true one by its pixels, first and among the first five."""
        ranks = retrieval_ranks(images, self.gallery, self.own)
        yield f"R@1, {name}", mean_of(ranks < 1)
        yield f"R@5, {name}", mean_of(ranks < 5)


def movq(held: HeldTwice) -> Iterator[tuple[str, Measure]]:
    """Yield the PSNR of reconstructions, of the latents as they are and of their codes, and the use of the codes."""
    network, true = held.pipeline.movq, pixel_values(held.true)
    parts = [part.to(network.device) for part in true.split(CHUNK)]
    with torch.no_grad():
        decoded = [network.decode(network.encode(part).latents).sample.cpu() for part in parts]
    of_codes = torch.cat(decoded).clamp(-1, 1)
    for name, found in (("latents", reconstruct(network, true)), ("codes", of_codes)):
        yield f"PSNR of reconstructions, from {name}, dB", mean_of(psnr(found, true).numpy())
    for name, value in bottleneck_of(network).measures(network, parts).items():
        yield f"{name} of {network.config.num_vq_embeddings}", mean_of(np.array([value]))


def prior(held: HeldTwice) -> Iterator[tuple[str, Measure]]:
    """Yield how near the prior's embeddings are to the true ones, and how often they find them, in each language."""
    true = held.embeds
    for language in LANGUAGES:
        draw = torch.Generator().manual_seed(0)
        found = held.pipeline.embed_prompt(held.captions_in(language), generator=draw).cpu()
        near = F.cosine_similarity(found, true[held.own])
        yield f"cosine of the prior to the true embedding, {language}", mean_of(near.numpy())
        ranks = ranks_among(feature_distances(found.numpy(), true.numpy()), held.own)
        yield f"R@1 of the prior's embeddings, {language}", mean_of(ranks < 1)


def images(held: HeldTwice) -> Iterator[tuple[str, Measure]]:
    """Yield how well images follow captions in each language, and the true embeddings."""
    for language in LANGUAGES:
        yield from held.recall(language, sample_images(held.pipeline, held.captions_in(language), 0, "prompt"))
    also = {"image_embeds": held.embeds[held.own]}
    sampled = sample_images(held.pipeline, [""] * len(held.own), 0, "prompt", also)
    yield from held.recall("true embeddings", sampled)


PARTS = {"movq": movq, "prior": prior, "images": images}


def sheet(held: HeldTwice, path: Path) -> None:
    """Draw mixtures of prompts and held-out images, a row for each of `MIXED`; none chosen."""
    rows: dict[str, Images] = {}
    for prompt, number in MIXED:
        image = pixel_values(held.true[number : number + 1]) / 2 + 0.5
        call = {"output_type": "np", "num_images": 1}
        mixed = [
            held.pipeline.interpolate(
                [prompt, image], [share, 1 - share], generator=torch.Generator().manual_seed(0), **call
            ).images
            for share in SHARES
        ]
        rows[f"{held.captions[number]}, and {prompt}"] = (np.concatenate(mixed) * 255).round().astype(np.uint8)
    labelled_sheet([f"{share:.0%}" for share in SHARES], rows).save(path)


def main() -> None:
    """Measure, draw, and write the numbers after each part."""
    parser = parser_of(__doc__, "a joined Kandinsky", PARTS)
    parser.add_argument("--sheet", type=Path, help="file for a sheet of mixtures of prompts and images")
    arguments = parser.parse_args()
    held = HeldTwice(arguments.model, arguments.validation)
    measured(held, PARTS, arguments)
    if arguments.sheet is not None:
        sheet(held, arguments.sheet)


if __name__ == "__main__":
    main()
