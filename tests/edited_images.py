"""Images of four kinds and edits of them, so that it is known which are alike: the tests, `benchmarks.near_duplicates`.

An image and its edits are alike. Nothing else is, siblings included: images that share all parts but one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
FINE = 4
"""Images are drawn this many times as large, then reduced."""
SIDE = SIZE * FINE
FLAG_COLOURS = ("#ce1126", "#002395", "#6cace4", "#007a3d", "#fcd116", "#f77f00", "#ffffff", "#101010", "#7b3f00")
VISIBLE = 0.02
"""Share of the pixels in which siblings differ by at least 48 levels."""

Part = Callable[[ImageDraw.ImageDraw], None]


@dataclass(frozen=True)
class Sketch:
    """Parts that are drawn one over the other, and what can take the place of one."""

    ground: str
    parts: tuple[Part, ...]
    another: Callable[[np.random.Generator], Part]
    key: object = None
    """Of two that share it only one may be in a set."""

    def image(self) -> Image.Image:
        """Return the drawing, RGB of `SIZE` pixels on a side."""
        fine = Image.new("RGB", (SIDE, SIDE), self.ground)
        canvas = ImageDraw.Draw(fine)
        for part in self.parts:
            part(canvas)
        return fine.resize((SIZE, SIZE), Image.Resampling.BOX)

    def sibling(self, rng: np.random.Generator) -> Sketch:
        """Return a sketch with another part in the place of one."""
        parts = list(self.parts)
        parts[int(rng.integers(len(parts)))] = self.another(rng)
        return Sketch(self.ground, tuple(parts), self.another)


def _box(rng: np.random.Generator, least: float, most: float) -> tuple[float, float, float, float]:
    """Return a box of random place, its sides shares of the image's."""
    width, height = SIDE * rng.uniform(least, most, 2)
    left, top = rng.uniform(SIDE * 0.05, SIDE * 0.95 - np.array([width, height]))
    return float(left), float(top), float(left + width), float(top + height)


def _points(rng: np.random.Generator, box: tuple[float, float, float, float], count: int) -> list[tuple[float, float]]:
    left, top, right, bottom = box
    return [(float(rng.uniform(left, right)), float(rng.uniform(top, bottom))) for _ in range(count)]


def _stroke(rng: np.random.Generator) -> Part:
    """Return a thin black line: an outline, an arc, or a line with corners."""
    box, width, kind = _box(rng, 0.05, 0.6), int(rng.integers(1, 7)), rng.integers(4)
    points = _points(rng, box, int(rng.integers(2, 7)))
    start, length = rng.integers(360), rng.integers(60, 300)

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        if kind == 0:
            canvas.ellipse(box, outline="black", width=width)
        elif kind == 1:
            canvas.rectangle(box, outline="black", width=width)
        elif kind == 2:
            canvas.arc(box, int(start), int(start + length), fill="black", width=width)
        else:
            canvas.line(points, fill="black", width=width, joint="curve")

    return draw


def drawing(rng: np.random.Generator) -> Sketch:
    """Return thin black lines on white."""
    return Sketch("white", tuple(_stroke(rng) for _ in range(rng.integers(2, 7))), _stroke)


def _shape_near_the_middle(rng: np.random.Generator) -> Part:
    """Return a small filled shape."""
    width, height = SIDE * rng.uniform(0.04, 0.3, 2)
    x, y = SIDE * rng.normal(0.5, 0.08, 2)
    box = (float(x - width / 2), float(y - height / 2), float(x + width / 2), float(y + height / 2))
    colour = tuple(int(level) for level in rng.integers(0, 200, 3))
    points, kind = _points(rng, box, int(rng.integers(3, 7))), rng.integers(3)

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        if kind == 0:
            canvas.ellipse(box, fill=colour)
        elif kind == 1:
            canvas.rectangle(box, fill=colour)
        else:
            canvas.polygon(points, fill=colour)

    return draw


def icon(rng: np.random.Generator) -> Sketch:
    """Return a few small shapes in the middle of much white."""
    return Sketch(
        "white", tuple(_shape_near_the_middle(rng) for _ in range(rng.integers(2, 6))), _shape_near_the_middle
    )


def _stripe(place: float, end: float, upright: bool, colour: str) -> Part:
    box = (SIDE * place, 0, SIDE * end, SIDE) if upright else (0, SIDE * place, SIDE, SIDE * end)
    return lambda canvas: canvas.rectangle(box, fill=colour)


def _emblem(rng: np.random.Generator, colour: str) -> Part:
    radius, corners = SIDE * float(rng.choice([0.08, 0.14, 0.22])), int(rng.choice([0, 3, 4, 5]))
    x, y = (float(SIDE * rng.choice([0.27, 0.5, 0.73])) for _ in range(2))
    turns = np.arange(2 * corners) * np.pi / max(corners, 1) - np.pi / 2
    radii = np.where(np.arange(2 * corners) % 2, radius * 0.5, radius)
    star = [(x + float(r * np.cos(t)), y + float(r * np.sin(t))) for r, t in zip(radii, turns, strict=True)]
    disc = (x - radius, y - radius, x + radius, y + radius)
    return lambda canvas: canvas.polygon(star, fill=colour) if star else canvas.ellipse(disc, fill=colour)


def flag(rng: np.random.Generator) -> Sketch:
    """Return three to six stripes with an emblem of a colour that none of them has."""
    count, upright = int(rng.integers(3, 7)), bool(rng.integers(2))
    order = [str(colour) for colour in rng.permutation(FLAG_COLOURS)]
    stripes = [_stripe(n / count, (n + 1) / count, upright, order[n]) for n in range(count)]
    unused = order[count:]
    emblems = [_emblem(rng, unused[0])]

    def another(rng: np.random.Generator) -> Part:
        return _emblem(rng, unused[int(rng.integers(len(unused)))])

    return Sketch("white", (*stripes, *emblems), another, (upright, *order[:count]))


@dataclass(frozen=True)
class Noise:
    """Smooth random colours, from few to each side."""

    coarse: np.ndarray
    key: object = None

    def image(self) -> Image.Image:
        """Return them, RGB of `SIZE` pixels on a side."""
        return Image.fromarray(self.coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    def sibling(self, rng: np.random.Generator) -> Noise:
        """Return noise with a corner of other colours."""
        coarse = self.coarse.copy()
        coarse[:2, :2] = rng.integers(0, 256, (2, 2, 3))
        return Noise(coarse)


def noise(rng: np.random.Generator) -> Noise:
    """Return smooth noise."""
    return Noise(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))


KINDS: dict[str, Callable[[np.random.Generator], Sketch | Noise]] = {
    "line drawings": drawing,
    "icons on white": icon,
    "flags": flag,
    "smooth noise": noise,
}


def recoded(image: Image.Image, kind: str, **options: int) -> Image.Image:
    """Return the image as it comes back from a file of that format."""
    file = BytesIO()
    image.save(file, kind, **options)
    return Image.open(file).convert("RGB")


def resized(image: Image.Image, factor: float, resample: Image.Resampling) -> Image.Image:
    """Return the image in another size."""
    return image.resize((round(image.width * factor), round(image.height * factor)), resample)


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda image: resized(image, 0.5, Image.Resampling.LANCZOS),
    "a quarter": lambda image: resized(image, 0.25, Image.Resampling.BOX),
    "twice": lambda image: resized(image, 2, Image.Resampling.BICUBIC),
    "JPEG 70": lambda image: recoded(image, "JPEG", quality=70),
    "JPEG 30": lambda image: recoded(image, "JPEG", quality=30),
    "WEBP 50": lambda image: recoded(image, "WEBP", quality=50),
    "palette of 256 (GIF)": lambda image: recoded(image, "GIF"),
}


def differ(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two images of one size are visibly others."""
    apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max(2)
    return bool((apart >= 48).mean() >= VISIBLE)


def originals(kind: str, count: int, seed: int, siblings: float = 0.1) -> Iterator[Image.Image]:
    """Yield `count` images that are not alike, a share of them siblings of the one before."""
    rng, made, keys = np.random.default_rng([seed, list(KINDS).index(kind)]), 0, set()
    while made < count:
        sketch = KINDS[kind](rng)
        if sketch.key in keys and sketch.key is not None:
            continue
        keys.add(sketch.key)
        image = sketch.image()
        yield image
        made += 1
        if made < count and rng.random() < siblings / (1 - siblings):
            other = sketch.sibling(rng).image()
            while not differ(image, other):
                other = sketch.sibling(rng).image()
            yield other
            made += 1
