"""A model that draws perfectly, one that copies and one that ignores its captions: what the sections say of each."""

import json

import numpy as np
import pytest

from ldm.evaluation import sections
from ldm.evaluation.baselines import nearest_training_captions
from ldm.evaluation.subject import Subject

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "grey": (90, 90, 90)}
PLACES = ("left", "right", "top", "bottom", "middle", "corner", "edge", "ring")
SIZE = 32


def image(colour, place):
    """A block of a colour at a place, on white."""
    canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
    number = PLACES.index(place)
    top, left = divmod(number, 4)
    canvas[top * 16 : top * 16 + 12, left * 8 : left * 8 + 6] = COLOURS[colour]
    return canvas


CAPTIONS = [f"{colour} block {place}" for colour in COLOURS for place in PLACES]
GALLERY = np.stack([image(*caption.split(" block ")) for caption in CAPTIONS])
HELD_OUT = [number for number in range(len(CAPTIONS)) if (number + number // 8) % 2]
TRAINING = [number for number in range(len(CAPTIONS)) if number not in HELD_OUT]


def embed(images):
    return images.reshape(len(images), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(images), -1).astype(np.float32) / 255


def captions(numbers):
    return [CAPTIONS[number] for number in numbers]


def subject(generated, rebuilt=None):
    return Subject(
        captions=captions(HELD_OUT),
        generated=generated,
        rebuilt=rebuilt,
        gallery=GALLERY,
        own_index=np.array(HELD_OUT),
        copied_index=np.array(TRAINING)[nearest_training_captions(captions(HELD_OUT), captions(TRAINING))],
        training_images=np.array(TRAINING),
        embed=embed,
        gallery_features=embed(GALLERY),
    )


def perfect():
    return subject(GALLERY[HELD_OUT], GALLERY[HELD_OUT])


def copier():
    return subject(perfect().copied)


def ignoring():
    """Draws a held-out image, but always that of another caption."""
    return subject(GALLERY[HELD_OUT][np.roll(np.arange(len(HELD_OUT)), 1)])


def rows(section):
    return {row.name: row for row in section.rows}


@pytest.mark.slow
def test_retrieval_tells_the_three_apart():
    found = {
        name: rows(sections.retrieval(of, "colours"))
        for name, of in {"perfect": perfect(), "copier": copier(), "ignoring": ignoring()}.items()
    }
    for where in ("pixels", "colours"):
        assert found["perfect"][f"R@1, {where}"].measure.value == 1
        assert found["copier"][f"R@1, {where}"].measure.value == 0
        assert found["ignoring"][f"R@1, {where}"].measure.value == 0
        assert found["perfect"][f"R@1, {where}"].beside["copy"].value == 0
        assert found["perfect"][f"R@1, {where}"].beside["ceiling"].value == 1
        assert not found["perfect"][f"R@1, {where}"].copied
        assert found["copier"][f"R@1, {where}"].copied


def test_a_factor_is_drawn_or_not():
    known = {caption: number for number, caption in enumerate(CAPTIONS)}
    factors = {"colour": list(COLOURS), "place": list(PLACES), "shape": ["ball", "cube"]}
    right = rows(sections.caption_factors(perfect(), factors, known))
    assert right["colour"].measure.value == right["place"].measure.value == 1
    assert right["colour"].beside["chance"].value == 1 / 4
    assert right["place"].beside["chance"].value == 1 / 8
    assert "shape" not in right, "no caption has it"
    grey = subject(np.stack([image("grey", CAPTIONS[number].split(" block ")[1]) for number in HELD_OUT]))
    wrong = rows(sections.caption_factors(grey, factors, known))
    assert wrong["place"].measure.value > 0.5
    share = np.mean([CAPTIONS[number].startswith("grey") for number in HELD_OUT])
    assert wrong["colour"].measure.value == pytest.approx(share)


def test_likeness_of_the_true_images_is_none_and_a_copier_is_told():
    found = rows(sections.likeness(perfect(), "colours"))
    assert found["KID, colours"].measure.value < 1e-9
    assert found["KID, colours"].measure.value <= found["KID, colours"].beside["copy"].value
    white = subject(np.full_like(GALLERY[HELD_OUT], 255))
    far = rows(sections.likeness(white, "colours"))
    assert far["KID, colours"].measure.low > 0
    assert far["KID, colours"].copied


def test_a_copier_is_nearer_to_training_than_any_true_image_and_a_perfect_model_is_not():
    assert sections.memorisation(copier(), "colours").rows[0].measure.value == 1
    assert sections.memorisation(perfect(), "colours").rows[0].measure.value == 0.5, "as near as the true ones"


def test_the_gain_is_what_the_right_captions_take_off_the_loss():
    right, wrong = np.full((3, 8), 0.25), np.full((3, 8), 0.5)
    section = sections.caption_gain((right, wrong), (0.1, 0.5, 0.9))
    assert section.rows[0].measure.value == 0.25
    assert [x for x, _ in section.curves[1].lines["conditional gain"]] == [0.1, 0.5, 0.9]


def test_every_section_can_be_written():
    some = perfect()
    parts = [
        sections.retrieval(some, "colours"),
        sections.likeness(some, "colours"),
        sections.memorisation(some, "colours"),
        sections.variety(some.captions[:2], some.generated[:4], embed(some.generated[:4]), 2, "colours"),
    ]
    for part in parts:
        json.dumps([row.measure.value for row in part.rows])
        assert all(figure.image.width > 10 for figure in part.figures)
