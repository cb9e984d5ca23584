"""Each condition is read from the data, put into a batch and asked of a pipeline as one and the same."""

from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import Batch
from ldm.evaluation.conditions import CONDITIONS, condition_by, conditions_of
from ldm.export.kinds import KINDS
from ldm.export.pipeline_card import WORDS
from pipelines.pixels import PixelPipeline

from .table import table
from .test_pixels_pipeline import CLASSES, network
from .tiny_pipeline import pipeline

SOURCE = SimpleNamespace(
    captions=lambda row: (["red", "scarlet"], [])[row],
    class_label=lambda row: (3, UNKNOWN_CLASS)[row],
)
IMAGES = SimpleNamespace(source=SOURCE)
"""Two images; the second has neither caption nor class."""
BATCH = Batch(rows=[0, 1], positions=[0, 1], captions=["red", ""], class_labels=torch.tensor([3, UNKNOWN_CLASS]))


@pytest.mark.parametrize(
    ("keyword", "known", "others"),
    [("prompt", ["red", ""], ["blue", ""]), ("class_labels", [3, None], [5, None]), ("batch_size", [None, None], None)],
)
def test_source_and_batch_say_the_same_and_an_image_without_condition_has_nothing(keyword, known, others):
    condition = CONDITIONS[keyword]
    assert [condition.of(IMAGES, row) for row in range(2)] == condition.read(BATCH) == known
    assert known[1] == condition.nothing
    assert condition.read(condition.replaced(BATCH, others or known)) == (others or known)
    assert condition.read(BATCH) == known, "a batch is never changed"


def test_images_of_a_batch_are_exchanged_with_their_numbers_and_mirrors():
    condition, pixels = CONDITIONS["image"], torch.rand(3, 3, 2, 2)
    batch = Batch([0, 1, 2], [5, 6, 7], ["a", "b", "c"], pixels, mirrored=[False, True, False])
    seen = condition.read(batch)
    assert condition.nothing not in seen
    other = condition.replaced(batch, condition.exchange(seen))
    assert other.views == [(6, True), (7, False), (5, False)]
    assert torch.equal(other.pixel_values, pixels[[1, 2, 0]])
    assert other.captions == batch.captions
    with pytest.raises(ValueError, match="one image alone"):
        condition.exchange(seen[:1])
    without = condition.replaced(Batch([0], [5], ["a"]), [(6, True, None)])
    assert without.views == [(6, True)]


def test_an_image_is_read_from_its_file(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (image,) = CONDITIONS["image"].parsed(str(tmp_path / "clear.png"))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert CONDITIONS["image"].parsed("no such file") is None


def test_a_batch_without_classes_has_no_condition():
    assert CONDITIONS["class_labels"].read(Batch(rows=[0], positions=[0], captions=[""])) == [None]


def test_what_says_most_is_asked_for():
    assert conditions_of([None, "class_labels", "prompt"])[0].keyword == "prompt"
    assert conditions_of(["class_labels", None])[0].keyword == "class_labels"
    assert conditions_of([None])[0].keyword == conditions_of([])[0].keyword == "batch_size"


class Words:
    components = MappingProxyType({})

    def __call__(self, words):
        """Draw."""


@table(
    ("build", "found"),
    [
        (pipeline, "prompt"),
        (lambda: PixelPipeline(network(CLASSES), DDPMScheduler()), "class_labels"),
        (lambda: PixelPipeline(network(), DDPMScheduler()), "batch_size"),
        (lambda: DDPMPipeline(network(), DDPMScheduler()), "batch_size"),
    ],
)
def test_a_pipeline_is_asked_for_what_its_denoiser_is_conditioned_on(build, found):
    assert condition_by(build()) is CONDITIONS[found]


@table(
    ("build", "said"),
    [
        (lambda: DDPMPipeline(network(CLASSES), DDPMScheduler()), "passes no classes to its denoiser"),
        (Words, "Words takes none of prompt, class_labels, image, batch_size; expected a pipeline that does"),
    ],
)
def test_a_pipeline_that_cannot_be_asked_is_refused(build, said):
    with pytest.raises(ValueError, match=said):
        condition_by(build())


@table(
    ("keyword", "text", "value"),
    [
        ("prompt", "3", "3"),
        ("prompt", "", ""),
        ("class_labels", "3", [3]),
        ("class_labels", "a cat", None),
        ("class_labels", "", None),
        ("batch_size", "3", None),
    ],
)
def test_what_a_user_writes_is_a_condition_or_none(keyword, text, value):
    assert CONDITIONS[keyword].parsed(text) == value


def test_every_condition_has_its_words_on_a_card():
    assert {kind.asks for kind in KINDS} == CONDITIONS.keys()
    assert WORDS.keys() == {kind.words or kind.asks for kind in KINDS}
