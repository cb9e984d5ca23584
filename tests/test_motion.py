"""Motion in clips, measured on clips whose motion is known."""

import numpy as np
import pytest

from ldm.data.clips import DIRECTIONS, MOTIONS
from ldm.evaluation.motion import (
    asymmetric,
    changes,
    displacements,
    grown_as_asked,
    growths,
    moved_as_asked,
    rotation_errors,
    steadied,
    turned_as_asked,
)

from .test_clips import clip

TRUE = np.concatenate([clip(motion) for motion in MOTIONS])
TOWARDS = np.array([motion.towards for motion in DIRECTIONS])
WAYS = displacements(TRUE[:8])
LENGTHS = np.linalg.norm(WAYS, axis=1)


def flagged():
    """Clips of a shape without symmetry that turns to the left and to the right."""
    from PIL import Image

    image = Image.new("RGBA", (64, 64))
    image.paste((0, 0, 0, 255), (14, 10, 22, 56))
    image.paste((200, 0, 0, 255), (22, 10, 50, 26))
    return np.concatenate([clip(motion, image=image) for motion in MOTIONS[10:]])


def test_true_clips_move_as_asked_and_no_clip_moves_as_another_direction_asks():
    assert moved_as_asked(WAYS, TOWARDS, LENGTHS).all()
    for shift in range(1, 8):
        assert not moved_as_asked(WAYS, np.roll(TOWARDS, shift, 0), LENGTHS).any()


def test_a_way_counts_up_to_half_of_an_eighth_of_a_turn_and_from_half_of_the_length_on():
    way, towards = np.array([[10.0, 0.0]]), np.array([[1.0, 0.0]])
    turned = [np.array([[np.cos(np.radians(a)), np.sin(np.radians(a))]]) for a in (22, 23, -22, -23)]
    assert [bool(moved_as_asked(10 * one, towards, np.array([10.0]))[0]) for one in turned] == [1, 0, 1, 0]
    found = [bool(moved_as_asked(share * way, towards, np.array([10.0]))[0]) for share in (0.51, 0.49, 0.0)]
    assert found == [True, False, False]


def test_a_clip_that_stands_still_is_a_miss_and_one_without_a_subject_too():
    still = TRUE[:8, :1].repeat(5, 1)
    assert not moved_as_asked(displacements(still), TOWARDS, LENGTHS).any()
    assert not moved_as_asked(displacements(np.full_like(TRUE[:8], 255)), TOWARDS, LENGTHS).any()


def test_sizes_count_from_half_of_the_true_logarithm_on_in_the_true_direction():
    true = growths(TRUE[8:10])
    assert grown_as_asked(true, true).all()
    assert not grown_as_asked(-true, true).any()
    assert grown_as_asked(0.51 * true, true).all()
    assert not grown_as_asked(0.49 * true, true).any()
    assert not grown_as_asked(growths(TRUE[:2]), true).any()
    assert growths(np.full_like(TRUE[:1], 255)).tolist() == [0]


def test_turns_of_a_shape_without_symmetry_are_found_and_a_square_has_none():
    angles = np.array([motion.degrees for motion in MOTIONS[10:]])
    errors = rotation_errors(flagged())
    assert asymmetric(errors, angles).all()
    assert turned_as_asked(errors, angles).tolist() == [True, True]
    assert turned_as_asked(errors, -angles).tolist() == [False, False]
    assert not asymmetric(rotation_errors(TRUE[10:]), angles).any()


def test_a_steady_clip_changes_by_nothing_but_its_way_and_flicker_is_seen():
    whole = TRUE[[0, 2]].copy()
    exact = np.full_like(whole[:1], 255)
    for frame in range(5):
        exact[0, frame, 20:40, 4 + 8 * frame : 24 + 8 * frame] = 0
    assert changes(exact).tolist() == [0]
    assert (steadied(exact)[0] == steadied(exact)[0, :1]).all()
    exact[0, 1::2][exact[0, 1::2] == 0] = 51
    assert changes(exact)[0] == pytest.approx(51)
    assert changes(whole).max() < 15, "frames between whole pixels are smoothed otherwise"
