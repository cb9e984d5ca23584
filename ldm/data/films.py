"""Films of others: GIF and animated WEBP by Pillow, MP4 and its like by PyAV; frames by their times, one at a time."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from PIL import Image, ImageSequence

from ldm.data.headers import ImageError, image_errors, open_image
from ldm.data.layout import FILMS
from ldm.data.pixels import MAX_PIXELS

ANIMATIONS = (".gif", ".webp")
MAX_FRAMES = 2**20
"""Most frames of a film at a frame rate: one wrong time in a file must not ask for billions."""
DEFAULT_SECONDS = 0.1
"""Time for which browsers show a frame of a GIF that says none, or zero."""


class Film(Protocol):
    """A file of successive frames."""

    path: str

    def times(self) -> Sequence[float]:
        """Return the time, in seconds from the first one, at which each frame is shown; ascending.

        ImageError if the file cannot be read, has no picture or is cut short.
        """

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield frames by their ascending numbers; the memory is that of one frame, however long the film is."""


class Animation:
    """A GIF or an animated WEBP; a still image is a film of one frame."""

    def __init__(self, path: str):
        self.path = path

    def times(self) -> Sequence[float]:
        """Return the times by the durations in the file."""
        durations = []
        with open_image(self.path) as image, image_errors():
            for frame in ImageSequence.Iterator(image):
                frame.load()
                durations.append(frame.info.get("duration", 0) / 1000 or DEFAULT_SECONDS)
        return list(itertools.accumulate(durations[:-1], initial=0.0))

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield frames, RGBA; those before them are decoded too, since each builds on the one before."""
        with open_image(self.path) as image, image_errors():
            for number in numbers:
                image.seek(number)
                yield image.convert("RGBA")


class Movie:
    """A file that PyAV reads; the first stream of pictures in it."""

    def __init__(self, path: str):
        if importlib.util.find_spec("av") is None:
            raise ImageError("it needs PyAV to be read: pip install av")
        self.path = path
        self._stamps: array[int] | None = None

    def times(self) -> Sequence[float]:
        """Return the times of the file's own clock, whose rate may vary; nothing is decoded but the first frame."""
        with self._opened() as (film, stream):
            stamps, base = self._sorted_stamps(film, stream), stream.time_base
        next(iter(self.frames([0])))
        return [float((stamp - stamps[0]) * base) for stamp in stamps]

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield frames, RGB and upright; decoding begins at the key frame before the first one."""
        with self._opened() as (film, stream):
            stamps = self._sorted_stamps(film, stream)
            wanted = [stamps[number] for number in numbers]
            for start in (wanted[0], stamps[0]):  # from the beginning where the film's index leads past the frame
                film.seek(start, stream=stream, backward=True)
                decoded = ((_stamp(frame), frame) for frame in film.decode(stream))
                stamp, frame = next(decoded, (None, None))
                if stamp is not None and stamp <= wanted[0]:
                    break
            for asked in wanted:
                while stamp is None or stamp < asked:
                    stamp, frame = next(decoded, (asked, None))
                if frame is None or stamp != asked:
                    seconds = float((asked - stamps[0]) * stream.time_base)
                    raise ImageError(f"it is cut short or damaged: no frame can be decoded at {seconds:.3g} s")
                yield upright(frame)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        av: Any = importlib.import_module("av")
        with image_errors():
            try:
                with av.open(self.path) as film:
                    yield film, self._stream(film)
            except av.FFmpegError as error:  # its text has the path of this machine
                raise ImageError(f"{type(error).__name__}: {error.strerror}") from error

    def _stream(self, film: Any) -> Any:
        """Return the stream of pictures; ImageError if there is none that can be decoded, or it is too large."""
        if not film.streams.video:
            raise ImageError("it has no picture" + (", only sound" if film.streams.audio else ": it is cut short"))
        stream = film.streams.video[0]
        if stream.codec_context is None:
            raise ImageError("nothing here decodes its pictures")
        if stream.width * stream.height > MAX_PIXELS:
            size = f"{stream.width}x{stream.height}"
            raise ImageError(f"{size} pixels; at most {MAX_PIXELS:,} are read", "too large")
        return stream

    def _sorted_stamps(self, film: Any, stream: Any) -> array[int]:
        """Return the time stamp of each frame, ascending, read once; ImageError if frames are missing."""
        if self._stamps is None:
            packets = [packet for packet in film.demux(stream) if packet.size]
            # an edited film keeps frames before its beginning, which are decoded and never shown
            shown = [packet for packet in packets if not packet.is_discard]
            stamps = sorted({stamp for packet in shown if (stamp := _stamp(packet)) is not None})
            if not stamps:
                raise ImageError("it has no frames")
            if stream.frames > len(packets):
                raise ImageError(f"it is cut short: {len(packets)} of its {stream.frames} frames are there")
            self._stamps = array("q", stamps)
        return self._stamps


def film_at(path: str) -> Film:
    """Return the film at a path, by the end of its name; ImageError for any other file."""
    lower = path.lower()
    if lower.endswith(ANIMATIONS):
        return Animation(path)
    if lower.endswith(FILMS):
        return Movie(path)
    raise ImageError(f"not a film: expected the name to end in {', '.join((*ANIMATIONS, *FILMS))}")


def at_rate(times: Sequence[float], frame_rate: float | None) -> list[int]:
    """Return the number of the frame that is shown at each of the moments ``k / frame_rate`` of a film; None: all.

    The last frame is shown as long as the one before it. ImageError for more than `MAX_FRAMES`.
    """
    if frame_rate is None or len(times) < 2:
        return list(range(len(times)))
    end = 2 * times[-1] - times[-2]
    count = max(1, round(end * frame_rate))
    if count > MAX_FRAMES:
        raise ImageError(f"{end:.3g} s long, {count:,} frames at the frame rate; at most {MAX_FRAMES:,} are read")
    moments = (moment / frame_rate for moment in range(count))
    return [max(0, bisect_right(times, moment + 1e-6) - 1) for moment in moments]


def _stamp(of: Any) -> int | None:
    """Return the time stamp of a packet or frame: when it is shown, or where a file does not say, decoded."""
    found: int | None = of.dts if of.pts is None else of.pts
    return found


def upright(frame: Any) -> Image.Image:
    """Return a frame of PyAV as an image, turned as its film says."""
    image: Image.Image = frame.to_image()
    turned = getattr(frame, "rotation", 0) or 0
    return image.rotate(turned, expand=True) if turned else image
