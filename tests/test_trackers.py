"""What trackers are told: metrics and images at their steps, the name of the run, and no place on this machine."""

import io
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.config import LoopConfig
from ldm.training.run import Run, opened
from ldm.training.trackers import WANDB_SETTINGS

ALL = LoopConfig(trackers=("tensorboard", "wandb", "trackio"), mixed_precision="no")


class FakePackage(ModuleType):
    """What accelerate and ldm use of wandb and of trackio: both have these names."""

    class Image:
        def __init__(self, image):
            self.image = image

    def __init__(self, name):
        super().__init__(name)
        self.rows = []
        self.started = None
        self.finished = False

    def init(self, **settings):
        self.started = settings
        return self

    def log(self, values, step=None):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def packages(monkeypatch):
    fakes = {name: FakePackage(name) for name in ("wandb", "trackio")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType(name) for name in ALL.trackers])
    return fakes


def random_image(mode="RGB"):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, len(mode)), dtype=np.uint8))


@contextmanager
def start(folder, config=ALL):
    with opened(Run(str(folder), 0, config)) as run:
        torch.set_num_threads(1)
        yield run


def test_metrics_and_images_reach_every_tracker_at_their_steps(packages, tmp_path):
    with start(tmp_path / "run") as run:
        run.log_metrics({"loss/denoiser": 0.5}, 10)
        run.log_image("samples", random_image(), 10)
        run.log_metrics({"loss/denoiser": 0.25}, 20)
    for package in packages.values():
        steps, values = zip(*package.rows, strict=True)
        assert steps == (10, 10, 20)
        assert values[::2] == ({"loss/denoiser": 0.5}, {"loss/denoiser": 0.25})
        assert values[1].keys() == {"samples"}
        assert values[1]["samples"].image.tobytes() == random_image().tobytes()
        assert package.finished
    (events,) = (tmp_path / "run" / "logs").rglob("events*localhost*")
    written = EventAccumulator(str(events.parent)).Reload()
    assert [(event.step, event.value) for event in written.Scalars("loss/denoiser")] == [(10, 0.5), (20, 0.25)]
    (logged,) = written.Images("samples")
    assert logged.step == 10
    assert Image.open(io.BytesIO(logged.encoded_image_string)).tobytes() == random_image().tobytes()


def test_an_image_with_alpha_is_logged_too(packages, tmp_path):
    with start(tmp_path / "run") as run:
        run.log_image("samples", random_image("RGBA"), 0)
    assert packages["wandb"].rows[0][1]["samples"].image.mode == "RGBA"
    assert Image.open(tmp_path / "run" / "samples" / "step-0000000.png").tobytes() == random_image("RGBA").tobytes()


def test_s03_trackers_are_told_the_name_of_the_run_and_no_absolute_path(packages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with start("out/my-run"):
        pass
    assert packages["wandb"].started == {
        "project": "ldm", "name": "my-run", "dir": "out/my-run", "settings": WANDB_SETTINGS,
    }  # fmt: skip
    assert packages["trackio"].started == {"project": "ldm", "name": "my-run"}


def test_a_missing_tracker_says_what_to_install_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(
        ImportError, match=r"loop\.trackers: wandb and trackio not installed; pip install wandb trackio"
    ):
        Run(str(tmp_path / "run"), 0, ALL)
    assert not (tmp_path / "run").exists()
    with start(tmp_path / "run", replace(ALL, trackers=("tensorboard",))):
        assert (tmp_path / "run" / "logs").is_dir()
