"""The loop knows no diffusion: these tests train a quadratic."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

from ldm.config import LoopConfig, OptimConfig, RunConfig
from ldm.errors import ConfigError
from ldm.training.averages import Average, exponential
from ldm.training.loop import MAX_SKIPPED_IN_A_ROW, Loop
from ldm.training.progress import TIMED_STEPS, Progress, expected_steps, fix_total_steps, planned_steps
from ldm.training.record import RunRecord
from ldm.training.run import Run, opened

from .table import table


@dataclass
class Points:
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)


class Quadratic:
    """Loss (w - 3)^2 and a second module with a loss of its own: the loop iterates over names."""

    def __init__(self, run, poison=()):
        torch.manual_seed(0)
        self.modules = {"main": nn.Linear(1, 1, bias=False), "other": nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))}
        self.forwards = {name: run.prepare(module) for name, module in self.modules.items()}
        self.averages = {"main": Average(self.modules["main"], exponential(0.9))}
        self.memory = {"taken": torch.zeros(())}
        self.poison = set(poison)
        self.seen = []

    def losses(self, batch, global_step):
        self.seen.append(list(batch.positions))
        x = torch.tensor([[float(p % 7)] for p in batch.positions])
        factor = float("nan") if self.poison & set(batch.positions) else 1.0
        main = (self.forwards["main"](x) - 3 * x).square().mean() * factor
        other = (self.forwards["other"](torch.cat([x, x + 1], 1)) - x).square().mean()
        return {"main": main, "other": other}

    def after_step(self):
        self.memory["taken"] += 1


def batches(size=4):
    def start(start_step, *, micro_steps, rank, world) -> Iterator[list[Points]]:
        step = start_step
        while True:
            share = size // micro_steps
            yield [
                Points(list(range(step * size + m * share, step * size + (m + 1) * share))) for m in range(micro_steps)
            ]
            step += 1

    return start


def train(folder, steps, poison=(), events=(), **loop):
    settings = {"max_train_steps": steps, "log_every_steps": 1, "save_every_steps": 3}
    config = LoopConfig(**settings | {"trackers": (), "mixed_precision": "no"} | loop)
    optim = OptimConfig(learning_rate=0.05, decay="cosine", warmup_steps=2)
    with opened(Run(str(folder), 0, config)) as run:
        step = Quadratic(run, poison)
        loop_ = Loop(step, optim, config, run, epoch_steps=10)
        loop_.resume()
        progress = loop_.fit(batches(), *events)
    return step, loop_, progress


def weights(step):
    return torch.cat([p.detach().flatten() for m in step.modules.values() for p in m.parameters()])


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


def test_the_quadratic_is_solved(tmp_path):
    step, _, progress = train(tmp_path, 200)
    assert abs(step.modules["main"].weight.item() - 3) < 0.05
    assert abs(step.averages["main"].module.weight.item() - 3) < 0.05
    assert progress.global_step == 200
    assert progress.images == 800


def test_r04_resuming_twice_equals_not_stopping(tmp_path):
    straight, _, _ = train(tmp_path / "a", 9)
    for limit in (4, 7, 9):  # each stops a run that plans nine steps, by raising after its limit

        def stop(limit=limit):
            def endless(start_step, **share):
                for k, step in enumerate(batches()(start_step, **share), start_step):
                    if k == limit:
                        raise KeyboardInterrupt
                    yield step

            return endless

        config = LoopConfig(
            max_train_steps=9, log_every_steps=1, save_every_steps=1, trackers=(), mixed_precision="no",
        )  # fmt: skip
        with opened(Run(str(tmp_path / "b"), 0, config)) as run:
            resumed = Quadratic(run)
            loop = Loop(resumed, OptimConfig(learning_rate=0.05, decay="cosine", warmup_steps=2), config, run, 10)
            loop.resume()
            try:
                loop.fit(stop())
            except KeyboardInterrupt:
                assert limit < 9
    assert torch.equal(weights(straight), weights(resumed))
    assert torch.equal(straight.averages["main"].module.weight, resumed.averages["main"].module.weight)
    assert straight.memory["taken"] == resumed.memory["taken"] == 9
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert resumed.seen == straight.seen[7:]


def test_r10_accumulation_changes_nothing_but_rounding(tmp_path):
    whole, _, one = train(tmp_path / "a", 20)
    parts, _, four = train(tmp_path / "b", 20, gradient_accumulation_steps=4)
    assert one.global_step == four.global_step == 20
    main = [step.modules["main"].weight.item() for step in (whole, parts)]
    assert main[0] == pytest.approx(main[1], abs=1e-6)


def test_r08_a_non_finite_step_changes_nothing_and_is_counted(tmp_path):
    clean, _, _ = train(tmp_path / "a", 4)
    at_stop, _, progress = train(tmp_path / "b", 5, poison=[17])  # position 17 is in the fifth step
    assert progress.skipped_steps == 1
    planned_five, _, _ = train(tmp_path / "c", 5, poison=[17, 16])
    assert torch.equal(weights(at_stop), weights(planned_five))
    assert torch.isfinite(weights(at_stop)).all()
    assert not torch.equal(weights(clean), weights(at_stop))  # another schedule: the comparison above is not empty


def test_r08_many_non_finite_steps_stop_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="in a row"):
        train(tmp_path, 50, poison=range(12, 400))
    _, _loop, progress = train(tmp_path, 50)  # what is left is the last good state, and it goes on
    assert progress.global_step == 50
    assert progress.skipped_steps <= MAX_SKIPPED_IN_A_ROW


def test_the_learning_rate_follows_the_step(tmp_path):
    train(tmp_path, 10)
    rates = [row["learning_rate"] for row in lines(tmp_path)]
    assert rates[:2] == [0.025, 0.05]
    assert rates[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))


def test_events_happen_in_order_when_due_and_at_the_end(tmp_path):
    called = []
    events = [(every, lambda step, every=every: called.append((every, step))) for every in (5, None, 10)]
    train(tmp_path, 12, events=events)
    assert called == [(5, 5), (5, 10), (10, 10), (5, 12), (10, 12)]


def test_a_finished_run_has_nothing_to_train(tmp_path):
    train(tmp_path, 6)
    before = lines(tmp_path)
    step, _, progress = train(tmp_path, 6)
    assert step.seen == []
    assert progress.global_step == 6
    assert lines(tmp_path) == before


def test_seconds_become_a_number_of_steps_once(tmp_path):
    _, _loop, progress = train(tmp_path, None, max_train_seconds=0.5)
    assert progress.global_step == progress.total_steps > TIMED_STEPS
    assert 0.1 < progress.train_seconds < 5
    _, again, _ = train(tmp_path, None, max_train_seconds=100.0)
    assert again.progress.total_steps == progress.total_steps


@pytest.mark.slow
def test_another_limit_of_a_resumed_training_is_followed(tmp_path):
    def trained(**limit):
        config = LoopConfig(trackers=(), mixed_precision="no", **limit)
        with opened(Run(str(tmp_path), 0, config)) as run:
            loop = Loop(Quadratic(run), OptimConfig(), config, run, epoch_steps=10)
            loop.resume(RunRecord(json.loads(json.dumps({"config": asdict(RunConfig("out", loop=config))}))))
            return loop.fit(batches())

    first = trained(max_train_seconds=0.2).global_step
    assert trained(max_train_seconds=0.2).global_step == first
    assert trained(max_train_seconds=0.4).global_step > first
    assert trained(max_train_steps=2 * 10**3).global_step == 2 * 10**3


ASKED = LoopConfig(max_train_seconds=600.0)


def planned(step_seconds, optim, asked=ASKED):
    """Return the progress after the last step of a training whose step takes ``step_seconds(progress)``."""
    progress = Progress()
    while progress.total_steps is None or progress.global_step < progress.total_steps:
        progress.count(4, step_seconds(progress))
        fix_total_steps(progress, asked, optim)
    return progress


@table("slower_from", [0.02, 0.1, 0.3, 0.5])
@table("factor", [0.5, 2])
@table(("seconds", "warmup_steps"), [(0.3, 100), (6.0, 5)])
@table("optim", [{"decay": "linear", "decay_fraction": 0.3}, {"decay": "constant"}])
def test_seconds_are_kept_though_the_speed_changes_in_the_first_half(optim, seconds, warmup_steps, factor, slower_from):
    def step_seconds(progress):
        late = progress.train_seconds >= slower_from * 600
        jitter = 1 + 0.5 * math.sin(7 * progress.global_step)
        return (10 if progress.global_step == 0 else 1) * seconds * jitter * (factor if late else 1)

    progress = planned(step_seconds, OptimConfig(warmup_steps=warmup_steps, **optim))
    assert progress.train_seconds == pytest.approx(600, rel=0.1)


@table(
    ("optim", "start", "total"),
    [
        ({"decay": "cosine", "decay_fraction": 0.3}, 420, 600),
        ({"decay": "cosine"}, TIMED_STEPS, 600),
        ({"decay": "cosine", "warmup_steps": 50}, 50, 600),
        ({"decay": "cosine", "warmup_steps": 1000}, 600, 601),  # the time is over in the warm-up
        ({}, 600, 601),
    ],
)
def test_the_number_of_steps_is_fixed_when_the_decay_begins(optim, start, total):
    """A step takes a second, and 600 are asked for."""
    progress = planned(lambda progress: 1.0, OptimConfig(**optim))
    assert (progress.decay_start, progress.total_steps) == (start, total)


def test_a_few_long_steps_are_not_made_twenty():
    assert planned(lambda progress: 200.0, OptimConfig()).total_steps == 4


def test_the_expected_number_of_steps_is_what_the_seconds_left_are_enough_for():
    progress, found = Progress(), []
    for step in range(40):
        progress.count(4, 1.0 if step < 25 else 2.0)
        found.append(expected_steps(progress, ASKED))
    assert found[TIMED_STEPS - 2 : 25] == [None, *[600] * 6]
    assert sorted(found[24:], reverse=True) == found[24:]
    assert 25 + (600 - 25) / 2 < found[-1] < 330
    assert expected_steps(progress, LoopConfig(max_train_steps=60)) is None  # `planned_steps` has put it there
    assert expected_steps(Progress(total_steps=60), ASKED) == 60


def test_the_speed_of_late_of_a_checkpoint_of_version_0_1_0_is_the_mean():
    old = {"global_step": 12, "train_seconds": 6.0, "images": 48}
    progress = Progress(**old)
    assert progress.step_seconds == 0.5
    assert Progress(**asdict(progress)) == progress
    assert Progress().step_seconds == 0


def test_r04_a_training_by_the_clock_that_is_resumed_takes_the_same_steps_at_the_same_rates(tmp_path, monkeypatch):
    """The clock stands still but in a step's loss, which takes a second, and two from step 30 on."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Timed(Quadratic):
        def losses(self, batch, global_step):
            now[0] += 1 if global_step < 30 else 2
            return super().losses(batch, global_step)

    def run_until(folder, limit):
        def stopping(start_step, **share):
            for step, batch in enumerate(batches()(start_step, **share), start_step):
                if step == limit:
                    raise KeyboardInterrupt
                yield batch

        config = LoopConfig(
            max_train_seconds=100.0, log_every_steps=1, save_every_steps=1, trackers=(), mixed_precision="no"
        )
        optim = OptimConfig(learning_rate=0.05, decay="linear", decay_fraction=0.3, warmup_steps=2)
        with opened(Run(str(folder), 0, config)) as run:
            loop = Loop(step := Timed(run), optim, config, run, epoch_steps=10)
            loop.resume()
            with contextlib.suppress(KeyboardInterrupt):
                loop.fit(stopping)
        return step, loop.progress

    straight, whole = run_until(tmp_path / "a", None)
    assert (whole.decay_start, whole.total_steps) == (50, 65)  # 30 + 2 * 20 = 70 of 100 s, and 2 * 15
    assert whole.train_seconds == 100
    for limit in (3, 25, 49, 50, 51, 60, None):
        resumed, progress = run_until(tmp_path / "b", limit)
    assert progress == whole
    assert torch.equal(weights(straight), weights(resumed))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    rates = [row["learning_rate"] for row in lines(tmp_path / "a")]
    assert rates == pytest.approx([0.025, *[0.05] * 49, *(0.05 * (14 - k) / 14 for k in range(15))], abs=1e-12)


def test_a_training_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="expected one of max_train_steps, max_train_epochs, max_train_seconds"):
        planned_steps(LoopConfig(), 10)


def test_epochs_become_steps():
    assert planned_steps(LoopConfig(max_train_epochs=2.5), 10.5) == 27
