"""Damaged or oversized chunks of PNG files that are not needed for the pixels but make Pillow refuse the file."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
"""Chunks that the pixels depend on although PNG counts them as ancillary (their names begin with a small letter)."""
SHORTEST = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
"""Smallest number of bytes of a chunk."""
MOST_TEXT = 2**20
"""Most bytes of all texts of a file, unpacked, and of its colour profile; Pillow refuses an image with more."""


def without_odd_chunks(file: str | BinaryIO) -> tuple[str | BinaryIO, list[str]]:
    """Return a PNG file without its damaged or oversized ancillary chunks, and their names; other files unchanged.

    Texts that are too long are left out, and damaged texts, profiles, EXIF and the like; never a chunk that the pixels
    depend on. Chunks are defined in the PNG specification (third edition), section 11.
    """
    with Path(file).open("rb") if isinstance(file, str) else nullcontext(file) as opened:
        odd = list(_odd_chunks(opened))
        opened.seek(0)
        data = opened.read() if odd else b""
    if not odd:
        return file, []
    starts, ends = [0, *(end for _, _, end in odd)], [*(start for _, start, _ in odd), len(data)]
    kept = b"".join(data[start:end] for start, end in zip(starts, ends, strict=True))
    return BytesIO(kept), [name.decode("latin-1") for name, _, _ in odd]


def _odd_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each chunk to leave out; nothing if the file is no PNG."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(8) != SIGNATURE:
        return
    end, left = 8, MOST_TEXT
    while end < size and len(head := file.read(8)) == 8 and (name := head[4:]) != b"IEND":
        start, length = end, int.from_bytes(head[:4])
        end = min(start + length + 12, size)
        if name[:1].islower() and name not in PIXEL_CHUNKS:
            data = file.read(length) if length <= 2 * MOST_TEXT else b""
            sound = len(data) == length and zlib.crc32(name + data) == int.from_bytes(file.read(4))
            unpacked = _unpacked(name, data) if sound and length >= SHORTEST.get(name, 0) else None
            if unpacked is None or unpacked > left:
                yield name, start, end
            elif name in (b"tEXt", b"zTXt", b"iTXt"):
                left -= unpacked
        file.seek(end)


def _unpacked(name: bytes, data: bytes) -> int | None:
    """Return the unpacked size of a chunk in bytes, counted up to ``MOST_TEXT + 1``; None if it cannot be unpacked."""
    packed = data.partition(b"\0")[2]
    if name == b"iTXt" and packed[:2] == b"\1\0":
        packed = packed[2:].split(b"\0", 2)[-1]
    elif name in (b"zTXt", b"iCCP"):
        if packed[:1] != b"\0":
            return None
        packed = packed[1:]
    else:
        return len(data)
    try:
        return len(zlib.decompressobj().decompress(packed, MOST_TEXT + 1))
    except zlib.error:
        return None
