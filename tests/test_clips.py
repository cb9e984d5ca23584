"""Clips of OpenMoji: their motions against closed forms, their captions and splits; frames as items."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.data.clips import DIRECTIONS, LARGE, MOTIONS, PATH, SMALL, SUBJECT, moved, on_canvas
from ldm.data.pixels import to_uint8
from ldm.data.sources import build_source
from ldm.data.splits import split_images
from ldm.errors import ConfigError
from ldm.evaluation.motion import displacements, growths, middles
from ldm.evaluation.samples import ClipSamples

from .table import table
from .test_batches import Shades

SIZE = 64


def square():
    """A black square in the middle of an image, a quarter of its area, on a transparent ground."""
    image = Image.new("RGBA", (SIZE, SIZE))
    image.paste((0, 0, 0, 255), (SIZE // 4, SIZE // 4, 3 * SIZE // 4, 3 * SIZE // 4))
    return image


def clip(motion, num_frames=5, image=None):
    """Return a clip on white, (1, F, H, W, 3)."""
    canvas = on_canvas(image or square())
    frames = [moved(canvas, motion, frame / (num_frames - 1), SIZE) for frame in range(num_frames)]
    white = Image.new("RGBA", (SIZE, SIZE), "white")
    return np.stack([np.asarray(Image.alpha_composite(white, frame).convert("RGB")) for frame in frames])[None]


def clips(**config):
    found = DataConfig("openmoji_clips", image_size=16, groups=("Food & Drink",), **config)
    return CaptionedImages(build_source(found), found)


@table("motion", DIRECTIONS)
def test_a_subject_moves_evenly_on_a_path_of_the_length_and_direction_asked_for(motion):
    path = middles(clip(motion))[0]
    steps = np.diff(path, axis=0)
    assert steps == pytest.approx(np.tile(PATH * SIZE / 4 * np.array(motion.towards), (4, 1)), abs=0.7)
    assert path[2] == pytest.approx([(SIZE - 1) / 2] * 2, abs=0.1), "the middle of the path is that of the frame"
    assert displacements(clip(motion))[0] == pytest.approx(PATH * SIZE * np.array(motion.towards), abs=0.7)


def test_a_subject_that_grows_or_shrinks_changes_its_area_by_the_square_of_its_width():
    grown, shrunk = (growths(clip(motion))[0] for motion in MOTIONS[8:10])
    assert grown == pytest.approx(2 * np.log(LARGE / SMALL), abs=0.1)
    assert shrunk == pytest.approx(-grown, abs=0.02)


def test_a_turn_to_the_left_is_a_quarter_anticlockwise_and_one_to_the_right_a_quarter_clockwise():
    image = Image.new("RGBA", (SIZE, SIZE))
    image.paste((0, 0, 0, 255), (SIZE // 2, SIZE // 2 - 4, SIZE, SIZE // 2 + 4))  # a bar that points to the right
    for motion, turned in zip(MOTIONS[10:], ((0, -1), (0, 1)), strict=True):
        path = middles(clip(motion, image=image))[0] - (SIZE - 1) / 2
        assert path[0] == pytest.approx([SUBJECT * SIZE / 4, 0], abs=0.6)
        assert path[-1] == pytest.approx(SUBJECT * SIZE / 4 * np.array(turned), abs=0.6)


def test_an_item_is_a_clip_with_one_caption_and_its_middle_frame_stands_for_it():
    data = clips(num_frames=3)
    assert (len(data.source) % 12, data.source.num_frames) == (0, 3)
    row = data.rows_of(["red apple moving to the upper left"])[0]
    frames = data.pixel_values(row)
    assert frames.shape == (3, 3, 16, 16)
    middle = torch.from_numpy(np.array(data.image(row))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(frames[1], middle)
    assert data.source.captions(row) == ["red apple moving to the upper left"]
    sample = PositionDataset(data, "train", 0)[5]
    assert sample.pixel_values.shape == (3, 3, 16, 16)


def test_clips_cut_from_a_longer_motion_are_successive_frames_of_it():
    whole, cut = clips(num_frames=8), clips(num_frames=3, video_frames=8, stride=2)
    assert len(cut.source) == 3 * len(whole.source), "from frames 0, 2 and 4"
    for row, start in ((7, 0), (30, 4)):
        clip = 3 * row + start // 2
        assert torch.equal(cut.pixel_values(clip), whole.pixel_values(row)[start : start + 3])
        assert cut.source.captions(clip) == whole.source.captions(row)
        assert cut.source.names[clip] == f"{whole.source.names[row]}/{start}"
        assert cut.source.origins[clip] == whole.source.origins[row]
    middle = torch.from_numpy(np.array(cut.image(3 * 30 + 2))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(whole.pixel_values(30)[5], middle)
    assert {*cut.source.wholes} == {*whole.source.names}, "seen as a whole"
    single = clips(num_frames=3, video_frames=8, items="frames")
    assert {*single.source.wholes} == {*whole.source.names}
    assert len(clips(num_frames=3, video_frames=8).source) == 2 * len(whole.source), "null: no frame is in two"


def test_frames_as_items_are_those_of_the_clips_with_their_captions_and_names():
    whole, single = clips(num_frames=3), clips(num_frames=3, items="frames")
    assert len(single.source) == 3 * len(whole.source)
    assert single.source.num_frames is None
    for row, frame in ((7, 0), (30, 2)):
        assert torch.equal(single.pixel_values(3 * row + frame), whole.pixel_values(row)[frame])
        assert single.source.captions(3 * row + frame) == whole.source.captions(row)
        assert single.source.names[3 * row + frame] == f"{whole.source.names[row]}/{frame}"
    assert single.names("train", "validation", "test") <= whole.names("train", "validation", "test")


def test_clips_of_one_image_and_their_frames_share_a_split_that_is_made_by_hash():
    for items in ("all", "frames"):
        data = clips(num_frames=2, items=items, held_out_percent=20.0)
        split_of = {row: name for name, rows in data.splits.indices.items() for row in rows}
        of_origin = {}
        for row, origin in enumerate(data.source.origins):
            of_origin.setdefault(origin, set()).add(split_of[row])
        assert all(len(splits) == 1 for splits in of_origin.values())
        assert {name for splits in of_origin.values() for name in splits} == {"train", "validation", "test"}


def test_where_chance_leaves_no_validation_all_clips_of_one_image_are_taken_for_it():
    hashes = [f"{value:032x}" for value in range(12)]
    origins = [str(value // 4) for value in range(12)]
    splits = split_images(hashes, lambda row: (), {}, 0.01, origins=origins)
    assert len(splits["validation"]) == 4
    assert len({origins[row] for row in splits["validation"]}) == 1


def test_without_origins_the_split_is_made_by_the_hashes_as_ever():
    hashes = [f"{value:032x}" for value in range(300)]
    alone = split_images(hashes, lambda row: (), {}, 10.0)
    assert split_images(hashes, lambda row: (), {}, 10.0, origins=hashes).indices == alone.indices


def test_a_caption_holds_out_one_motion_of_a_subject_and_not_the_subject():
    config = DataConfig("openmoji_clips", image_size=16, num_frames=2, groups=GROUPS, held_out=LISTS)
    held = CaptionedImages(build_source(config), config)
    assert {name: len(rows) for name, rows in held.splits.indices.items()} == {
        "train": 3000,
        "validation": 72,
        "test": 240,
    }
    trained = {held.source.origins[row] for row in held.splits["train"]}
    assert {held.source.origins[row] for row in held.splits["test"]} <= trained, "with other motions"


GROUPS = ("Animals & Nature", "Food & Drink")
LISTS = {"validation": "configs/openmoji/clips_validation.txt", "test": "configs/openmoji/clips_heldout.txt"}


def test_a_model_of_frames_has_seen_their_clips():
    whole, single = clips(num_frames=2), clips(num_frames=2, items="frames")
    assert single.names("train", "validation", "test") == whole.names("train", "validation", "test")


def test_a_clip_with_a_frame_like_that_of_a_held_out_one_is_not_held_out_itself(tmp_path):
    lists = {name: tmp_path / f"{name}.txt" for name in ("validation", "test")}
    lists["test"].write_text("red apple turning right\n")  # its first frame is also that of the turn to the left
    lists["validation"].write_text("grapes moving up\n")
    whole, single = (
        clips(num_frames=3, items=items, held_out={name: str(path) for name, path in lists.items()})
        for items in ("all", "frames")
    )
    held = single.names("validation", "test")
    assert held > whole.names("validation", "test"), "all frames of grapes moving down are those of grapes moving up"
    assert len(held) == 3
    assert not single.names("train") & whole.names("validation", "test")
    trained = {single.source.captions(row)[0] for row in single.splits["train"]}
    assert "red apple turning left" in trained
    assert "red apple turning right" not in trained


def test_the_middle_frame_is_looked_up_among_subjects_whatever_their_motion():
    data = clips(num_frames=3)
    samples = ClipSamples(data, None, 16)
    rows = data.rows_of(["red apple moving left", "red apple turning left", "grapes growing"])
    true = np.stack([to_uint8(data.pixel_values(row)).numpy() for row in rows])
    places = np.array(samples.places)
    assert places[rows[0]] == places[rows[1]] != places[rows[2]]
    assert samples.ranks(true, places[rows]).tolist() == [0, 0, 0]
    assert samples.ranks(true, np.roll(places[rows], 1))[0] > 0
    assert samples.true(rows).shape == samples.shown(true).shape == (3, 16, 48, 3)
    assert (samples.shown(true)[1, :, 16:32] == true[1, 1]).all()
    assert samples.fault(true) is None
    assert "clips of (2, 16, 16) are sampled" in samples.fault(true[:, :2])


def test_equal_first_frames_are_not_equal_clips():
    one, other = Shades(num_frames=2), Shades(num_frames=3)
    hashes = [CaptionedImages(source, DataConfig(image_size=8)).hashes for source in (one, other)]
    assert not set(hashes[0]) & set(hashes[1])


def test_a_balanced_epoch_has_each_subject_once_and_its_items_take_turns():
    data = DataConfig(image_size=8, balance="subjects")
    source = Shades()
    source.subjects = ["a"] * 9 + ["b", "c", "d"]
    train = PositionDataset(CaptionedImages(source, data), "train", 0)
    rows = train.images.splits["train"]
    kinds = {source.subjects[row] for row in rows}
    count = len(train)
    assert count == len(kinds)
    seen = [train.row(position) for position in range(9 * count)]
    for epoch in range(9):
        assert {source.subjects[row] for row in seen[epoch * count : (epoch + 1) * count]} == kinds
    assert {row for row in seen if source.subjects[row] == "a"} == {row for row in rows if source.subjects[row] == "a"}
    with pytest.raises(ConfigError, match=r"data\.balance: got subjects, and the data have none"):
        PositionDataset(CaptionedImages(Shades(), data), "train", 0)


def test_a_balanced_epoch_has_each_class_once():
    train = PositionDataset(CaptionedImages(Shades(), DataConfig(image_size=8, balance="classes")), "train", 0)
    assert [len({row % 3 for row in map(train.row, range(3 * epoch, 3 * epoch + 3))}) for epoch in range(4)] == [3] * 4


def test_subjects_of_openmoji_have_no_skin_tone():
    source = build_source(DataConfig(image_size=16))
    names = dict(zip(source.names, source.subjects, strict=True))
    assert names["1F44B-1F3FD"] == names["1F44B"] == "1F44B"
    assert 1900 < len(set(source.subjects)) < 2000
