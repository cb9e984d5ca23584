"""Whether images show their class: the judge against data whose best judge is known, and its section."""

import numpy as np
import pytest

from ldm.evaluation.classes import ClassJudge, class_section

CENTRES = np.array([[0, 0, 3], [0, 3, 0], [3, 0, 0], [9, 9, 9]], np.float32)


def features(counts, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat([2, 4, 5, 7], counts)
    return CENTRES[np.repeat(range(4), counts)] + rng.normal(size=(len(labels), 3)).astype(np.float32), labels


def test_the_judge_finds_classes_that_are_apart_and_guesses_those_that_are_not():
    judge = ClassJudge(*features([200] * 4))
    found, labels = features([500] * 4, seed=1)
    assert (judge(found) == labels).mean() > 0.9
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2000, 3)).astype(np.float32)
    blind = ClassJudge(noise[:1000], labels[:1000].tolist())
    assert (blind(noise[1000:]) == labels[1000:]).mean() < 0.4


def test_a_rare_class_weighs_as_much_as_a_common_one():
    judge = ClassJudge(*features([1000, 20, 20, 20]))
    found, labels = features([300] * 4, seed=1)
    for label in (2, 4, 5):
        assert (judge(found) == label)[labels == label].mean() > 0.75


def test_only_chosen_classes_are_told_apart():
    judge = ClassJudge(*features([50] * 4), chosen=[7, 2])
    assert judge.classes.tolist() == [2, 7]
    assert set(judge(features([50] * 4, seed=1)[0])) == {2, 7}
    with pytest.raises(ValueError, match="no training image has 3; there are"):
        ClassJudge(*features([50] * 4), chosen=[2, 3])
    with pytest.raises(ValueError, match="expected two or more"):
        ClassJudge(*features([50] * 4), chosen=[2])


def test_the_section_counts_what_was_asked_for():
    classes, asked = np.array([2, 5]), np.array([2, 2, 2, 5, 5, 5])
    found = np.array([2, 2, 5, 5, 5, 5])
    drawn = np.zeros((6, 8, 8, 3), np.uint8)
    section = class_section(drawn, {"generated": (found, asked), "ceiling": (asked, asked)}, classes, 3, "net")
    overall, two, five = section.rows
    assert overall.measure.value == pytest.approx(5 / 6)
    assert overall.beside["chance"].value == 0.5
    assert overall.beside["shuffled"].value == pytest.approx(1 / 6)
    assert overall.beside["ceiling"].value == 1
    assert (two.measure.value, five.measure.value) == (pytest.approx(2 / 3), 1)
    assert not overall.copied
    blind = class_section(drawn, {"generated": (asked[::-1], asked)}, classes, 3, "net")
    assert "ceiling" not in blind.rows[0].beside, "no image of them is held out"
    assert blind.rows[0].copied, "images of the other class are as good"
