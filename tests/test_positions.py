import pytest
import torch

from ldm.data.positions import generator, permuted, sample_index, step_positions

from .table import table


@table("length", [1, 2, 3, 5, 16, 17, 64, 1000])
def test_r05_every_sample_stands_exactly_once_in_every_epoch(length):
    for epoch in range(3):
        positions = range(epoch * length, (epoch + 1) * length)
        assert sorted(sample_index(7, p, length) for p in positions) == list(range(length))


def test_epochs_and_seeds_are_ordered_differently():
    orders = {tuple(sample_index(seed, e * 100 + i, 100) for i in range(100)) for seed in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_order_is_near_uniform():
    # where sample 0 lands over many epochs: chi-squared with 9 degrees of freedom, 99.9 % below 27.9
    counts = torch.zeros(10)
    for key in range(2000):
        counts[permuted(0, 10, key * 2654435761)] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


def test_an_index_outside_the_range_is_refused():
    with pytest.raises(ValueError, match="outside"):
        permuted(5, 5, 0)


@table(("micro_steps", "world"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_r20_processes_and_micro_steps_share_a_step_without_gap_or_overlap(micro_steps, world):
    taken = [
        p
        for step in (3, 4)
        for micro in range(micro_steps)
        for rank in range(world)
        for p in step_positions(step, 8, micro, micro_steps, rank, world)
    ]
    assert taken == list(range(24, 40))


def test_r20_a_batch_size_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        step_positions(0, 8, 0, 1, 0, 3)


def test_a_draw_depends_on_seed_position_and_stream_only():
    def draw(*key):
        return torch.randn(4, generator=generator(*key))

    assert torch.equal(draw(0, 5, "noise"), draw(0, 5, "noise"))
    for other in [(1, 5, "noise"), (0, 6, "noise"), (0, 5, "flip")]:
        assert not torch.equal(draw(0, 5, "noise"), draw(*other))
