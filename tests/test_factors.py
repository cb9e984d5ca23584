"""Captions that compose: families of captions that differ in one factor, and whether the right one is drawn."""

import numpy as np
import pytest

from ldm.data.openmoji import OpenMoji
from ldm.evaluation.factors import chance, covered, factor_accuracy, families, read_factors
from ldm.files import read_lines

from .table import table

TONES = ["light skin tone", "medium-light skin tone", "dark skin tone"]
CAPTIONS = [
    "woman judge light skin tone",
    "woman judge medium-light skin tone",
    "woman judge dark skin tone",
    "man judge dark skin tone",
    "judge dark skin tone",
    "woman judge",
    "lonely lighthouse",
]


def named(found):
    return [None if of is None else {CAPTIONS[index] for index in of} for of in found]


def test_a_family_differs_in_its_factor_alone():
    wanted = [CAPTIONS[1], CAPTIONS[3], CAPTIONS[6]]
    tone = named(families(CAPTIONS, TONES, wanted))
    assert tone == [{*CAPTIONS[:3], "woman judge"}, None, None], "medium-light is no light; none is a value too"
    gender = named(families(CAPTIONS, ["woman", "man"], wanted))
    assert gender == [None, set(CAPTIONS[2:5]), None], "woman is no wo-man"


def test_words_are_whole_and_case_does_not_matter():
    assert families(["manhole", "hole"], ["man"], ["manhole"]) == [None]
    assert named(families(["Man judge", "woman JUDGE"], ["man", "woman"], ["man judge"])) is not None
    (family,) = families(["Man judge", "woman JUDGE"], ["man", "woman"], ["man judge"])
    assert family.tolist() == [0, 1]


def test_accuracy_asks_for_the_nearest_of_the_family_and_ties_are_misses():
    distances = np.array([[0.0, 1.0, 0.5, 9.0], [1.0, 0.0, 0.0, 9.0], [1.0, 1.0, 0.2, 0.1]])
    own = np.array([0, 1, 2])
    within = [np.array([0, 1, 2]), np.array([0, 1, 2]), np.array([0, 1, 2])]
    assert factor_accuracy(distances, own, within).value == pytest.approx(2 / 3)  # a hit, a tie, a hit: 3 is no member
    assert factor_accuracy(distances, own, [*within[:2], None]).value == 1 / 2
    assert chance(own, within).value == pytest.approx(1 / 3)
    assert covered([*within, None]) == 3


def test_openmoji_composes():
    source = OpenMoji(64)
    captions = [source.captions(index)[0] for index in range(len(source))]
    validation = read_lines("configs/openmoji/validation.txt")
    factors = read_factors("configs/openmoji/factors.json")
    counts = {factor: covered(families(captions, words, validation)) for factor, words in factors.items()}
    assert counts == {"skin tone": 200, "gender": 138, "profession": 27, "hair": 10}
    text = " ".join(captions).lower()
    assert all(word in text for words in factors.values() for word in words if word != "child")


@table("text", ["[red, blue]", "colour: red", "colour: [red]", "colour: [1, 2]", "colour: [red, '']"])
def test_files_that_name_no_factors_are_refused(tmp_path, text):
    (tmp_path / "factors.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"expected factors, each with a list of two alternatives"):
        read_factors(tmp_path / "factors.yaml")
