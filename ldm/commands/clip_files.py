"""Clips as files: an animation, and where PyAV is installed a film, beside the strip that `ldm sample` writes."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FRAMES_PER_SECOND = 8


def write_gif(frames: Sequence[Image.Image], path: Path, described: Mapping[str, object]) -> Path:
    """Write an animation that repeats, with the texts `described` as JSON in its comment, and return its path."""
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=round(1000 / FRAMES_PER_SECOND),
        loop=0,
        comment=_as_json(described).encode(),
    )
    return path


def write_mp4(frames: Sequence[Image.Image], path: Path, described: Mapping[str, object]) -> Path | None:
    """Write a film with the texts `described` as JSON in its comment, and return its path; None without PyAV.

    H.264 takes even sizes alone: a last odd row or column is left out.
    """
    if importlib.util.find_spec("av") is None:
        return None
    av: Any = importlib.import_module("av")
    width, height = (size // 2 * 2 for size in frames[0].size)
    with av.open(str(path), "w") as film:
        film.metadata["comment"] = _as_json(described)
        stream: Any = film.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))[:height, :width]
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        film.mux(stream.encode())
    return path


def _as_json(described: Mapping[str, object]) -> str:
    return json.dumps({name: str(value) for name, value in described.items()}, ensure_ascii=False)
