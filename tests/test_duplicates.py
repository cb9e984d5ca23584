"""Images that look alike are found, in groups, and no others."""

from itertools import combinations

import numpy as np
from PIL import Image, ImageOps

from ldm.data.duplicates import BANDS, BITS, MOST_COLOUR, WINDOW, Look, _candidates, groups, look
from tests.edited_images import EDITS, KINDS, icon, originals
from tests.image_folders import noise_image

from .table import table

BLANK = bytes(32 * 32 * 3)


def pairs_of(found):
    return {pair for group in found for pair in combinations(group, 2)}


@table("kind", KINDS)
def test_known_edits_are_found_and_nothing_else(kind):
    """Two in five images share all parts but one with another; all sets are of 700 images, one edit each."""
    count = 350
    images = list(originals(kind, count, seed=3, siblings=0.4))
    looks = [look(image) for image in images]
    edits = [(name, number) for number, name in zip(range(count), list(EDITS) * count, strict=False)]
    looks += [look(EDITS[name](images[number])) for name, number in edits]
    found, true = pairs_of(groups(looks)), {(number, number + count) for number in range(count)}
    assert len(found & true) / len(found) >= 0.95
    recall = {name: np.mean([(n, n + count) in found for other, n in edits if other == name]) for name in EDITS}
    least = {name: 0.94 if name == "a quarter" else 0.98 for name in EDITS}
    assert all(recall[name] >= least[name] for name in EDITS), recall


def test_specks_in_another_place_or_colour_do_not_look_alike():
    def speck(x, y, colour, size=3):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (x, y, x + size, y + size))
        return look(image)

    others = [speck(30, 30, "black"), speck(24, 33, "black"), speck(30, 30, "red", 5), speck(30, 30, "blue", 5)]
    assert groups(others) == []


def test_grain_on_an_even_image_is_no_difference():
    rng = np.random.default_rng(4)
    grainy = [Image.fromarray((128 + 4 * rng.standard_normal((64, 64, 3))).astype(np.uint8)) for _ in range(2)]
    assert groups([look(image) for image in grainy]) == [[0, 1]]


def test_mirrors_and_other_colours_do_not_look_alike():
    image = noise_image(np.random.default_rng(2))
    red = Image.merge("RGB", image.split()[::-1])
    assert groups([look(image), look(ImageOps.mirror(image)), look(red), look(ImageOps.invert(image))]) == []


def test_groups_are_those_of_comparing_each_with_each():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2, (300, BITS), dtype=np.uint8)
    for index in range(100):  # up to 7 bits apart: certain to be found
        bits[200 + index] = bits[index]
        bits[200 + index, rng.choice(BITS, index % 8, replace=False)] ^= 1
    pixels = np.zeros((300, 32 * 32 * 3), np.uint8)
    pixels[260:] = MOST_COLOUR + 1
    looks = [Look(np.packbits(b).tobytes(), p.tobytes(), True) for b, p in zip(bits, pixels, strict=True)]
    assert groups(looks) == [[i, 200 + i] for i in range(60)]  # the last 40 have another colour
    assert groups(looks[:1]) == groups([]) == []


def test_groups_are_connected_sorted_and_the_same_in_any_order():
    rng = np.random.default_rng(6)
    images = [icon(rng).image() for _ in range(150)]
    images += [EDITS[name](images[number]) for number in (5, 5, 9, 17) for name in ("JPEG 70", "half the size")]
    images += [EDITS["twice"](images[9])]
    looks = [look(image) for image in images]
    assert groups(looks) == [[5, 150, 151, 152, 153], [9, 154, 155, 158], [17, 156, 157]]
    for _ in range(3):
        order = rng.permutation(len(looks))
        shuffled = groups([looks[row] for row in order])
        assert {frozenset(order[group].tolist()) for group in shuffled} == set(map(frozenset, groups(looks)))
        assert list(map(len, shuffled)) == [5, 4, 3]


def test_no_set_is_compared_each_with_each():
    """Nearly empty images have nearly the same bits: each is compared with a bounded number, none twice."""
    rng = np.random.default_rng(7)
    count = 1200
    bits = np.packbits(rng.random((count, BITS)) < 0.02, axis=1)
    pixels = np.full((count, 3, 16, 16), 250, np.uint8)
    pixels[:, :, 7:9, 7:9] = rng.integers(240, 256, (count, 3, 2, 2))
    pairs = np.concatenate([np.stack(pair, 1) for pair in _candidates(bits, pixels)])
    assert len(pairs) < count * WINDOW * BANDS < count * count / 2
    assert len(np.unique(np.sort(pairs, axis=1), axis=0)) == len(pairs)
    assert groups([Look(bytes(16), BLANK, True)] * 1000) == [list(range(1000))]
