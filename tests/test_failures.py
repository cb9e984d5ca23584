"""What goes wrong while training: numbers that are not finite, loader processes that fail, precision that overflows."""

import os
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context

import pytest
import torch

from ldm.config import DataConfig, LoopConfig, OptimConfig
from ldm.data import loader
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.data.loader import LoadingError, training_batches
from ldm.training.averages import Average, exponential
from ldm.training.checkpoint import CheckpointError, CheckpointStore
from ldm.training.loop import MAX_SKIPPED_IN_A_ROW, Loop
from ldm.training.run import Run, opened
from ldm.training.state import training_state

from .table import table
from .test_batches import Shades
from .test_loop import Quadratic, batches, lines, train, weights
from .test_signals import wait_for, wait_until_gone


def without(removed):
    """The batches of `batches`, the step `removed` left out."""

    def start(start_step, **share):
        for k, step in enumerate(batches()(start_step, **share), start_step):
            if k != removed:
                yield step

    return start


def whole_state(loop):
    tensors, state = training_state(*loop._trained)
    return tensors, {name: value for name, value in state.items() if name.endswith("-optimizer")}


def fit(folder, stream, steps, poison=(), planned=40, settings=None):
    """Train some of 40 planned steps of a quadratic without dropout."""
    config = LoopConfig(
        max_train_steps=planned, log_every_steps=1, trackers=(), mixed_precision="no", save_every_steps=1
    )
    with opened(Run(str(folder), 0, config)) as run:
        step = Quadratic(run, poison)
        step.modules["other"][1].p = 0.0  # dropout draws by the step's number, which differs here
        loop = Loop(step, OptimConfig(learning_rate=0.05, decay="cosine", warmup_steps=2), config, run, 10)
        loop.resume()
        with pytest.raises(KeyboardInterrupt):
            loop.fit(stream, (steps, interrupt))
    return loop


def logged_rates(folder):
    """Of each step; that it was skipped stands in a row of its own."""
    return [row["learning_rate"] for row in lines(folder) if "learning_rate" in row]


def interrupt(step):
    raise KeyboardInterrupt


def test_r08_a_step_that_is_not_finite_changes_nothing_as_if_its_batch_had_not_been_there(tmp_path):
    skipped = fit(tmp_path / "a", batches(), 9, poison=[17])  # position 17 is in the fifth step
    clean = fit(tmp_path / "b", without(4), 8)
    (tensors, optimizer), (expected, expected_optimizer) = whole_state(skipped), whole_state(clean)
    assert skipped.progress.skipped_steps == 1
    assert optimizer == expected_optimizer
    for group in expected:
        assert tensors[group].keys() == expected[group].keys()
        assert all(torch.equal(tensors[group][name], expected[group][name]) for name in expected[group]), group
    rates = {name: logged_rates(tmp_path / name) for name in "ab"}
    assert rates["a"][5:] == rates["b"][4:], "the schedule stood still"


def test_r08_many_in_a_row_stop_the_run_name_the_images_and_leave_the_last_good_state(tmp_path):
    with pytest.raises(FloatingPointError, match=rf"{MAX_SKIPPED_IN_A_ROW} steps in a row .* on images"):
        train(tmp_path, 50, poison=range(12, 400), save_every_steps=1)
    saved = CheckpointStore.load(CheckpointStore(tmp_path / "checkpoints", 1).latest())
    before = fit(tmp_path / "before", batches(), 3, planned=50)
    assert saved.state["progress"]["skipped_in_a_row"] == MAX_SKIPPED_IN_A_ROW - 1
    assert torch.equal(saved.tensors["main-weights"]["weight"], before.step.modules["main"].weight.detach())


def test_r08_the_message_names_the_rows_of_the_batch(tmp_path):
    @dataclass
    class Imaged:
        positions: list[int]
        rows: list[int]

        def __len__(self):
            return len(self.positions)

    def imaged(start_step, **share):
        for (points,) in batches()(start_step, **share):
            yield [Imaged(points.positions, [1000 + position for position in points.positions])]

    with pytest.raises(FloatingPointError, match=r"images \[\[1048, 1049, 1050, 1051\]\]"):
        fit(tmp_path, imaged, 30, poison=range(12, 400))


def test_r08_weights_that_are_not_finite_are_never_saved(tmp_path):
    def spoil(step):
        if step == 5:
            loop_[0].step.modules["main"].weight.data.fill_(float("nan"))

    config = LoopConfig(max_train_steps=9, save_every_steps=1, trackers=(), mixed_precision="no")
    loop_ = []
    refused = pytest.raises(FloatingPointError, match=r"step 5: main-weights: weight is not finite, so nothing was")
    with refused, opened(Run(str(tmp_path), 0, config)) as run:
        loop_.append(Loop(Quadratic(run), OptimConfig(), config, run, 10))
        loop_[0].fit(batches(), (1, spoil))
    assert CheckpointStore(tmp_path / "checkpoints", 1).latest().name == "step-4"


def scaled(folder, steps, scale):
    """Train one module in float32 with float16's loss scaling, which a processor can do too."""
    config = LoopConfig(max_train_steps=40, log_every_steps=1, trackers=(), mixed_precision="no", save_every_steps=1)
    with opened(Run(str(folder), 0, config)) as run:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        step = Quadratic(run)
        del step.modules["other"], step.forwards["other"]
        one = step.losses
        step.losses = lambda batch, global_step: {"main": one(batch, global_step)["main"]}
        step.forwards["other"] = torch.nn.Sequential(torch.nn.Linear(2, 1))
        loop = Loop(step, OptimConfig(learning_rate=0.05), config, run, 10)
        loop.resume()
        with pytest.raises(KeyboardInterrupt):
            loop.fit(batches(), (steps, interrupt))
    return loop


def test_r09_an_overflow_of_float16_skips_the_step_lowers_the_scale_and_is_resumed_exactly(tmp_path):
    loop = scaled(tmp_path / "a", 12, 2.0**126)
    assert 0 < loop.progress.skipped_steps < 8
    assert loop.progress.steps_taken == 12 - loop.progress.skipped_steps
    expected = scaled(tmp_path / "b", 12, 1.0)
    assert len(set(logged_rates(tmp_path / "a"))) == 1
    assert torch.isfinite(loop.step.modules["main"].weight).all()
    scaled(tmp_path / "c", 7, 2.0**126)
    again = scaled(tmp_path / "c", 12, 1.0)  # the scale comes from the checkpoint
    assert again.run.accelerator.scaler.get_scale() == loop.run.accelerator.scaler.get_scale()
    assert torch.equal(again.step.modules["main"].weight, loop.step.modules["main"].weight)
    assert expected.progress.skipped_steps == 0


def test_r09_weights_in_half_precision_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="train float32 weights"):
        Average(torch.nn.Linear(2, 2).half(), exponential(0.9))


def test_r07_no_state_of_a_generator_is_needed_to_resume(tmp_path):
    whole, _, _ = train(tmp_path / "whole", 9)
    with pytest.raises(SystemExit):
        train(
            tmp_path / "again",
            9,
            events=[(4, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)],
        )
    assert not [file for file in tmp_path.rglob("*") if "random" in file.name or "rng" in file.name]
    torch.manual_seed(12345)
    torch.rand(77)
    again, _, _ = train(tmp_path / "again", 9)
    assert torch.equal(weights(again), weights(whole))


@table("missing", ["main-weights", "main-average", "other-optimizer"])
def test_r07_a_checkpoint_without_a_part_is_refused_not_filled_in(missing, tmp_path):
    _, loop, _ = train(tmp_path, 4)
    saved = CheckpointStore.load(loop.store.latest())
    tensors = {name: group for name, group in saved.tensors.items() if name != missing}
    loop.store.save(5, tensors, saved.state)
    with pytest.raises(CheckpointError, match=f"holds no {missing}: it is of another model"):
        train(tmp_path, 9)


def test_r07_a_checkpoint_without_one_tensor_is_refused(tmp_path):
    _, loop, _ = train(tmp_path, 4)
    saved = CheckpointStore.load(loop.store.latest())
    saved.tensors["other-weights"].pop("0.bias")
    loop.store.save(5, saved.tensors, saved.state)
    with pytest.raises(CheckpointError, match=r"only this model has 0\.bias"):
        train(tmp_path, 9)


class Failing(Shades):
    """Images one of which ends, holds up or fails its loader process."""

    def __init__(self, how):
        super().__init__()
        self.how, self.home = how, os.getpid()

    def image(self, index):
        if index == 7 and os.getpid() != self.home:
            match self.how:
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hangs":
                    time.sleep(600)
                case "stands still":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "raises":
                    raise ValueError("image 7: cannot be read")
                case "raises what cannot be sent":
                    raise type("Own", (Exception,), {})("image 7")
        return super().image(index)


def halfway(number, connection, tensor):
    """Write half of a tensor, and send the process a signal."""
    os.write(connection.fileno(), loader._bytes(tensor)[: tensor.nbytes // 2])
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("how", "seconds", "expected"),
    [
        ("dies", 200, "ended with exit code -9"),
        ("hangs", 3, r"No batch came within 3 seconds \(data.timeout_seconds\)"),
        ("stands still", 3, "No batch came within 3 seconds"),
        ("raises", 200, "cannot be read"),
        ("raises what cannot be sent", 200, "ended with exit code 1"),
        ("dies while it hands a batch over", 200, "ended with exit code -9"),
        ("stands still while it hands a batch over", 3, "No batch came within 3 seconds"),
    ],
)
def test_r18_a_loader_process_that_fails_is_an_error_that_names_the_image_in_time(how, seconds, expected, monkeypatch):
    config = DataConfig(image_size=8, held_out_percent=0.0, batch_size=4, workers=2, timeout_seconds=seconds)
    data = PositionDataset(CaptionedImages(Failing(how), config), "train", 0)
    row = 7
    if "hands" in how:
        monkeypatch.setattr(loader, "_write", partial(halfway, signal.SIGKILL if "dies" in how else signal.SIGSTOP))
        row = data.row(3)  # the last of the first batch
    before, began = set(active_children()), time.monotonic()
    stream = training_batches(data, 0)
    with pytest.raises((LoadingError, ValueError), match=expected) as error:
        for _ in range(3):
            next(stream)
    assert time.monotonic() - began < 30
    for process in set(active_children()) - before:
        process.join(timeout=30)
        assert process.exitcode is not None, "what is left would be waited for at the end"
    assert isinstance(error.value, ValueError if how == "raises" else LoadingError)
    assert f"image {row}" in str(error.value)


def test_r18_what_is_named_is_an_image_of_the_stream_that_failed():
    config = DataConfig(image_size=8, held_out_percent=0.0, batch_size=4, workers=2)
    earlier, later = (PositionDataset(CaptionedImages(Shades(), config), "train", seed) for seed in (0, 23))
    assert all(earlier.row(position) != later.row(position) for position in range(36))
    whole = training_batches(earlier, 0)
    next(whole)
    before = set(active_children())
    stream = training_batches(later, 0)
    next(stream), next(stream)
    for process in set(active_children()) - before:
        process.kill()
        process.join(30)
    with pytest.raises(LoadingError) as error:
        next(stream)
    row, position = map(int, re.search(r"image (\d+) \(position (\d+)\)", str(error.value)).groups())
    assert row == later.row(position)
    assert next(whole)[0].positions == [4, 5, 6, 7], "the other stream goes on"


def test_r18_loader_processes_do_not_outlive_a_training_that_is_killed(tmp_path):
    config = DataConfig(image_size=8, held_out_percent=0.0, batch_size=4, workers=3)
    data = PositionDataset(CaptionedImages(Shades(), config), "train", 0)

    def train_on():
        stream = training_batches(data, 0)
        next(stream)
        (tmp_path / "aside").write_text(" ".join(str(process.pid) for process in active_children()))
        (tmp_path / "aside").rename(tmp_path / "loaders")
        time.sleep(60)
        next(stream)

    trainer = get_context("fork").Process(target=train_on)
    trainer.start()
    wait_for(tmp_path / "loaders")
    trainer.kill()
    trainer.join(30)
    loaders = [int(process) for process in (tmp_path / "loaders").read_text().split()]
    assert len(loaders) == config.workers
    try:
        for process in loaders:
            wait_until_gone(process, seconds=10)
    finally:
        for process in loaders:  # one that is left holds this program's output open: whoever reads it would wait
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
