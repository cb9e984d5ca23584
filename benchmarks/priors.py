"""Priors at equal minutes, from captions to the image embeddings of a CLIP: python -m benchmarks.priors CLIP OUT.

A prior predicts the CLIP's embedding of an image from its caption (Ramesh et al. 2022). Compared are none (the
embedding of the text in place of the image's), a linear one (ridge regression), a transformer that is trained to
regress (squared error and a contrastive loss, Patel et al. 2023), and the same transformer as a diffusion prior.
Settings are chosen on the validation captions; the table is of the test captions, measured once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import PriorTransformer
from torch import Tensor

from ldm.config import ObjectiveConfig, OptimConfig, SamplerConfig
from ldm.data.batches import CaptionedImages
from ldm.data.positions import generators, sample_index
from ldm.data.sources import build_source
from ldm.evaluation.evaluation import read_as_trained
from ldm.evaluation.images import pixel_values
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.retrieval import feature_distances, ranks_among
from ldm.machine import cores, hardware
from ldm.models.clip import CHUNK, load_clip, load_image_encoder
from ldm.models.network import prepare_denoiser
from ldm.models.provenance import read_provenance
from ldm.models.scheduler import build_scheduler
from ldm.objectives.contrastive import contrastive_losses
from ldm.objectives.denoising import Objective
from ldm.training.averages import Average, exponential
from ldm.training.optim import build_optimizer, learning_rate
from pipelines.sampling import both, denoise, guided_output

BATCH = 256
TIMED_STEPS = 40
SAMPLING_STEPS = 25
DROPOUT = 0.1
"""Share of captions that a diffusion prior trains without."""
CONTRASTIVE = 0.2
"""Weight of the contrastive loss of the regression (Patel et al. 2023)."""
OPTIM = OptimConfig(
    optimizer="muon", learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=30, decay="linear"
)
GUIDANCE = (1.0, 1.25, 1.5, 2.0, 3.0)
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
Texts = dict[str, Tensor]
"""What a CLIP makes of N captions, as keyword arguments of a `PriorTransformer`."""
Prior = Callable[[Texts, int], Tensor]
"""``prior(texts, draw)``: embeddings (N, D) as the CLIP computes them; another draw, another sample."""
Loss = Callable[[PriorTransformer, Tensor, Texts, list[int]], Tensor]


class Data:
    """The embeddings of all images and captions, and which are trained on."""

    def __init__(self, clip_folder: str):
        config = read_as_trained(read_provenance(clip_folder), None, {}, {}, image_size=64)
        images = CaptionedImages(build_source(config), config)
        shown, place = images.gallery()
        encoder = load_image_encoder(clip_folder, "clip")
        self.gallery = torch.cat([encoder(part) for part in torch.split(pixel_values(shown), CHUNK)])
        clip, tokenizer = load_clip(clip_folder, "clip")
        self.texts, self.own = dict[str, Texts](), dict[str, Tensor]()
        for split in ("train", "validation", "test"):
            pairs = [(place[row], text) for row in images.splits[split] for text in images.source.captions(row)]
            if split != "train":  # the first caption of each image
                pairs = [*{number: (number, text) for number, text in reversed(pairs)}.values()]
            self.texts[split] = texts_of(clip, tokenizer, [text for _, text in pairs])
            self.own[split] = torch.tensor([number for number, _ in pairs])
        self.null = texts_of(clip, tokenizer, [""])
        train = self.gallery[self.own["train"]]
        self.mean, self.std = train.mean(0), train.std(0)

    def x0(self, rows: Tensor) -> Tensor:
        """Return embeddings of unit scale of images of the gallery."""
        return (self.gallery[rows] - self.mean) / self.std

    def embeds(self, x0: Tensor) -> Tensor:
        """Return embeddings as the CLIP computes them."""
        return x0 * self.std + self.mean


@torch.no_grad()
def texts_of(clip: Any, tokenizer: Any, captions: list[str]) -> Texts:
    """Return what a CLIP makes of captions."""
    parts = []
    for start in range(0, len(captions), CHUNK):
        some = captions[start : start + CHUNK]
        tokens = tokenizer(some, padding="max_length", truncation=True, return_tensors="pt")
        output = clip.text_model(input_ids=tokens.input_ids)
        projected = clip.text_projection(output.pooler_output)
        parts.append((projected, output.last_hidden_state, tokens.attention_mask.bool()))
    names = ("proj_embedding", "encoder_hidden_states", "attention_mask")
    return {name: torch.cat(of) for name, of in zip(names, zip(*parts, strict=True), strict=True)}


def transformer(width: int, length: int, seed: int) -> PriorTransformer:
    """Return a transformer that predicts embeddings, and begins with 0."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 4}
    network = PriorTransformer(**sizes, embedding_dim=width, num_embeddings=length, additional_embeddings=4)
    prepare_denoiser(network, fresh=True)
    return network


def train(data: Data, loss_of: Loss, seed: int, seconds: float) -> PriorTransformer:
    """Return a transformer with averaged weights, trained for some seconds."""
    texts, own = data.texts["train"], data.own["train"]
    network = transformer(data.gallery.shape[1], texts["attention_mask"].shape[1], seed)
    optimizer, average = build_optimizer(network.parameters(), OPTIM), Average(network, exponential(0.99))
    began, step, total = time.perf_counter(), 0, None
    while total is None or step < total:
        positions = list(range(step * BATCH, (step + 1) * BATCH))
        rows = torch.tensor([sample_index(seed, position, len(own)) for position in positions])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total or 10**6, OPTIM)
        with torch.autocast("cpu", torch.bfloat16):
            some = {name: tensor[rows] for name, tensor in texts.items()}
            loss = loss_of(network, data.x0(own[rows]), some, positions)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        step += 1
        if step == TIMED_STEPS:
            total = int(step * seconds / (time.perf_counter() - began))
            print(f"  {total} steps", flush=True)
    return cast(PriorTransformer, average.module)


def regression(data: Data, seed: int, seconds: float) -> Prior:
    """Return a transformer that predicts the embedding at once."""

    def predict(network: PriorTransformer, texts: Texts) -> Tensor:
        nothing = torch.zeros_like(texts["proj_embedding"])
        output: Tensor = network(nothing, torch.zeros(len(nothing)), **texts, return_dict=False)[0]
        return output.float()

    def loss(network: PriorTransformer, x0: Tensor, texts: Texts, positions: list[int]) -> Tensor:
        found = predict(network, texts)
        one, other = F.normalize(data.embeds(found), dim=1), F.normalize(data.embeds(x0), dim=1)
        contrast = contrastive_losses(one, other, one, other, torch.tensor(20.0)).mean()
        return F.mse_loss(found, x0) + CONTRASTIVE * contrast

    network = train(data, loss, seed, seconds)

    @torch.no_grad()
    def prior(texts: Texts, draw: int) -> Tensor:
        return data.embeds(predict(network, texts))

    return prior


class Diffusion:
    """A transformer that predicts the embedding from noise, in several steps."""

    def __init__(self, data: Data, seed: int, seconds: float):
        config = ObjectiveConfig(path="cosine", prediction_type="sample")
        self.data, self.seed = data, seed
        self.objective, self.scheduler = Objective(config), build_scheduler(config, SamplerConfig())
        self.network = train(data, self.loss, seed, seconds).eval()

    def loss(self, network: PriorTransformer, x0: Tensor, texts: Texts, positions: list[int]) -> Tensor:
        """Return the loss of a batch, some of whose captions are dropped."""
        noise, levels = self.objective.draw(x0, generators(self.seed, positions, "noise"))
        drops = torch.rand(len(x0), generator=generators(self.seed, positions[:1], "drop")[0]) < DROPOUT
        kept = {
            name: torch.where(drops.view(-1, *[1] * (tensor.ndim - 1)), self.data.null[name], tensor)
            for name, tensor in texts.items()
        }

        def predict(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return cast(Tensor, network(x_t, timesteps, **kept, return_dict=False)[0])

        return self.objective.loss_at(predict, x0, noise, levels).mean()

    @torch.no_grad()
    def sample(self, texts: Texts, draw: int, guidance_scale: float, candidates: int = 1) -> Tensor:
        """Return embeddings; of several candidates the nearest to the text (Ramesh et al. 2022, section 2.2)."""
        null = {name: tensor.expand_as(texts[name]) for name, tensor in self.data.null.items()}
        kwargs = both(null, texts) if guidance_scale > 1 else texts

        def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
            return guided_output(self.network, self.scheduler, x_t, timestep, guidance_scale, (), kwargs)

        found, pooled = [], texts["proj_embedding"]
        for number in range(candidates):
            noise = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1000 * draw + number))
            self.scheduler.set_timesteps(SAMPLING_STEPS)
            found.append(self.data.embeds(denoise(predict, self.scheduler, noise, self.scheduler.timesteps)))
        likeness = torch.stack([F.cosine_similarity(one, pooled) for one in found])
        return torch.stack(found)[likeness.argmax(0), torch.arange(len(pooled))]


def linear(data: Data, penalty: float) -> Prior:
    """Return a ridge regression from the embedding of a text and the mean of its hidden states."""

    def features(texts: Texts) -> Tensor:
        mask = texts["attention_mask"][..., None]
        mean = (texts["encoder_hidden_states"] * mask).sum(1) / mask.sum(1)
        return torch.cat([texts["proj_embedding"], mean, torch.ones(len(mean), 1)], 1).double()

    known, wanted = features(data.texts["train"]), data.x0(data.own["train"]).double()
    weights = torch.linalg.solve(known.T @ known + penalty * torch.eye(known.shape[1]), known.T @ wanted)
    return lambda texts, draw: data.embeds((features(texts) @ weights).float())


def measured(data: Data, split: str, prior: Prior) -> dict[str, Measure]:
    """Return cosine to the true embeddings and to those of others, R@k among all, and the likeness of two samples."""
    texts, own = data.texts[split], data.own[split]
    one, other, true = prior(texts, 0), prior(texts, 1), data.gallery[own]
    ranks = ranks_among(feature_distances(one.numpy(), data.gallery.numpy()), own.numpy())
    return {
        "cosine": mean_of(F.cosine_similarity(one, true).numpy()),
        "cosine to others": mean_of(F.cosine_similarity(one, true.roll(1, 0)).numpy()),
        "R@1": mean_of(ranks < 1),
        "R@5": mean_of(ranks < 5),
        "cosine of two samples": mean_of(F.cosine_similarity(one, other).numpy()),
    }


def best(data: Data, priors: dict[float, Prior]) -> float:
    """Return the setting with the best R@1 on the validation captions."""
    return max(priors, key=lambda value: measured(data, "validation", priors[value])["R@1"].value)


def ladder(data: Data, seeds: int, seconds: float) -> Iterator[tuple[str, Prior]]:
    """Yield each prior with its name."""
    yield "none", lambda texts, draw: texts["proj_embedding"]
    penalties = {value: linear(data, value) for value in PENALTIES}
    penalty = best(data, penalties)
    yield f"linear, penalty {penalty:g}", penalties[penalty]
    for seed in range(seeds):
        yield f"regression, seed {seed}", regression(data, seed, seconds)
        sample = Diffusion(data, seed, seconds).sample
        scales: dict[float, Prior] = {scale: partial(sample, guidance_scale=scale) for scale in GUIDANCE}
        scale = best(data, scales)
        yield f"diffusion, guidance {scale:g}, seed {seed}", scales[scale]
        yield f"the same, best of 2, seed {seed}", partial(sample, guidance_scale=scale, candidates=2)


def main() -> None:
    """Measure each prior; the result is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="folder of a CLIP")
    parser.add_argument("out", type=Path, help="file for the result")
    parser.add_argument("--minutes", type=float, default=4, help="of training, for each prior that is trained")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    data, rows = Data(arguments.clip), []
    for name, prior in ladder(data, arguments.seeds, 60 * arguments.minutes):
        found = {split: measured(data, split, prior) for split in ("validation", "test")}
        numbers = {split: {key: asdict(of) for key, of in several.items()} for split, several in found.items()}
        rows.append({"prior": name, **numbers})
        print(name, {key: str(of) for key, of in found["validation"].items()}, flush=True)
        result = {"hardware": hardware(), "minutes": arguments.minutes, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
