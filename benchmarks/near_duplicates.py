"""Precision and recall of near duplicates by kind of image and edit: python -m benchmarks.near_duplicates.

The set has N images of a kind, and one edit of each, from `tests.edited_images.EDITS` in turn. Only an image and its
edit are near duplicates. Choose thresholds with one seed, and report those of another.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from itertools import combinations

from ldm.data.duplicates import groups, look
from tests.edited_images import EDITS, KINDS, originals


def measure(kind: str, count: int, seed: int) -> None:
    """Print precision and recall for `count` images of a kind and an edit of each."""
    images = list(originals(kind, count, seed))
    names = list(EDITS)
    images += [EDITS[names[number % len(names)]](image) for number, image in enumerate(images)]
    began = time.process_time()
    looks = [look(image) for image in images]
    looked = time.process_time()
    found = groups(looks)
    ended = time.process_time()
    pairs = {pair for group in found for pair in combinations(group, 2)}
    true = {(number, number + count) for number in range(count)}
    print(
        f"{kind}: {2 * count} images, look {1e3 * (looked - began) / len(images):.2f} ms each, "
        f"groups {ended - looked:.2f} s; pairs {len(pairs)}, false {len(pairs - true)}, "
        f"precision {share(pair in true for pair in pairs):.4f}, largest group {max(map(len, found), default=0)}"
    )
    for place, name in enumerate(names):
        print(f"  {name}: recall {share((n, n + count) in pairs for n in range(place, count, len(names))):.4f}")


def share(flags: Iterable[bool]) -> float:
    """Return the share of true flags; 1 if there are no flags."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="images of a kind, without their edits")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    known = parser.parse_args()
    for kind in known.kinds:
        measure(kind, known.count, known.seed)


if __name__ == "__main__":
    main()
