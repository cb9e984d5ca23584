"""Captions that compose, such as "red circle": the accuracy of each factor (colour, shape) in the images."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ldm.evaluation.measure import Indices, Measure, mean_of
from ldm.files import read_text

Families = Sequence[Indices | None]
"""For each caption its family: itself and the captions that differ from it in one factor alone, as indices (or the
places of their images in the gallery). None where the family has no other member."""


def read_factors(path: str | Path) -> dict[str, list[str]]:
    """Return the factors in a YAML or JSON file, ``factor: [alternative, ...]``; an alternative is a word or several.

    Raises:
        ValueError: the file holds something else; FileNotFoundError: there is none.

    """
    try:
        found = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: neither YAML nor JSON: {' '.join(str(error).split())[:300]}") from None
    good = isinstance(found, dict) and all(
        isinstance(of, list) and len(of) > 1 and all(isinstance(word, str) and word.strip() for word in of)
        for of in found.values()
    )
    if not good:
        example = "colour: [red, blue]"
        raise ValueError(f"{path}: expected factors, each with a list of two alternatives or more, such as {example}")
    return {str(factor): [word.lower() for word in of] for factor, of in found.items()}


def families(captions: Sequence[str], alternatives: Sequence[str], wanted: Sequence[str]) -> Families:
    """Return the family of each of `wanted`, as indices in `captions`: those that differ in the `alternatives` alone.

    An alternative is found at word boundaries ("-" is part of a word), the longest first. The first one in a caption is
    the caption's value of the factor. No alternative is a value too: "judge", "woman judge" and "man judge" are one
    family for the alternatives woman and man. None for a caption whose family has no other member.
    """
    pattern = re.compile(
        r"(?<![\w-])(?:" + "|".join(map(re.escape, sorted(alternatives, key=len, reverse=True))) + r")(?![\w-])"
    )

    def rest(caption: str) -> str:
        return " ".join(pattern.sub(" ", caption.lower(), count=1).split())

    members = defaultdict(list)
    for place, caption in enumerate(captions):
        members[rest(caption)].append(place)
    found: list[Indices | None] = []
    for caption in wanted:
        family = members[rest(caption)]
        found.append(np.array(family) if len({captions[place].lower() for place in family}) > 1 else None)
    return found


def factor_accuracy(distances: NDArray[np.float64], own_index: Indices, within: Families) -> Measure:
    """Return the share of generated images that are nearer to their true image than to the rest of its family.

    `distances`, (N, M), are from each generated image to each image of the gallery. `own_index`, (N,), is the place of
    its true image there, and `within` are the families as such places. Images without a family are left out; ties are
    misses.
    """
    hits = []
    for row, family in enumerate(within):
        if family is None:
            continue
        others = np.setdiff1d(family, own_index[row])
        hits.append(bool((distances[row, others] > distances[row, own_index[row]]).all()))
    return mean_of(np.array(hits))


def chance(own_index: Indices, within: Families) -> Measure:
    """Return the accuracy of a random guess within the family, as `factor_accuracy` counts."""
    sizes = [len(np.union1d(family, own_index[row])) for row, family in enumerate(within) if family is not None]
    return mean_of(1 / np.array(sizes))


def covered(within: Families) -> int:
    """Return the number of captions that have a family."""
    return sum(family is not None for family in within)
