"""Folders of films: frames by their times, films that cannot be read, clips that are cut from them."""

import json
import weakref
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from ldm.commands.validate import validate
from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages
from ldm.data.films import Animation, Movie, at_rate, film_at, upright
from ldm.data.headers import ImageError
from ldm.data.layout import source_of
from ldm.data.preflight import checked_source
from ldm.data.sources import build_source
from ldm.errors import ConfigError

from .table import table

SIZE = (32, 24)


def shade(number):
    """A frame whose grey says its number, from 0 to 24: 10 levels apart, which lossy films keep apart."""
    return Image.new("RGB", SIZE, (10 * (number % 25) + 5,) * 3)


def numbers(frames):
    return [int(np.asarray(frame.convert("L")).mean() // 10) for frame in frames]


def animation(path, count=8, seconds=0.1, first=0):
    more = {"duration": [round(1000 * one) for one in seconds] if isinstance(seconds, list) else round(1000 * seconds)}
    more |= {"lossless": True} if path.suffix == ".webp" else {}
    shade(first).save(path, save_all=True, append_images=[shade(first + one) for one in range(1, count)], **more)


def movie(path, count=8, rate=10, times=None, size=SIZE):
    """Write a film whose frames are shown at `times`, in tenths of a second, or at a constant rate."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = *size, "yuv420p", Fraction(1, 10)
        stream.options = {"crf": "1", "g": "4"}
        for number in range(count):
            frame = av.VideoFrame.from_image(shade(number).resize(size))
            frame.pts, frame.time_base = (times or range(count))[number], Fraction(1, 10)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


def only_sound(path):
    with av.open(str(path), "w") as film:
        stream = film.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        film.mux(stream.encode(frame))
        film.mux(stream.encode())


def folder(place, films):
    """Write films, by name their maker, and the metadata of all."""
    place.mkdir(exist_ok=True)
    for name, make in films.items():
        make(place / name)
    rows = [{"file_name": name, "text": f"film {name}"} for name in films]
    (place / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return place


def config(place, **more):
    return DataConfig("videofolder", str(place), image_size=16, **{"num_frames": 4} | more)


@table(("name", "make"), [("a.gif", animation), ("a.webp", animation), ("a.mp4", movie)])
def test_frames_are_found_by_their_numbers_in_any_film(name, make, tmp_path):
    make(tmp_path / name)
    film = film_at(str(tmp_path / name))
    assert film.times() == pytest.approx([0.1 * number for number in range(8)], abs=1e-3)
    assert numbers(film.frames([0, 3, 7])) == [0, 3, 7]
    assert numbers(film.frames([5])) == [5]
    assert next(iter(film.frames([2]))).size == SIZE


@table(
    ("times", "frame_rate", "expected"),
    [
        ([0, 0.1, 0.2, 0.3], None, [0, 1, 2, 3]),
        ([0, 0.1, 0.2, 0.3], 10, [0, 1, 2, 3]),
        ([0, 0.1, 0.2, 0.3], 5, [0, 2]),
        ([0, 0.1, 0.2, 0.3], 20, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([0, 0.5, 0.6, 0.7], 10, [0, 0, 0, 0, 0, 1, 2, 3]),
        ([0], 10, [0]),
    ],
)
def test_at_a_rate_each_moment_has_the_frame_that_is_shown_then(times, frame_rate, expected):
    assert at_rate(times, frame_rate) == expected


def test_a_film_of_a_variable_rate_is_read_by_its_own_clock(tmp_path):
    movie(tmp_path / "a.mp4", times=[0, 1, 2, 3, 10, 11, 12, 20])
    animation(tmp_path / "a.gif", seconds=[0.1, 0.1, 0.1, 0.7, 0.1, 0.1, 0.8, 0.1])
    for film in (Movie(str(tmp_path / "a.mp4")), Animation(str(tmp_path / "a.gif"))):
        assert film.times() == pytest.approx([0, 0.1, 0.2, 0.3, 1.0, 1.1, 1.2, 2.0], abs=1e-3)


def test_clips_are_cut_by_position_with_the_caption_of_their_film_which_has_one_split(tmp_path):
    films = {f"{one}.gif": lambda path, one=one: animation(path, 8 + one) for one in range(6)}
    place = folder(tmp_path / "films", films)
    data = CaptionedImages(build_source(config(place, stride=2)), config(place, stride=2, held_out_percent=20.0))
    source = data.source
    assert len(source) == sum((8 + one - 4) // 2 + 1 for one in range(6))
    assert [numbers(source.item(row)) for row in range(3)] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert numbers([source.image(1), source.frame(1, 3)]) == [4, 5]
    assert source.captions(1) == ("film 0.gif",)
    assert data.pixel_values(0).shape == (4, 3, 16, 16)
    split_of = {row: name for name, rows in data.splits.indices.items() for row in rows}
    for film in {*source.origins}:
        assert len({split_of[row] for row in range(len(source)) if source.origins[row] == film}) == 1


def test_a_film_of_another_name_is_the_same_film(tmp_path):
    one, other = (build_source(config(folder(tmp_path / name[0], {name: animation}))) for name in ("a.gif", "b.gif"))
    assert (one.names, one.wholes) == (other.names, other.wholes)
    assert one.fingerprint == other.fingerprint


def test_a_short_film_is_bad_data_or_begins_again(tmp_path):
    place = folder(tmp_path / "films", {"a.gif": animation, "short.gif": lambda path: animation(path, 3)})
    with pytest.raises(ConfigError, match=r"too short: short\.gif: 3 frames .* expected 4 or more, or data\."):
        checked_source(config(place))
    assert len(checked_source(config(place, on_bad_data="skip"))) == 2
    looped = checked_source(config(place, short_films="loop"))
    assert numbers(looped.item(2)) == [0, 1, 2, 0]


def cut_short(make):
    def write(path):
        make(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])

    return write


BAD = {
    "sound.mp4": (only_sound, "unreadable", "it has no picture, only sound"),
    "cut.mp4": (cut_short(movie), "unreadable", "cut short"),
    "cut.gif": (cut_short(animation), "unreadable", ""),
    "empty.mp4": (lambda path: path.write_bytes(b""), "unreadable", "InvalidDataError"),
    "text.webm": (lambda path: path.write_text("no film"), "unreadable", "InvalidDataError"),
    "one.gif": (lambda path: animation(path, 1), "too short", "1 frames"),
    "film.txt": (lambda path: path.write_text("no film"), "unreadable", "not a film"),
}


GOOD = {"a.webp": animation, "b.gif": lambda path: animation(path, first=9)}


def test_every_bad_film_is_listed_and_the_good_ones_are_trained_on(tmp_path):
    place = folder(
        tmp_path / "films",
        GOOD | {name: make for name, (make, *_) in BAD.items()},
    )
    with (place / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "gone.mp4", "text": "gone"}) + "\n")
        file.write(json.dumps({"file_name": "../out.mp4", "text": "outside"}) + "\n")
    found = validate(str(place), str(tmp_path / "out"), source="videofolder", num_frames=4, workers=0)
    kinds = {problem.where: (problem.kind, problem.reason) for problem in found.problems if problem.stops}
    assert {name: kind for name, (kind, _) in kinds.items()} == {
        **{name: kind for name, (_, kind, _) in BAD.items()},
        "gone.mp4": "missing",
        "../out.mp4": "outside",
    }
    for name, (_, _, reason) in BAD.items():
        assert reason in kinds[name][1], name
    assert len(checked_source(config(place, on_bad_data="skip"))) == 4


def test_a_folder_of_films_is_told_from_one_of_images(tmp_path):
    assert source_of(str(folder(tmp_path / "films", {"a.mp4": lambda path: path.touch()}))) == "videofolder"
    assert source_of(str(folder(tmp_path / "images", {"a.gif": animation}))) == "imagefolder"


@table("name", ["long.gif", "long.mp4"])
def test_a_clip_of_a_long_film_keeps_no_more_frames_than_its_own(name, tmp_path):
    make = animation if name.endswith("gif") else movie
    make(tmp_path / name, 300)
    film, alive = film_at(str(tmp_path / name)), []
    most = 0
    for frame in film.frames([3, 297, 298]):
        alive.append(weakref.ref(frame))
        del frame
        most = max(most, sum(one() is not None for one in alive))
    assert most <= 1
    assert len(alive) == 3


def test_odd_sizes_are_read(tmp_path):
    place = folder(tmp_path / "films", {})
    odd = [Image.new("RGB", (31, 23), (shade,) * 3) for shade in (0, 60, 120, 180)]
    odd[0].save(place / "odd.webp", save_all=True, append_images=odd[1:], lossless=True)
    (place / "metadata.jsonl").write_text(json.dumps({"file_name": "odd.webp", "text": "odd"}))
    data = CaptionedImages(build_source(config(place)), config(place, held_out_percent=0.0))
    assert data.pixel_values(0).shape == (4, 3, 16, 16)
    assert data.pixel_values(0).mean((1, 2, 3)).diff().min() > 0.4


def test_a_film_of_a_phone_is_turned_upright():
    image = Image.new("L", (32, 16))
    image.paste(255, (0, 0, 8, 16))  # white on the left
    frame = SimpleNamespace(rotation=90, to_image=lambda: image)  # anticlockwise, as PyAV says it
    turned = np.asarray(upright(frame))
    assert turned.shape == (32, 16)
    assert turned[-8:].mean() == 255
    assert upright(SimpleNamespace(rotation=0, to_image=lambda: image)) is image


def test_a_reader_that_is_missing_is_said(tmp_path, monkeypatch):
    movie(tmp_path / "a.mp4")
    monkeypatch.setattr("ldm.data.films.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImageError, match="pip install av"):
        film_at(str(tmp_path / "a.mp4"))
