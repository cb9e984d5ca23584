"""Colour profiles against the formulas of their colour spaces, and metadata that may not cost an image its pixels."""

import json
import logging
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from ldm.config import DataConfig
from ldm.data.hashes import pixel_digest
from ldm.data.headers import decode_pixels, metadata_fault, open_image
from ldm.data.inspection import inspect
from ldm.data.pixels import to_rgb
from ldm.data.preflight import checked_source
from ldm.data.profiles import profile_name
from ldm.data.sources import build_source

from .table import table

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TO_XYZ = np.array(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)
"""From linear sRGB to XYZ under D50 (Lindbloom), as profiles have it."""
WIDE = np.array(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)
"""The same of Adobe RGB (1998), whose gamma is 563 / 256."""
GAMMA = 563 / 256


def fixed(number):
    return struct.pack(">i", round(number * 65536))


def profile_of(space, kind, tags):
    """A profile of version 2 (ICC.1:2001-04, clause 6), with D50 as its white."""
    white = b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1, 0.8249)))
    name = b"a test\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78)
    tags = {b"wtpt": white, b"desc": text, b"cprt": b"text\0\0\0\0none\0", **tags}
    at, table, data = 132 + 12 * len(tags), b"", b""
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += tag + struct.pack(">II", at + len(data), len(value))
        data += value
    size = struct.pack(">I", at + len(data))
    connection = b"Lab " if space == b"CMYK" else b"XYZ "
    head = size + b"lcms" + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp"
    head += bytes(28) + b"".join(map(fixed, (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def wide_gamut():
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), WIDE.T, strict=True)
    tags = {tag: b"XYZ \0\0\0\0" + b"".join(map(fixed, column)) for tag, column in columns}
    return profile_of(b"RGB ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(GAMMA)))


def grey_gamma(gamma):
    return profile_of(b"GRAY", b"mntr", {b"kTRC": curve(gamma)})


def inks():
    """A press whose paper is L* 100, and on which the inks C, M, Y and K leave L* 60, 50, 90 and 0, with no colour."""
    left = np.array([0.6, 0.5, 0.9, 0.0])
    corners = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T  # black changes fastest
    lightness = np.where(corners, left, 1).prod(1)
    cells = b"".join(bytes([round(255 * value), 128, 128]) for value in lightness)
    line = bytes(range(256))
    unit = b"".join(fixed(value) for value in np.eye(3).ravel())
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + line * 4 + cells + line * 3
    return profile_of(b"CMYK", b"prtr", {b"A2B0": table})


def encode(linear):
    """Linear sRGB, 0 to 1, as bytes (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def grey_of_lightness(lightness):
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    return encode(luminance)


COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image, kind, **more):
    file = BytesIO()
    image.save(file, kind, **more)
    return file


def test_r26_a_wide_gamut_becomes_srgb():
    expected = encode((COLOURS / 255) ** GAMMA @ WIDE.T @ np.linalg.inv(TO_XYZ).T)
    for image in (Image.fromarray(COLOURS), Image.fromarray(np.dstack([COLOURS, np.full_like(RAMP, 255)]))):
        found = np.asarray(to_rgb(open_image(saved(image, "PNG", icc_profile=wide_gamut()))))
        assert np.abs(found - expected).max() < 2.5  # rounded tables of littleCMS, most in the dark
        assert np.abs(found - COLOURS.astype(float)).max() > 30


def test_r26_a_grey_of_another_gamma_becomes_that_of_srgb():
    expected = encode((RAMP / 255) ** 1.8)[..., None]
    transparent = Image.fromarray(np.dstack([RAMP, np.full_like(RAMP, 255)]))
    for image in (Image.fromarray(RAMP), transparent):
        found = np.asarray(to_rgb(open_image(saved(image, "PNG", icc_profile=grey_gamma(1.8)))))
        assert np.abs(found - expected).max() < 2.5


def test_r26_inks_are_those_of_their_profile():
    corners = Image.fromarray(
        np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0]]], np.uint8), "CMYK"
    )
    found = np.asarray(to_rgb(open_image(saved(corners, "TIFF", icc_profile=inks()))))[0]
    expected = grey_of_lightness(np.array([100, 60, 50, 90]))
    assert np.abs(found - expected[:, None]).max() < 2.5
    plain = np.asarray(to_rgb(open_image(saved(corners, "TIFF"))))[0]
    assert plain[1].tolist() == [0, 255, 255]


@table("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_r26_a_profile_that_is_srgb_changes_no_pixel(kind):
    image = Image.fromarray(COLOURS)
    with_profile, without = (to_rgb(open_image(saved(image, kind, icc_profile=one))) for one in (SRGB, None))
    assert pixel_digest(with_profile) == pixel_digest(without)
    assert profile_name(SRGB, "RGB") == "sRGB"


MISFITS = {
    "junk": (b"no profile" * 30, "RGB"),
    "cut short": (SRGB[:200], "RGB"),
    "inks of an image in RGB": (inks(), "RGB"),
    "RGB of an image in inks": (SRGB, "CMYK"),
    "grey of an image in RGB": (grey_gamma(1.8), "RGB"),
}


@table("misfit", MISFITS)
def test_r26_a_profile_that_cannot_be_used_changes_no_pixel_and_is_said(misfit):
    profile, mode = MISFITS[misfit]
    image = Image.fromarray(COLOURS).convert(mode)
    file = saved(image, "TIFF", icc_profile=profile)
    assert "colour profile" in metadata_fault(open_image(file))
    assert pixel_digest(to_rgb(open_image(file))) == pixel_digest(to_rgb(image))
    assert profile_name(profile, mode) == "unusable"


def test_pixels_are_converted_once():
    once = to_rgb(open_image(saved(Image.fromarray(COLOURS), "PNG", icc_profile=wide_gamut())))
    assert pixel_digest(to_rgb(once)) == pixel_digest(once)


def chunk(name, data, wrong=0):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ wrong)


TURNED = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x112, 3, 1, 6) + bytes(4)
WORKFLOW = json.dumps({"nodes": ["KSampler"] * 300_000}).encode()
LONG = b"workflow\0\0" + zlib.compress(WORKFLOW)
CHUNKS = {  # of a PNG: whether it stands before the pixels or after them is tried both ways; what is said of it
    "a workflow": (chunk(b"tEXt", b"workflow\0" + WORKFLOW), "tEXt"),
    "a packed workflow": (chunk(b"zTXt", LONG), "zTXt"),
    "an international one": (chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)), "iTXt"),
    "many texts": (b"".join(chunk(b"tEXt", b"a\0" + bytes([65]) * 2**19) for _ in range(140)), "tEXt"),
    "a text of a method that is none": (chunk(b"zTXt", b"a\0\7abc"), "zTXt"),
    "a wrong checksum": (chunk(b"tEXt", b"a\0b", wrong=1), "tEXt"),
    "a short gamma": (chunk(b"gAMA", b"\0"), "gAMA"),
    "a profile of a method that is none": (chunk(b"iCCP", b"a\0\7abc"), "iCCP"),
    "a profile of megabytes": (chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21))), "iCCP"),
    "a damaged profile": (chunk(b"iCCP", b"a\0\0abc"), "iCCP"),
    "EXIF that is none": (chunk(b"eXIf", b"not exif at all"), "EXIF or XMP"),
    "EXIF with a wrong checksum": (chunk(b"eXIf", TURNED, wrong=1), "eXIf"),
    "a text": (chunk(b"tEXt", b"prompt\0a cat"), None),
}


@table("place", ["before", "after"])
@table("name", CHUNKS)
def test_r26_no_chunk_beside_the_pixels_costs_a_png_its_pixels(name, place, tmp_path):
    data, said = CHUNKS[name]
    plain = saved(Image.fromarray(COLOURS), "PNG").getvalue()
    at = 33 if place == "before" else len(plain) - 12
    (tmp_path / "a.png").write_bytes(plain[:at] + data + plain[at:])
    for file in (str(tmp_path / "a.png"), BytesIO((tmp_path / "a.png").read_bytes())):
        image = open_image(file)
        fault = metadata_fault(image)
        assert (said in fault) if said and (place == "before" or said != "EXIF or XMP") else fault is None
        assert np.array_equal(np.asarray(to_rgb(decode_pixels(image))), COLOURS)


def jpeg(segment):
    plain = saved(Image.fromarray(COLOURS), "JPEG").getvalue()
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


SEGMENTS = {
    "junk": b"Exif\0\0junk",
    "cut": b"Exif\0\0" + TURNED[:12],
    "far": b"Exif\0\0II*\0" + struct.pack("<I", 0x7FFFFFFF),
    "a loop": b"Exif\0\0" + TURNED[:10] + struct.pack("<HHII", 0x8769, 4, 1, 8) + bytes(4),
    "an orientation that is none": b"Exif\0\0" + TURNED.replace(struct.pack("<I", 6), struct.pack("<I", 99)),
    "a text as orientation": b"Exif\0\0" + TURNED[:10] + struct.pack("<HHI", 0x112, 2, 2) + b"6\0\0\0" + bytes(4),
    "XMP": b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation="six"',
}


@table("kind", ["JPEG", "WEBP"])
@table("name", SEGMENTS)
def test_r26_exif_that_cannot_be_read_changes_no_pixel(name, kind):
    image = Image.fromarray(COLOURS)
    file = BytesIO(jpeg(SEGMENTS[name])) if kind == "JPEG" else saved(image, kind, lossless=True, exif=SEGMENTS[name])
    plain = saved(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixel_digest(to_rgb(open_image(file))) == pixel_digest(to_rgb(open_image(plain)))


def test_r26_validate_counts_profiles_and_ignored_metadata_and_a_training_says_it_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    plain = saved(Image.fromarray(COLOURS), "PNG").getvalue()
    files = {
        "plain.png": plain,
        "srgb.png": saved(Image.fromarray(COLOURS[::-1]), "PNG", icc_profile=SRGB).getvalue(),
        "wide.png": saved(Image.fromarray(COLOURS), "PNG", icc_profile=wide_gamut()).getvalue(),
        "junk.png": saved(Image.fromarray(COLOURS[:, ::-1]), "PNG", icc_profile=b"junk" * 50).getvalue(),
        "exif.png": plain[:33] + CHUNKS["EXIF that is none"][0] + plain[33:],
    }
    rows = [json.dumps({"file_name": name, "text": name}) for name in files]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    config = DataConfig(source="imagefolder", path=str(tmp_path), held_out_percent=20.0)
    report = inspect(build_source(config), config, lambda some: [1] * len(some), 77)
    assert not report.stops
    assert report.statistics["colour profiles"] == {"none": 2, "sRGB": 1, "a test": 1, "unusable": 1}
    assert {problem.where for problem in report.problems if problem.kind == "ignored metadata"} == {
        "junk.png",
        "exif.png",
    }
    assert len(checked_source(config)) == 5
    assert [record.getMessage() for record in caplog.records if "metadata" in record.getMessage()] == [
        "2 images have metadata that cannot be read and is ignored, such as junk.png"
    ]
