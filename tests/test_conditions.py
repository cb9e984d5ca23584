"""Each condition is read from the data, put into a batch and asked of a pipeline as one and the same."""

from types import SimpleNamespace

import pytest
import torch

from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import Batch
from ldm.evaluation.conditions import CONDITIONS, condition_of

SOURCE = SimpleNamespace(
    captions=lambda row: (["red", "scarlet"], [])[row],
    class_label=lambda row: (3, UNKNOWN_CLASS)[row],
)
"""Two images; the second has neither caption nor class."""
BATCH = Batch(rows=[0, 1], positions=[0, 1], captions=["red", ""], class_labels=torch.tensor([3, UNKNOWN_CLASS]))


@pytest.mark.parametrize(
    ("keyword", "known", "others"),
    [("prompt", ["red", ""], ["blue", ""]), ("class_labels", [3, None], [5, None]), ("batch_size", [None, None], None)],
)
def test_source_and_batch_say_the_same_and_an_image_without_condition_has_nothing(keyword, known, others):
    condition = CONDITIONS[keyword]
    assert [condition.of(SOURCE, row) for row in range(2)] == condition.read(BATCH) == known
    assert known[1] == condition.nothing
    assert condition.read(condition.written(BATCH, others or known)) == (others or known)
    assert condition.read(BATCH) == known, "a batch is never changed"


def test_a_batch_without_classes_has_no_condition():
    assert CONDITIONS["class_labels"].read(Batch(rows=[0], positions=[0], captions=[""])) == [None]


def test_what_says_most_is_asked_for():
    assert condition_of([None, "class_labels", "prompt"]).keyword == "prompt"
    assert condition_of(["class_labels", None]).keyword == "class_labels"
    assert condition_of([None]).keyword == condition_of([]).keyword == "batch_size"
