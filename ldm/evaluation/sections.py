"""The sections of an evaluation's report; each answers one question with numbers beside their baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.evaluation.distances import Features, frechet_distance, kid
from ldm.evaluation.factors import chance, covered, factor_accuracy, families
from ldm.evaluation.gain import Losses
from ldm.evaluation.images import comparison_sheet, contact_sheet, labelled_sheet, pixel_values
from ldm.evaluation.measure import Measure, mean_of
from ldm.evaluation.neighbours import NEIGHBOURS, euclidean, manifold_measures, share_nearer, spread
from ldm.evaluation.quality import psnr, ssim
from ldm.evaluation.report import Curve, Figure, Row, Section
from ldm.evaluation.retrieval import Distances, feature_distances, ranks_among, recalls
from ldm.evaluation.subject import Subject
from ldm.models.vision import Images

SHEET_IMAGES = 24
"""Images on a sheet of samples."""
CLOSEST_PAIRS = 12
"""Images on the sheet of those nearest to training."""
NamedDistances = Mapping[str, Distances]
"""Distances of the "generated", "true", "copy" (and "ceiling") images of a `Subject` from the gallery, (N, M) each."""


def retrieval(subject: Subject, network: str) -> Section:
    """Return R@k: is the image nearest to a generated one its caption's own? In pixels and in features."""
    features = {name: feature_distances(of, subject.gallery_features) for name, of in subject.features.items()}
    rows = _recall_rows(subject, subject.pixel_distances, "pixels") + _recall_rows(subject, features, network)
    shown = slice(0, SHEET_IMAGES)
    sheet = comparison_sheet(subject.captions[shown], subject.generated[shown], subject.true[shown])
    text = (
        f"R@k is the share of the {len(subject)} held-out captions whose true image is among the k images nearest to "
        f"the generated one, of all {len(subject.gallery)} distinct images of the data, training images included. The "
        "distance in pixels is the RGB difference at 16 x 16, the smallest over small shifts. The distance in "
        f"{network} is one minus the cosine of the features. Ties are misses."
    )
    meaning = f"Share of the captions whose image has its true image as the nearest of {len(subject.gallery):,}."
    figures = [Figure("Generated and true", "", sheet)]
    return Section("Does it follow the caption?", text, rows, (), figures, meaning)


def _recall_rows(subject: Subject, distances: NamedDistances, where: str) -> list[Row]:
    found = {name: recalls(ranks_among(of, subject.own_index)) for name, of in distances.items() if name != "true"}
    shuffled = recalls(ranks_among(distances["generated"], subject.own_index[subject.exchanged]))
    beside = {name: of for name, of in (found | {"shuffled": shuffled}).items() if name != "generated"}
    return [
        Row(f"R@{key}, {where}", value, "higher", {name: of[key] for name, of in beside.items()})
        for key, value in found["generated"].items()
    ]


def caption_factors(subject: Subject, factors: Mapping[str, Sequence[str]], known: Mapping[str, int]) -> Section:
    """Return the accuracy of single words of the captions, by factor: see `factor_accuracy`.

    `factors` are the alternatives of each factor, `known` all captions and the places of their images in the gallery.
    """
    distances, rows = subject.pixel_distances, []
    captions, places = list(known), np.array(list(known.values()))
    for factor, alternatives in factors.items():
        members = families(captions, alternatives, subject.captions)
        within = [None if family is None else places[family] for family in members]
        if not covered(within):
            continue
        found = {name: factor_accuracy(of, subject.own_index, within) for name, of in distances.items()}
        beside = {"chance": chance(subject.own_index, within), "copy": found["copy"]}
        if "ceiling" in found:
            beside["ceiling"] = found["ceiling"]
        note = f"{found['generated'].n} captions have such a family"
        rows.append(Row(factor, found["generated"], "higher", beside, note))
    text = (
        "The share of captions whose true image is the nearest of its family: the images whose captions differ in this "
        "factor alone. The distance is that in pixels. A copier of training images gets other members of the family."
    )
    meaning = "Share of the images that show this word of their caption, and not another of its kind."
    return Section("Which words does it follow?", text, rows, meaning=meaning)


def clip_scores(subject: Subject, score: Callable[[Images, Sequence[str]], NDArray[np.float32]], name: str) -> Section:
    """Return the CLIP score, the similarity of images and captions by a CLIP; `name` is the CLIP's."""
    others = [subject.captions[row] for row in subject.exchanged]
    beside = {
        "copy": mean_of(score(subject.copied, subject.captions)),
        "shuffled": mean_of(score(subject.generated, others)),
        "ceiling": mean_of(score(subject.true, subject.captions)),
    }
    row = Row(f"CLIP score, {name}", mean_of(score(subject.generated, subject.captions)), "higher", beside)
    text = "100 times the cosine of a CLIP's embeddings of image and caption, not below 0. Ceiling: the true images."
    return Section("CLIP score", text, [row], meaning="Agreement of image and caption, as a CLIP sees it.")


def caption_gain(losses: tuple[Losses, Losses], levels: Sequence[float]) -> Section:
    """Return the conditional gain by noise level; `losses` are those with own captions and with captions of others."""
    right, wrong = losses
    gain = wrong - right
    row = Row("conditional gain, mean over noise levels", mean_of(gain.mean(0)), "higher", {})

    def by_level(found: Losses) -> list[tuple[float, Measure]]:
        return [(level, mean_of(of)) for level, of in zip(levels, found, strict=True)]

    both = {"own captions": by_level(right), "captions of others": by_level(wrong)}
    gains = {"conditional gain": by_level(gain)}
    curves = [
        Curve("Loss on held-out images", "noise level (0: image, 1: noise)", "squared error", both),
        Curve("Conditional gain", "noise level (0: image, 1: noise)", "loss with others' captions - own", gains),
    ]
    text = (
        "The loss on held-out images with the captions of others, minus the loss with their own, at the same noise. "
        "0: the model does not use the text."
    )
    meaning = "Rise of the loss on true images when they get the captions of others; 0: captions are not used."
    return Section("What are the captions worth?", text, [row], curves, meaning=meaning)


def samples(subject: Subject) -> Section:
    """Return the first images of a model that is not conditioned on captions."""
    shown = subject.generated[:SHEET_IMAGES]
    sheet = contact_sheet([""] * len(shown), shown, 8)
    text = f"The first of {len(subject)} images, with consecutive seeds; none was chosen."
    return Section("What do its samples look like?", text, (), (), [Figure("Generated", "", sheet)])


def likeness(subject: Subject, network: str) -> Section:
    """Return the distances of the generated images, as a set, from the true images of the same captions."""
    features = subject.features
    order = np.random.default_rng(0).permutation(len(subject))
    half, other = order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]
    sets = {name: of for name, of in features.items() if name != "true"}
    rows = [_row(f"KID, {network}", "lower", {n: kid(of, features["true"]) for n, of in sets.items()}
                 | {"floor": kid(features["true"][half], features["true"][other])})]  # fmt: skip
    halves = {name: of[half] for name, of in sets.items()} | {"floor": features["true"][half]}
    reference = features["true"][other]
    frechet = {name: frechet_distance(of, reference) for name, of in halves.items()}
    rows.append(_row(f"Frechet distance at N = {len(half)}, {network}", "lower", frechet))
    if len(half) > NEIGHBOURS:
        found = {name: manifold_measures(of, reference) for name, of in halves.items()}
        rows += [
            _row(f"{key} at N = {len(half)}", "higher", {name: of[key] for name, of in found.items()})
            for key in found["generated"]
        ]
    text = (
        f"KID compares all {len(subject)} images with as many true ones. It is unbiased: its floor, one half of the "
        f"true images against the other half, is 0 but for chance. The other measures depend on the number of images: "
        f"each compares {len(half)} images of one half of the captions with the true images of the other half. "
        "Ceiling: the true images through the autoencoder. Copy: the images of the nearest training captions."
    )
    meaning = "Distance between the images, as a set, and the true ones; the floor is that of true images alone."
    return Section("Do its images look like true ones?", text, rows, meaning=meaning)


def _row(name: str, better: Literal["higher", "lower"], found: Mapping[str, Measure]) -> Row:
    beside = {baseline: measure for baseline, measure in found.items() if baseline != "generated"}
    return Row(name, found["generated"], better, beside)


def autoencoder(subject: Subject, rebuilt_images: Images, network: str) -> Section:
    """Return the quality of the autoencoder's reconstructions, (N, S, S, 3), which limits that of every denoiser."""
    true, rebuilt = pixel_values(subject.true), pixel_values(rebuilt_images)
    features = subject.features
    rows = [
        Row("PSNR, dB", mean_of(psnr(rebuilt, true).double().numpy()), "higher", {}),
        Row("SSIM", mean_of(ssim(rebuilt, true).double().numpy()), "higher", {}),
        Row(f"KID of reconstructions, {network}", kid(features["ceiling"], features["true"]), "lower", {}),
    ]
    text = "The true images of the held-out captions through the autoencoder and back."
    meaning = "Likeness of true images to what the autoencoder makes of them: no sampled image can be better."
    return Section("What can the latents carry?", text, rows, meaning=meaning)


def memorisation(subject: Subject, network: str) -> Section:
    """Return the share of images that are nearer to training images than true held-out images are."""
    training = subject.training_images
    keys = subject.gallery_features[training]
    distances = {name: euclidean(of, keys) for name, of in subject.features.items()}
    found = {name: of.min(1) for name, of in distances.items()}
    pixels = {name: of[:, training].min(1) for name, of in subject.pixel_distances.items()}
    copy_row = {"copy": share_nearer(found["copy"], found["true"])}
    rows = [
        Row(f"nearer to training than the true image, {network}",
            share_nearer(found["generated"], found["true"]), "none", copy_row),
        Row("nearer to training than the true image, pixels",
            share_nearer(pixels["generated"], pixels["true"]), "none",
            {"copy": share_nearer(pixels["copy"], pixels["true"])}),
    ]  # fmt: skip
    nearest = distances["generated"].argmin(1)
    closest = np.argsort(found["generated"], kind="stable")[:CLOSEST_PAIRS]
    sheet = labelled_sheet(
        [subject.captions[row] for row in closest],
        {
            "generated": subject.generated[closest],
            "training": subject.gallery[training[nearest[closest]]],
            "true": subject.true[closest],
        },
    )
    text = (
        "The share of generated images that are nearer to their nearest training image than the true held-out image of "
        "the same caption is to its own. New images have about one half; a copier has 1."
    )
    title = f"The {len(closest)} generated images nearest to training"
    meaning = "About 0.5: the images are as new as unseen true ones; 1: they are copies of training images."
    return Section("Does it copy its training images?", text, rows, (), [Figure(title, "", sheet)], meaning)


def variety(captions: Sequence[str], images: Images, features: Features, per_prompt: int, network: str) -> Section:
    """Return the spread of images of one prompt; `images`, (N, H, W, 3), are `per_prompt` of each caption in turn."""
    prompt = np.repeat(np.arange(len(captions)), per_prompt)
    row = Row(f"spread within a prompt over spread across prompts, {network}", spread(features, prompt), "none", {})
    labels = [caption for caption in captions for _ in range(per_prompt)]
    shown = slice(0, 4 * per_prompt)
    sheet = contact_sheet(labels[shown], images[shown], per_prompt)
    text = (
        f"{per_prompt} images of each of {len(captions)} prompts, with different seeds. 0: every seed gives the same "
        "image; 1: the prompt decides nothing."
    )
    meaning = "0: all seeds give the same image of a caption; 1: the caption decides nothing."
    figures = [Figure("Same prompt", "", sheet)]
    return Section("How much do images of one prompt differ?", text, [row], (), figures, meaning)


def sweep(name: str, points: Mapping[float, tuple[Measure, Measure]], network: str, log_x: bool) -> Section:
    """Return curves of R@1 and KID, which are the `points`, over the values of the sampling setting `name`."""
    line = sorted(points.items())
    at_1 = {"R@1, pixels": [(x, r_at_1) for x, (r_at_1, _) in line]}
    distance = {f"KID, {network}": [(x, kid_there) for x, (_, kid_there) in line]}
    curves = [Curve(f"R@1 by {name}", name, "R@1", at_1, log_x), Curve(f"KID by {name}", name, "KID", distance, log_x)]
    return Section(f"By {name}", "On the validation captions, which are not those of the numbers above.", (), curves)
