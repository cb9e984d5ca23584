import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import pixels
from ldm.data.pixels import resize_and_crop, to_pixel_values, to_rgb, to_uint8

from .table import table


def rgb_at(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def grey16(value):
    return Image.fromarray(np.full((4, 4), value, np.uint16))


@table(("value", "expected"), [(0, 0), (257, 1), (32896, 128), (65535, 255)])
def test_r14_16_bit_grey_is_scaled_not_clipped(value, expected):
    assert rgb_at(to_rgb(grey16(value))) == (expected,) * 3
    as_int = Image.fromarray(np.full((4, 4), value, np.int32), mode="I")
    assert rgb_at(to_rgb(as_int)) == (expected,) * 3


@table(("value", "expected"), [(0.0, 0), (0.5, 128), (1.0, 255), (200.0, 200)])
def test_r14_float_grey_is_read_from_0_to_1_or_to_255(value, expected):
    assert rgb_at(to_rgb(Image.fromarray(np.full((4, 4), value, np.float32)))) == (expected,) * 3


@table(("background", "expected"), [("white", (255, 127, 127)), ("black", (128, 0, 0))])
def test_r14_alpha_is_composited_on_the_background(background, expected):
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.abs(np.subtract(rgb_at(to_rgb(half_red, background)), expected)).max() <= 1  # alpha is 128/255


def test_r14_hidden_colour_under_full_transparency_never_shows():
    hidden = Image.new("RGBA", (4, 4), (0, 255, 0, 0))
    assert rgb_at(to_rgb(hidden)) == (255, 255, 255)
    assert rgb_at(to_rgb(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)


def test_r14_palette_transparency_is_seen():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert rgb_at(to_rgb(palette)) == (10, 20, 30)
    palette.info["transparency"] = 0
    assert rgb_at(to_rgb(palette)) == (255, 255, 255)


def test_r14_cmyk_one_bit_and_grey():
    assert rgb_at(to_rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0)))) == (255, 0, 0)
    assert rgb_at(to_rgb(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert rgb_at(to_rgb(Image.new("L", (4, 4), 77))) == (77, 77, 77)


@table("orientation", range(1, 9))
def test_r14_exif_orientation_is_applied_once(orientation):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255  # top left
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, 3),
    }[orientation](upright)
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.getexif()[0x0112] = orientation
    once = to_rgb(image)
    assert np.array_equal(np.asarray(once), upright)
    assert np.array_equal(np.asarray(to_rgb(once)), upright)


def test_r13_a_pixel_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pixels, "MAX_PIXELS", 15)
    with pytest.raises(ValueError, match="4x4 pixels"):
        to_rgb(Image.new("RGB", (4, 4)))


@table("size", [(1, 1), (1, 9), (300, 2), (10, 10), (64, 64), (5, 8)])
def test_r16_every_shape_becomes_the_square(size):
    assert resize_and_crop(Image.new("RGB", size, (9, 8, 7)), 8).size == (8, 8)
    assert rgb_at(resize_and_crop(Image.new("RGB", size, (9, 8, 7)), 8), 3, 3) == (9, 8, 7)


def test_r16_the_crop_is_the_middle():
    wide = Image.new("RGB", (24, 8), "black")
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    assert np.asarray(resize_and_crop(wide, 8))[:, 2:6].min() > 200


def test_pixel_values_round_trip_every_byte():
    every = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    values = to_pixel_values(every)
    assert values.shape == (3, 16, 16)
    assert values.min() == -1
    assert values.max() == 1
    assert torch.equal(to_uint8(values), torch.from_numpy(np.array(every)))
    assert to_uint8(torch.tensor([[[3.0]], [[-3.0]], [[0.0]]])).flatten().tolist() == [255, 0, 128]
