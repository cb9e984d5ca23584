"""Sheets and grids hold every image, pixel by pixel, in its place, and captions that can be read."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ldm.evaluation.images import (
    CELL_WIDTH,
    GAP,
    LINE_HEIGHT,
    MARGIN,
    comparison_sheet,
    contact_sheet,
    image_grid,
    wrap,
)

from .table import table

LONG = "men with bunny ears medium skin tone medium-dark skin tone"


def random_images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def places(sheet: Image.Image, image: np.ndarray, factor: int = 2) -> list[tuple[int, int]]:
    """Return the (x, y) at which the enlarged image stands in the sheet, pixel-exact."""
    pixels = np.asarray(sheet)
    block = image.repeat(factor, 0).repeat(factor, 1)
    height, width = block.shape[:2]
    corners = np.argwhere((pixels == block[0, 0]).all(-1))
    return [(x, y) for y, x in corners if np.array_equal(pixels[y : y + height, x : x + width], block)]


def test_grid_has_the_images_row_by_row() -> None:
    images = random_images(5, 10, 12)
    grid = np.asarray(image_grid(images, columns=3))
    assert grid.shape == (2 * 10 + GAP, 3 * 12 + 2 * GAP, 3)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        y, x = row * (10 + GAP), column * (12 + GAP)
        np.testing.assert_array_equal(grid[y : y + 10, x : x + 12], image)
    assert len(np.unique(grid[12:, 28:].reshape(-1, 3), axis=0)) == 1  # the empty place
    assert image_grid(images[:2], columns=3).size == (2 * 12 + GAP, 10)


@table(("height", "width", "factor"), [(64, 64, 2), (32, 32, 4), (160, 160, 1), (40, 100, 2)])
def test_sheet_has_each_generated_image_over_the_true_one(height: int, width: int, factor: int) -> None:
    generated, true = random_images(5, height, width), random_images(5, height, width, seed=1)
    sheet = comparison_sheet(["cat"] * 5, generated, true, columns=3)
    corners = []
    for above, below in zip(generated, true, strict=True):
        ((x, y),) = places(sheet, above, factor)
        assert places(sheet, below, factor) == [(x, y + height * factor + GAP)]
        corners.append((x, y))
    columns = sorted({x for x, _ in corners})
    rows = sorted({y for _, y in corners})
    assert corners == [(columns[index % 3], rows[index // 3]) for index in range(5)]


def test_sheet_is_as_large_as_its_images_and_captions() -> None:
    images = random_images(8)
    lines = len(wrap(LONG, CELL_WIDTH, ImageFont.load_default(size=14)))
    assert lines == 4
    flat = comparison_sheet(["cat"] * 8, images, images, columns=4)
    tall = comparison_sheet(["cat"] * 7 + [LONG], images, images, columns=4)
    assert tall.width == flat.width == places(flat, images[3])[0][0] + CELL_WIDTH + MARGIN
    assert tall.height == flat.height + 3 * LINE_HEIGHT
    assert flat.height == 2 * (2 * CELL_WIDTH + GAP + MARGIN // 2 + LINE_HEIGHT + MARGIN) + MARGIN


@table("long", [LONG, "Donaudampfschifffahrtsgesellschaftskapitän at work", "WWW " * 25])
def test_captions_stay_in_their_column_and_above_the_next_row(long: str) -> None:
    images = random_images(6)
    sheet = comparison_sheet([long] * 6, images, images, columns=3)
    pixels = np.asarray(sheet)
    corners = [places(sheet, image)[0] for image in images]
    for (x, y), (_, next_y) in zip(corners, [*corners[3:], *[(0, sheet.height)] * 3], strict=True):
        top = y + 2 * CELL_WIDTH + GAP
        inside = pixels[top + 1 : next_y - 1, x - 1 : x + CELL_WIDTH + 1]
        below = pixels[next_y - MARGIN // 2 : next_y - 1, x - 1 : x + CELL_WIDTH + 1]
        gutter = pixels[top + 1 : next_y - 1, x + CELL_WIDTH + 1 : x + CELL_WIDTH + MARGIN - 1]
        assert (inside < 100).any()  # ink
        assert (below == 255).all()
        assert (gutter == 255).all()


def test_each_caption_is_drawn_under_its_own_image() -> None:
    images = random_images(4)
    sheet = comparison_sheet(["", "", "cat", ""], images, images, columns=2)
    for index, image in enumerate(images):
        x, y = places(sheet, image)[0]
        top = y + 2 * CELL_WIDTH + GAP + 1
        under = np.asarray(sheet)[top : top + LINE_HEIGHT, x : x + CELL_WIDTH]
        assert (under < 100).any() == (index == 2)


def test_a_contact_sheet_has_each_image_over_its_caption() -> None:
    images = random_images(5)
    sheet = contact_sheet(["", "", "cat", "", ""], images, columns=3)
    pixels = np.asarray(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        ((x, y),) = places(sheet, image)
        assert x == MARGIN + column * (CELL_WIDTH + MARGIN)
        assert y == MARGIN + row * (CELL_WIDTH + MARGIN // 2 + LINE_HEIGHT + MARGIN)
        under = pixels[y + CELL_WIDTH + 1 : y + CELL_WIDTH + MARGIN // 2 + LINE_HEIGHT, x : x + CELL_WIDTH]
        assert (under < 100).any() == (index == 2)
    with pytest.raises(ValueError, match="got 1 captions and 5 images"):
        contact_sheet(["cat"], images)


def test_rows_are_labelled() -> None:
    images = random_images(1)
    sheet = comparison_sheet(["cat"], images, images)
    (x, y), (_, below) = places(sheet, images[0])
    margin = np.asarray(sheet)[:, : x - 1]
    heights = np.flatnonzero((margin < 100).any((1, 2)))  # rows of pixels with ink
    in_generated = (heights > y) & (heights < y + CELL_WIDTH)
    assert in_generated.any()
    assert not in_generated.all()
    for label, top in ((heights[in_generated], y), (heights[~in_generated], below)):
        assert abs((label[0] + label[-1]) / 2 - (top + CELL_WIDTH / 2)) < 4  # at half height
    assert (margin[:, :MARGIN] == 255).all()  # nothing is cut at the left


def test_wrapped_lines_fit_and_lose_no_word() -> None:
    font = ImageFont.load_default(size=14)
    for width in (60, 128, 400):
        lines = wrap(LONG, width, font)
        assert " ".join(lines) == LONG or width == 60
        assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
        assert all(font.getlength(line) <= width for line in lines)
    assert wrap("", 128, font) == [""]


def test_an_accent_the_font_lacks_is_left_out() -> None:
    images = random_images(1)
    with_accents = comparison_sheet(["Côte à pied"], images, images)
    assert with_accents.tobytes() == comparison_sheet(["Cote a pied"], images, images).tobytes()


def test_wrong_input_is_refused() -> None:
    images = random_images(2)
    with pytest.raises(ValueError, match="1 captions"):
        comparison_sheet(["cat"], images, images)
    with pytest.raises(ValueError, match=r"true \(2, 32, 64, 3\)"):
        comparison_sheet(["cat", "dog"], images, images[:, :32])
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(images[:0])
    with pytest.raises(ValueError, match="images is float64"):
        image_grid(images / 255)
    with pytest.raises(ValueError, match="columns is 0"):
        image_grid(images, columns=0)


@table("letter", ["x", "x ", "\u200d", "\u0301", "e\u0301"])
def test_a_caption_without_end_makes_no_sheet_without_end(letter: str) -> None:
    images = random_images(1)
    assert contact_sheet([letter * 100_000], images).height < 1500
