"""Image files of every kind, from the disk to ``pixel_values``, against what their formats define."""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages
from ldm.data.sources import build_source

from .table import table

SIZE = 16  # 256 pixels: each value of a byte once
DRAWS = np.random.default_rng(0)
EVERY = DRAWS.permutation(256).astype(np.uint8).reshape(SIZE, SIZE)
GREY = DRAWS.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
COLOURS = DRAWS.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
INKS = DRAWS.integers(0, 256, (SIZE, SIZE, 4), dtype=np.uint8)
PALETTE = DRAWS.integers(0, 256, (256, 3), dtype=np.uint8)
DEEP = DRAWS.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
DEEP[0, :6] = (0, 128, 129, 257, 65406, 65535)  # 128 is less than half of 257, and 129 more
BLOCKS = np.kron(np.array([[0, 77], [128, 255]]), np.ones((8, 8))).astype(np.uint8)  # in each a single value
TINTS = np.stack([BLOCKS, BLOCKS[::-1], BLOCKS.T], 2)
JPEG = {"quality": 100, "subsampling": 0}
WHITE = (255, 255, 255)

SIDES = {  # what the first row and the first column of the stored image are (EXIF 2.32, table 6)
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def grey(values):
    """(H, W) -> (H, W, 3)."""
    return np.repeat(values[..., None], 3, 2)


def over(colours, alphas, background=WHITE):
    """What shows of colours, (H, W, 3), with alphas in 255ths: the nearest byte; never a tie, 255 being odd."""
    alphas = alphas[..., None].astype(int)
    return (alphas * colours + (255 - alphas) * np.array(background) + 127) // 255


def keyed(image, is_key):
    return np.where(is_key[..., None], 255, image)


def printed(inks):
    """What inks, (H, W, 4) of CMYK, leave of white: what a colour leaves times what black leaves."""
    left = 255 - inks.astype(int)
    return (left[..., :3] * left[..., 3:] + 127) // 255


def stored(upright, orientation):
    """The pixels of a file that is shown as `upright`."""
    row, column = SIDES[orientation]
    pixels = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
    pixels = pixels[::-1] if row in ("bottom", "right") else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if column in ("bottom", "right") else pixels)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def indexed(indices):
    image = Image.frombytes("P", (SIZE, SIZE), indices.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image


@dataclass
class File:
    """An image as it is saved, and the RGB that the file means over white."""

    image: Image.Image
    meant: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: int = 0


def pngs():
    alphas = DRAWS.integers(0, 256, 256, dtype=np.uint8)  # of the palette's entries
    colour_key, grey_key = COLOURS[3, 5], GREY[2, 3]
    deep = grey((DEEP.astype(int) + 128) // 257)  # 65535 is white; to the nearest, never a tie, 257 being odd
    return {
        "rgb.png": File(Image.fromarray(COLOURS), COLOURS),
        "rgba.png": File(Image.fromarray(np.dstack([COLOURS, EVERY])), over(COLOURS, EVERY)),
        "la.png": File(Image.fromarray(np.dstack([GREY, EVERY])), over(grey(GREY), EVERY)),
        "grey.png": File(Image.fromarray(EVERY), grey(EVERY)),
        "one-bit.png": File(Image.fromarray(EVERY % 2 == 1), grey(EVERY % 2 * 255)),
        "palette.png": File(indexed(EVERY), PALETTE[EVERY]),
        "palette-alphas.png": File(
            indexed(EVERY), over(PALETTE[EVERY], alphas[EVERY]), {"transparency": alphas.tobytes()}
        ),
        "palette-key.png": File(indexed(EVERY), keyed(PALETTE[EVERY], EVERY == 7), {"transparency": 7}),
        "rgb-key.png": File(
            Image.fromarray(COLOURS),
            keyed(COLOURS, (colour_key == COLOURS).all(2)),
            {"transparency": tuple(colour_key.tolist())},
        ),
        "grey-key.png": File(
            Image.fromarray(GREY), keyed(grey(GREY), grey_key == GREY), {"transparency": int(grey_key)}
        ),
        "deep-grey.png": File(Image.fromarray(DEEP), deep),
        "deep-grey-key.png": File(Image.fromarray(DEEP), keyed(deep, DEEP == 129), {"transparency": 129}),
        "deep-grey.tif": File(Image.fromarray(DEEP), deep),
    }


def others():
    lossless = {"lossless": True, "exact": True}
    blocks = np.dstack([TINTS, BLOCKS.T[::-1] // 2])
    return {
        "palette-key.gif": File(indexed(EVERY), keyed(PALETTE[EVERY], EVERY == 7), {"transparency": 7}),
        "float.tif": File(Image.fromarray(EVERY.astype(np.float32) / 255), grey(EVERY)),
        "cmyk.tif": File(Image.frombytes("CMYK", (SIZE, SIZE), INKS.tobytes()), printed(INKS)),
        "rgb.webp": File(Image.fromarray(COLOURS), COLOURS, lossless),
        "rgba.webp": File(Image.fromarray(np.dstack([COLOURS, EVERY])), over(COLOURS, EVERY), lossless),
        # a block of 8 x 8 equal values is one coefficient, 8 (value - 128), which a step of 1 stores exactly
        "grey.jpg": File(Image.fromarray(BLOCKS), grey(BLOCKS), JPEG),
        "cmyk.jpg": File(Image.frombytes("CMYK", (SIZE, SIZE), blocks.tobytes()), printed(blocks), JPEG),
        # luma and chroma are rounded to bytes: in blue, Y + 1.772 Cb, that is 1.4, and 0.5 when it is rounded itself
        "rgb.jpg": File(Image.fromarray(TINTS), TINTS, JPEG, tolerance=1),
    }


def turned():
    for turn in SIDES:
        tag = {"exif": exif(turn)}
        yield f"exif-{turn}.png", File(Image.fromarray(stored(COLOURS, turn)), COLOURS, tag)
        yield f"exif-{turn}.jpg", File(Image.fromarray(stored(BLOCKS, turn)), grey(BLOCKS), JPEG | tag)
        yield f"exif-{turn}.webp", File(Image.fromarray(stored(COLOURS, turn)), COLOURS, {"lossless": True} | tag)
    image, meant = indexed(stored(EVERY, 5)), keyed(PALETTE[EVERY], EVERY == 7)
    yield "exif-5-palette-key.png", File(image, meant, {"exif": exif(5), "transparency": 7})


FILES = pngs() | others() | dict(turned())


def in_minus_one_to_one(image):
    """(H, W, 3) bytes -> (3, H, W) float32: 0 is -1 and 255 is 1."""
    return (image.astype(np.float32) / np.float32(127.5) - np.float32(1)).transpose(2, 0, 1)


def images_of(kind, path, background="white"):
    config = DataConfig(source=kind, path=str(path), image_size=SIZE, background=background)
    return CaptionedImages(build_source(config), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for name, file in FILES.items():
        file.image.save(path / name, **file.options)
    rows = [json.dumps({"file_name": name, "text": name}) for name in FILES]
    (path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def images(folder):
    return images_of("imagefolder", folder)


@table("name", FILES)
def test_r14_a_file_becomes_the_pixels_that_its_format_defines(name, images):
    (found,) = images.rows_of([name])
    values, expected = images.pixel_values(found).numpy(), in_minus_one_to_one(FILES[name].meant)
    if FILES[name].tolerance:
        np.testing.assert_allclose(values, expected, atol=1.01 * FILES[name].tolerance / 127.5, rtol=0)
    else:
        np.testing.assert_array_equal(values, expected)


def test_the_files_are_of_the_modes_that_are_to_be_read(folder):
    """A writer that converted an image on its way to the disk would prove nothing."""
    modes = {
        "rgb.png": "RGB", "rgba.png": "RGBA", "la.png": "LA", "grey.png": "L", "one-bit.png": "1", "palette.png": "P",
        "palette-alphas.png": "P", "palette-key.png": "P", "deep-grey.png": "I;16", "deep-grey.tif": "I;16",
        "float.tif": "F", "cmyk.tif": "CMYK", "cmyk.jpg": "CMYK", "grey.jpg": "L", "rgb.jpg": "RGB",
        "rgba.webp": "RGBA",
    }  # fmt: skip
    for name in FILES:
        with Image.open(folder / name) as image:
            assert image.mode == modes.get(name, image.mode), name
            assert ("transparency" in image.info) == ("-key" in name or "alphas" in name), name
            assert image.getexif().get(0x0112) == (int(name[5]) if name.startswith("exif") else None), name


def test_the_background_of_the_config_shows_through(folder):
    images = images_of("imagefolder", folder, background="#102030")
    (found,) = images.rows_of(["rgba.png"])
    expected = over(COLOURS, EVERY, (0x10, 0x20, 0x30))
    np.testing.assert_array_equal(images.pixel_values(found).numpy(), in_minus_one_to_one(expected))


def turned_file():
    """A PNG with alpha that lies on its side, and the RGB that it means over black."""
    file = io.BytesIO()
    Image.fromarray(stored(np.dstack([COLOURS, EVERY]), 6)).save(file, "PNG", exif=exif(6))
    return file.getvalue(), over(COLOURS, EVERY, (0, 0, 0))


@table("kind", ["parquet of datasets", "parquet with bytes", "parquet with structs", "dataset"])
def test_r14_an_image_in_a_table_becomes_the_same_pixels_as_its_file(kind, tmp_path):
    file, expected = turned_file()
    held = file if kind == "parquet with bytes" else {"bytes": file, "path": "a.png"}
    if kind in ("dataset", "parquet of datasets"):
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": [held], "text": ["a"]}, features=features)
        table.save_to_disk(tmp_path) if kind == "dataset" else table.to_parquet(tmp_path / "a.parquet")
    else:  # as anybody writes it
        pyarrow.parquet.write_table(pyarrow.table({"image": [held], "text": ["a"]}), tmp_path / "a.parquet")
    images = images_of("dataset" if kind == "dataset" else "parquet", tmp_path, background="black")
    np.testing.assert_array_equal(images.pixel_values(0).numpy(), in_minus_one_to_one(expected))


def test_an_image_that_a_data_set_encoded_itself_keeps_its_16_bits(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": [Image.fromarray(DEEP)], "text": ["a"]}, features=features)
    table.save_to_disk(tmp_path)
    values = images_of("dataset", tmp_path).pixel_values(0).numpy()
    np.testing.assert_array_equal(values, in_minus_one_to_one(grey((DEEP.astype(int) + 128) // 257)))


def test_a_column_without_images_is_refused_and_a_missing_image_names_its_row(tmp_path):
    file, _ = turned_file()
    table = pyarrow.table({"image": pyarrow.array([file, None]), "text": ["a", "b"], "number": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    images = images_of("parquet", tmp_path)
    assert images.pixel_values(0).shape == (3, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"row 1: .* the row has no image"):
        images.pixel_values(1)
    with pytest.raises(ValueError, match=r"data\.image_column: 'number' holds Value\('int64'\); expected images"):
        build_source(DataConfig(source="parquet", path=str(tmp_path), image_column="number"))
