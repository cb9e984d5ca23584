"""What each stage of a joined unCLIP is worth, on held-out images: the embedding, the upsampler, the manipulations.

python -m benchmarks.unclip out/dalle2/openmoji/model OUT.json --sheet docs/unclip.png
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.held_out import Held, measured, parser_of
from ldm.evaluation.baselines import exchanged_captions
from ldm.evaluation.images import labelled_sheet, pixel_values
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.retrieval import feature_distances, ranks_among, retrieval_ranks
from ldm.evaluation.sampling import sample_images
from ldm.models.clip import ImageEncoder
from ldm.models.resolution import shrunk
from ldm.models.vision import Images

CHUNK = 50
ETAS = (1.0, 0.6, 0.4)
"""Shares of DDPM's noise that variations are made with: all, less, and what `variations` adds."""
VARIED = 50
"""Held-out images that variations are made of; the first of them."""
SHOWN = 6
TURNED, DIFFERENCE = 1, ("woman astronaut medium-dark skin tone", "man cook light skin tone")
"""The held-out image that is turned, and the two texts."""


class HeldEmbeds(Held):
    """The held-out images, and the embeddings of all images."""

    def __init__(self, model: str, validation: bool = False):
        super().__init__(model, validation)
        encoder = ImageEncoder(self.pipeline.image_encoder)
        parts = [encoder(pixel_values(part)) for part in np.array_split(self.gallery, 20)]
        self.embeds = torch.cat(parts).cpu()

    def sampled(
        self, prompts: Sequence[str], embeds: Tensor, seed: int = 0, latents: Tensor | None = None, **call: Any
    ) -> Images:
        """Return an image of each prompt and embedding, and of its noise if that is given."""
        also = {"image_embeds": embeds} | ({} if latents is None else {"decoder_latents": latents})
        return sample_images(self.pipeline, prompts, seed, "prompt", also, **call)


def prior(held: HeldEmbeds) -> Iterator[tuple[str, Measure]]:
    """Yield how near the prior's embeddings are to the true ones, and how often they find them among all."""
    found, true = held.pipeline.embed_prompt(held.captions, generator=torch.Generator().manual_seed(0)), held.embeds
    yield "cosine of the prior to the true embedding", mean_of(F.cosine_similarity(found, true[held.own]).numpy())
    others = true[np.roll(held.own, 1)]
    yield "cosine of the prior to those of others", mean_of(F.cosine_similarity(found, others).numpy())
    ranks = ranks_among(feature_distances(found.numpy(), true.numpy()), held.own)
    yield "R@1 of the prior's embeddings", mean_of(ranks < 1)
    yield "R@5 of the prior's embeddings", mean_of(ranks < 5)


def embeddings(held: HeldEmbeds) -> Iterator[tuple[str, Measure]]:
    """Yield R@1 of every second caption with the true embedding, with none, and with that of another caption."""
    captions, own = held.captions[::2], held.own[::2]
    others = held.pipeline.embed_prompt(exchanged_captions(captions), generator=torch.Generator().manual_seed(0))
    true = held.embeds[own]
    given = {"true": true, "none": torch.zeros_like(true), "of another caption": others}
    for name, embeds in given.items():
        images = held.sampled(captions, embeds)
        yield f"R@1 of every second caption, embedding: {name}", mean_of(retrieval_ranks(images, held.gallery, own) < 1)


def upsampling(held: HeldEmbeds) -> Iterator[tuple[str, Measure]]:
    """Yield PSNR and the error of the mean colour of true images made small and large again, beside bicubic's."""
    size, small_size = held.pipeline.image_size, held.pipeline.config.small_size
    true = pixel_values(held.true)
    small = shrunk(true, small_size)
    bicubic = F.interpolate(small, size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    for name, found in (("bicubic", bicubic), ("upsampler", _upsampled(held, small))):
        error = (found - true).square().flatten(1).mean(1)
        yield f"PSNR of {name}, dB", mean_of((10 * torch.log10(4 / error.clamp(min=1e-10))).numpy())
        colour = (found.mean((2, 3)) - true.mean((2, 3))).abs().mean(1) * 127.5
        yield f"error of the mean colour of {name}, of 255", mean_of(colour.numpy())


def _upsampled(held: HeldEmbeds, small: Tensor) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(small))]
    parts = []
    for start in range(0, len(small), CHUNK):
        rows = slice(start, start + CHUNK)
        output = held.pipeline.upsample(small[rows] / 2 + 0.5, generator=generators[rows], output_type="latent")
        parts.append(output.images.clamp(-1, 1).cpu())
    return torch.cat(parts)


def variations(held: HeldEmbeds) -> Iterator[tuple[str, Measure]]:
    """Yield how near variations of held-out images are to their source, for each share of DDPM's noise.

    Nearest to it among all images by pixels, by the features of a network that no stage was trained with, and by the
    CLIP that the decoder reads; and differences, from the source and of two variations.
    """
    own, true = held.own[:VARIED], held.true[:VARIED]
    latents = held.pipeline.invert([*map(Image.fromarray, true)])
    calls: dict[str, dict[str, Any]] = {f"eta {eta}": {"latents": latents, "eta": eta} for eta in ETAS}
    for name, call in {"the embedding alone": {}, **calls}.items():
        varied, again = (held.sampled([""] * len(own), held.embeds[own], seed, **call) for seed in (1000, 2000))
        clip = ImageEncoder(held.pipeline.image_encoder)(pixel_values(varied)).cpu().numpy()
        ranks = {
            "pixels": retrieval_ranks(varied, held.gallery, own),
            "features": ranks_among(
                feature_distances(held.evaluation.network(varied), held.evaluation.gallery_features), own
            ),
            "CLIP": ranks_among(feature_distances(clip, held.embeds.numpy()), own),
        }
        for space, found in ranks.items():
            yield f"variations nearest to their source, {name}, {space}", mean_of(found < 1)
        yield f"mean difference of a variation from its source, {name}, of 255", mean_of(difference(varied, true))
        yield f"mean difference of two variations, {name}, of 255", mean_of(difference(varied, again))


def difference(images: Images, others: Images) -> NDArray[np.float64]:
    """Return the mean absolute difference of each image from its other, of 255."""
    found: NDArray[np.float64] = abs(images.astype(int) - others.astype(int)).mean((1, 2, 3))
    return found


def sheet(held: HeldEmbeds) -> Any:
    """Return a sheet of the manipulations, of the first held-out images; none chosen."""
    pipe, sources = held.pipeline, to_images(held.true[:SHOWN])
    rows: dict[str, Images] = {"source": held.true[:SHOWN]}
    call = {"output_type": "np"}
    for number in range(2):
        seeds = [torch.Generator().manual_seed(number) for _ in sources]
        varied = [
            pipe.variations(one, 1, generator=[seed], **call).images for one, seed in zip(sources, seeds, strict=True)
        ]
        rows[f"variation {number + 1}"] = as_bytes(np.concatenate(varied))
    first = torch.Generator().manual_seed(0)
    between = pipe.interpolate(sources[0], sources[1], SHOWN, generator=first, **call).images
    rows["interpolation"] = as_bytes(between)
    turned = pipe.text_difference(sources[TURNED], *DIFFERENCE, SHOWN, generator=first.manual_seed(0), **call).images
    rows["difference"] = as_bytes(turned)
    return labelled_sheet(held.captions[:SHOWN], rows)


def as_bytes(images: Any) -> Images:
    """Return images in [0, 1] as bytes."""
    return (np.asarray(images) * 255).round().astype(np.uint8)


def to_images(images: Images) -> list[Tensor]:
    """Return each image as (3, H, W) in [0, 1]."""
    return [*(pixel_values(images) / 2 + 0.5)]


PARTS = {"prior": prior, "upsampling": upsampling, "variations": variations, "embeddings": embeddings}


def main() -> None:
    """Draw, measure, and write the numbers after each part."""
    parser = parser_of(__doc__, "a joined unCLIP", PARTS)
    parser.add_argument("--sheet", type=Path, help="file for a sheet of variations, interpolation and text difference")
    arguments = parser.parse_args()
    held = HeldEmbeds(arguments.model, arguments.validation)
    if arguments.sheet is not None:
        sheet(held).save(arguments.sheet)
    measured(held, PARTS, arguments)


if __name__ == "__main__":
    main()
