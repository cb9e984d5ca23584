"""Grids of images, and sheets that show each generated image over the true one."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.evaluation.measure import Indices
from ldm.models.vision import Images

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

GAP = 2
"""Pixels between the images of a grid."""

CELL_WIDTH = 128
"""Least width of an image on a sheet, in pixels: smaller ones are enlarged by a whole factor."""

MARGIN = 12
"""Pixels around a sheet and between its columns."""

MAX_LETTERS = 300
"""Letters of a caption that a sheet shows."""

FONT_SIZE = 14
LINE_HEIGHT = 18
"""Pixels."""

PAPER_COLOUR = (255, 255, 255)
LINE_COLOUR = (208, 208, 208)
TEXT_COLOUR = (32, 32, 32)


def pixel_values(images: Images) -> Tensor:
    """Return the images as (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_grid(images: Images, columns: int = 8) -> Image.Image:
    """Return a grid of the images, (N, H, W, 3), unchanged, row by row, with grey gaps of 2 pixels.

    Fewer than `columns` images make a narrower grid. Cells without an image are grey.
    """
    _check(images, "images", columns)
    columns = min(columns, len(images))
    height, width = images.shape[1:3]
    rows = -(-len(images) // columns)
    size = (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP)
    grid = Image.new("RGB", size, LINE_COLOUR)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(image), (column * (width + GAP), row * (height + GAP)))
    return grid


def comparison_sheet(captions: Sequence[str], generated: Images, true: Images, columns: int = 6) -> Image.Image:
    """Return a sheet with each generated image over the true one and the caption wrapped underneath.

    `generated` and `true` are (N, H, W, 3). Images narrower than 128 pixels are enlarged by a whole factor, by
    repeating pixels; otherwise they stay as they are. `columns` pairs stand side by side, and the rows are labelled
    "generated" and "true". The built-in font has plain Latin letters only: accents are left out, and letters of other
    scripts become boxes. A caption is cut after 300 letters.
    """
    _check(generated, "generated", columns)
    if generated.shape != true.shape or len(captions) != len(generated):
        got = f"{len(captions)} captions, generated {generated.shape}, true {true.shape}"
        raise ValueError(f"got {got}; expected as many captions as images, in one shape")
    return labelled_sheet(captions, {"generated": generated, "true": true}, columns)


def contact_sheet(captions: Sequence[str], images: Images, columns: int = 6) -> Image.Image:
    """Return a sheet with each image, (N, H, W, 3), over its caption, in the style of `comparison_sheet`."""
    _check(images, "images", columns)
    if len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions and {len(images)} images; expected as many captions as images")
    return labelled_sheet(captions, {"": images}, columns)


def labelled_sheet(captions: Sequence[str], rows: Mapping[str, Images], columns: int = 6) -> Image.Image:
    """Return a sheet of several rows of images, each labelled with its name, over the N captions.

    Each of `rows` is (N, H, W, 3), all of one size. `comparison_sheet` is the case of two rows.
    """
    font = ImageFont.load_default(size=FONT_SIZE)
    shape = next(iter(rows.values())).shape
    factor = -(-CELL_WIDTH // shape[2])
    height, width = shape[1] * factor, shape[2] * factor
    columns = max(1, columns * 4 * height // max(width, 4 * height))  # fewer of strips, such as those of clips
    wrapped = [wrap(_plain(caption), width, font) for caption in captions]
    bands = [range(start, min(start + columns, len(captions))) for start in range(0, len(captions), columns)]
    caption_heights = [LINE_HEIGHT * max(len(wrapped[index]) for index in band) for band in bands]
    image_rows = len(rows) * (height + GAP) - GAP + MARGIN // 2  # the images and the space to the caption
    widest = max(_width(label, font) for label in rows)
    left = MARGIN + (widest + MARGIN if widest else 0)
    sheet_width = left + len(bands[0]) * (width + MARGIN)
    sheet_height = MARGIN + sum(caption_heights) + len(bands) * (image_rows + MARGIN)
    sheet = Image.new("RGB", (sheet_width, sheet_height), PAPER_COLOUR)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for band, caption_height in zip(bands, caption_heights, strict=True):
        for row, (label, images) in enumerate(rows.items()):
            y = top + row * (height + GAP)
            draw.text((left - MARGIN, y + height // 2), label, TEXT_COLOUR, font, anchor="rm")
            for column, index in enumerate(band):
                x = left + column * (width + MARGIN)
                draw.rectangle((x - 1, y - 1, x + width, y + height), outline=LINE_COLOUR)
                sheet.paste(_enlarge(images[index], factor), (x, y))
        for column, index in enumerate(band):
            for number, line in enumerate(wrapped[index]):
                x = left + column * (width + MARGIN)
                draw.text((x, top + image_rows + number * LINE_HEIGHT), line, TEXT_COLOUR, font)
        top += image_rows + caption_height + MARGIN
    return sheet


def nearest_sheet(
    captions: Sequence[str], gallery: Images, own_index: Indices, distances: NDArray[np.floating[Any]], count: int = 5
) -> Image.Image:
    """Return a sheet with the own image of each of N captions over the `count` nearest of the gallery, (M, H, W, 3).

    own_index: (N,), the place of the own images in the gallery. distances: (N, M).
    """
    nearest = distances.argsort(1)[:, :count]
    rows = {"own": gallery[own_index]}
    return labelled_sheet(
        captions, rows | {f"nearest {k + 1}": gallery[nearest[:, k]] for k in range(nearest.shape[1])}
    )


def written(conditions: Sequence[object]) -> list[str]:
    """Return the text to show beneath images sampled for these captions or classes; "" for None and for images."""
    return ["" if one is None or isinstance(one, Image.Image) else str(one) for one in conditions]


def wrap(caption: str, width: int, font: Font) -> list[str]:
    """Return the caption in lines of at most `width` pixels, at least one line; a wider word is broken."""
    lines = [""]
    for word in caption.split():
        joined = f"{lines[-1]} {word}".strip()
        if _width(joined, font) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _width(lines[-1] + letter, font) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _enlarge(image: NDArray[np.uint8], factor: int) -> Image.Image:
    return Image.fromarray(image.repeat(factor, axis=0).repeat(factor, axis=1))


def _plain(caption: str) -> str:
    letters = unicodedata.normalize("NFD", caption[: 4 * MAX_LETTERS])
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return plain if len(plain) <= MAX_LETTERS and len(caption) <= 4 * MAX_LETTERS else f"{plain[:MAX_LETTERS]}..."


def _width(text: str, font: Font) -> int:
    return int(np.ceil(font.getlength(text)))


def _check(images: Images, name: str, columns: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        got = f"{images.dtype} {images.shape}"
        raise ValueError(f"{name} is {got}; expected at least one image, uint8 (N, H, W, 3)")
    if columns < 1:
        raise ValueError(f"columns is {columns}; expected at least 1")
