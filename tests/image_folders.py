"""Folders of generated images that have nothing in common, and what can be wrong with them."""

import json
import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

SUFFIXES = ("png", "jpg", "webp", "gif", "bmp", "tiff")


def noise_image(rng, size=64):
    """An image of smooth random colours: none looks like another."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def write_folder(folder, count, seed=0, suffixes=SUFFIXES):
    """Write `count` images and their metadata; return the rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        name = f"{index:04d}.{suffixes[index % len(suffixes)]}"
        noise_image(rng).save(folder / name)
        rows.append({"file_name": name, "text": f"image number {index}"})
    write_metadata(folder, rows)
    return rows


def write_metadata(folder, rows, more=b""):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_bytes(lines.encode() + more)


def png(width, height, rows=b""):
    """An 8-bit grey PNG with these compressed rows of pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corrupt(folder, rows, seed=0):
    """Spoil some of the images in every way; return the new ``{kind: {where}}`` that must be found."""
    rng = np.random.default_rng(seed)
    order = iter(rng.permutation(len(rows)).tolist())
    expected = {}

    def spoil(kind, number=None, data=None):
        number = next(order) if number is None else number
        name = rows[number]["file_name"]
        expected.setdefault(kind, set()).add(name)
        if data is not None:
            (folder / name).write_bytes(data)
        return rows[number], folder / name

    def of_kind(suffix):
        return next(number for number in order if rows[number]["file_name"].endswith(suffix))

    for suffix in SUFFIXES[:4]:  # truncated
        number = of_kind(suffix)
        whole = (folder / rows[number]["file_name"]).read_bytes()
        spoil("unreadable", number, whole[: len(whole) // 2])
    spoil("unreadable", data=b"")
    spoil("unreadable", data=b"this is a text and no image\n" * 40)
    for other in ("EPS", "PPM", "TGA"):  # images, but of formats that are not read
        spoil("unreadable", data=encoded(noise_image(rng), other))
    for side in (8001, 12000, 20000):  # below, between and above the limits of PIL itself
        spoil("too large", data=png(side, side))
    for name in ("missing", "missing"):
        spoil(name)[1].unlink()
    elsewhere = folder.parent / "elsewhere.png"
    noise_image(rng).save(elsewhere)
    for name in ("../elsewhere.png", str(elsewhere)):
        row, path = spoil("outside")
        path.unlink()
        expected["outside"] = expected["outside"] - {row["file_name"]} | {name}
        row["file_name"] = name
    _, path = spoil("outside")
    path.unlink()
    path.symlink_to(elsewhere)
    for value in (None, "", " \t", [None, ""]):
        spoil("no caption")[0]["text"] = value
    for value in (7, {"a": "b"}, "lone \ud800", ["a text", 3]):
        spoil("bad caption")[0]["text"] = value
    for kind in ("exact duplicate", "near duplicate", "near duplicate"):
        add_copy(folder, rows, expected, kind, number=of_kind("png"), rng=rng)
    noise_image(rng).save(folder / "unlisted.png")
    (folder / "below").mkdir()
    noise_image(rng).save(folder / "below" / "unlisted.JPG", "JPEG")
    expected["unlisted"] = {"unlisted.png", "below/unlisted.JPG"}
    broken = b'{"file_name": "cut short\n[1, 2]\n{"text": "no file"}\n\n'
    wrong = b'{"file_name": "latin.png", "text": "caf\xe9"}\n'
    noise_image(rng).save(folder / "latin.png")
    expected["bad caption"].add("latin.png")
    expected["bad row"] = {f"metadata.jsonl line {len(rows) + number}" for number in (1, 2, 3)}
    write_metadata(folder, rows, broken + wrong)
    return expected


def add_copy(folder, rows, expected, kind, number, rng):
    """Add a copy of an image, exact in another format, or near: smaller, or compressed."""
    name = rows[number]["file_name"]
    image = Image.open(folder / name).convert("RGB")
    copy = f"copy-{len(rows)}.png"
    if kind == "exact duplicate":
        image.save(folder / copy, "BMP")
    elif rng.random() < 0.5:
        image.resize((40, 40), Image.Resampling.LANCZOS).save(folder / copy, "PNG")
    else:
        image.save(folder / copy, "JPEG", quality=70)
    rows.append({"file_name": copy, "text": f"the copy of {name}"})
    expected.setdefault(kind, set()).add(copy if kind == "exact duplicate" else name)  # a group is named by its first
