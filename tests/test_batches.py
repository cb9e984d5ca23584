from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages, PositionDataset, fixed_batch
from ldm.data.loader import training_batches

from .table import table


class Shades:
    """Images of one grey each, or clips of them; some have no caption, one has two."""

    fingerprint = "shades"
    names = origins = subjects = wholes = None

    def __init__(self, count=12, num_frames=None):
        self.count, self.num_frames = count, num_frames
        if num_frames is not None:
            self.fingerprint = f"clips of {num_frames} shades"

    def __len__(self):
        return self.count

    def image(self, index):
        image = Image.new("RGB", (8, 8), (index * 10,) * 3)
        image.putpixel((0, 0), (255, 255, 255))  # so that a mirror image differs
        return image

    def item(self, index):
        return [self.image(index + frame) for frame in range(self.num_frames or 1)]

    def frame(self, index, number):
        return self.item(index)[number]

    def captions(self, index):
        return {0: (), 1: ("one", "eins")}.get(index, (f"shade {index}",))

    all_captions = captions

    def class_label(self, index):
        return index % 3


def images(**config):
    return CaptionedImages(Shades(), DataConfig(image_size=8, held_out_percent=0.0, **config))


def dataset(seed=0, encoded=None, **config):
    return PositionDataset(images(**config), "train", seed, encoded)


def encode(pixel_values):
    mean = pixel_values.flatten(1).mean(1)
    return {"mean": mean[:, None], "std": torch.full_like(mean, 0.5)[:, None]}


def test_a_sample_is_a_function_of_seed_and_position():
    for position in (0, 5, 100):
        one, two = dataset()[position], dataset()[position]
        assert (one.row, one.caption) == (two.row, two.caption)
        assert torch.equal(one.pixel_values, two.pixel_values)
    assert [dataset(1)[p].row for p in range(12)] != [dataset()[p].row for p in range(12)]


@table("workers", [0, 2])
def test_r05_batches_from_any_step_on_are_the_same(workers):
    data = dataset(batch_size=4, workers=workers)
    straight = [b.positions for step in islice(training_batches(data, 0, micro_steps=2), 5) for b in step]
    resumed = [b.positions for step in islice(training_batches(data, 3, micro_steps=2), 2) for b in step]
    assert straight == [[2 * i, 2 * i + 1] for i in range(10)]
    assert resumed == straight[6:]


def test_r05_r20_every_image_is_seen_once_an_epoch_over_two_processes():
    data = dataset(batch_size=4)
    seen = [
        image
        for rank in (0, 1)
        for step in islice(training_batches(data, 0, rank=rank, world=2), 3)
        for batch in step
        for image in batch.rows
    ]
    assert sorted(seen) == list(range(12))


def test_r15_captions_are_chosen_evenly_and_a_missing_one_is_the_null():
    data = dataset()
    chosen = [data[p] for p in range(12 * 200)]
    assert {s.caption for s in chosen if s.row == 0} == {""}
    share = np.mean([s.caption == "one" for s in chosen if s.row == 1])
    assert abs(share - 0.5) < 4 * 0.5 / 200**0.5


def test_flips_are_drawn_only_where_asked():
    def mirrored(data):
        return [bool(data[p].pixel_values[0, 0, -1] == 1) for p in range(240)]

    assert not any(mirrored(dataset()))
    assert abs(np.mean(mirrored(dataset(flip=True))) - 0.5) < 4 * 0.5 / 240**0.5


@table("flip", [False, True])
def test_cached_moments_are_those_of_the_image_that_would_have_been_loaded(flip):
    source = images(flip=flip)
    cached = PositionDataset(source, "train", 0, source.encoded_images("test", f"{flip}", encode))
    plain = PositionDataset(source, "train", 0)
    for position in range(30):
        with_cache, without = cached[position], plain[position]
        assert (with_cache.row, with_cache.caption) == (without.row, without.caption)
        assert with_cache.mirrored == without.mirrored
        expected = encode(without.pixel_values[None])
        assert torch.allclose(with_cache.moments["mean"], expected["mean"][0])
        assert torch.equal(with_cache.moments["std"], expected["std"][0])
        assert with_cache.pixel_values is None
    both = PositionDataset(source, "train", 0, source.encoded_images("test", f"{flip}", encode), with_pixels=True)
    assert torch.equal(both[3].pixel_values, plain[3].pixel_values)
    assert torch.equal(both[3].moments["mean"], cached[3].moments["mean"])


def test_of_a_limited_set_no_other_image_is_encoded():
    seen = []

    def counting(pixel_values):
        seen.append(len(pixel_values))
        return encode(pixel_values)

    source = images(limit=7)
    cached = PositionDataset(source, "train", 0, source.encoded_images("test", "limit", counting))
    assert sum(seen) == sum(map(len, source.splits.indices.values())) == 7
    for position in range(12):
        row = cached[position].row
        expected = encode(source.pixel_values(row)[None])["mean"][0]
        assert torch.allclose(cached[position].moments["mean"], expected)


def test_class_labels_follow_their_images():
    batch = fixed_batch(dataset(), 12)
    assert batch.class_labels.tolist() == [image % 3 for image in batch.rows]


def test_known_captions_are_those_that_training_and_validation_may_show():
    split = CaptionedImages(Shades(100), DataConfig(image_size=8, held_out_percent=20.0))
    shown = {caption for name in ("train", "validation") for caption in split.captions(name)}
    assert set(split.known_captions()) == shown | {""}
    assert len(split.known_captions()) < 100


def test_first_images_are_of_their_split_whatever_its_order():
    split = images()
    few = split.first_images("train", 5)
    assert few.shape == (5, 3, 8, 8)
    levels = {round(float(value)) for value in (few[:, 0, 4, 4] + 1) * 12.75}
    assert levels != set(range(5)), "the first by hash, not by row"
    assert len(split.first_images("train", 100)) == 12


def test_rows_of_equal_pixels_share_a_place_in_the_gallery():
    class Twins(Shades):
        fingerprint = "twins"

        def image(self, index):
            return super().image(index // 2)

    gallery, place = CaptionedImages(Twins(), DataConfig(image_size=8)).gallery()
    assert gallery.shape == (6, 8, 8, 3)
    assert place == [i // 2 for i in range(12)]


def test_names_of_the_source_outlive_the_last_bits_of_its_pixels():
    class Rendered(Shades):
        names = tuple(f"name {9 - index // 2}" for index in range(12))

        def __init__(self, brightness):
            super().__init__()
            self.fingerprint = f"rendered-{brightness}"
            self.brightness = brightness

        def image(self, index):
            return super().image(index // 2).point(lambda value: value + self.brightness)

    one, two = (CaptionedImages(Rendered(b), DataConfig(image_size=8, held_out_percent=20)) for b in (0, 1))
    assert one.hashes == two.hashes
    assert len(set(one.hashes)) == 6  # equal pixels share a name, the first
    assert one.splits == two.splits


def test_stages_of_different_sizes_split_alike():
    small, large = (CaptionedImages(Shades(), DataConfig(image_size=s, held_out_percent=20)) for s in (4, 8))
    assert small.splits == large.splits


def test_captions_lead_to_their_images():
    assert images().rows_of(["shade 5", "eins"]) == [5, 1]
    with pytest.raises(ValueError, match="'nothing'"):
        images().rows_of(["nothing"])


def test_a_fixed_batch_is_no_larger_than_its_data_set():
    assert len(fixed_batch(dataset(), 100)) == 12
    assert fixed_batch(dataset(), 3).positions == [0, 1, 2]


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="validation split has no images"):
        PositionDataset(images(), "validation", 0)
