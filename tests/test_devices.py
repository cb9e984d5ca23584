"""Training, validation, saving, sampling where the device is not the one that tensors are made on: as with a GPU."""

import functools
import multiprocessing
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState

import train_text2img
import train_vae
from ldm.commands import cli
from ldm.config import LoopConfig, StageConfig
from ldm.config.file import load_config
from ldm.doctor import cost, overfit
from ldm.stage import build_stage
from ldm.training.run import Run
from ldm.training.steps import DiffusionStep

from .test_network import CAPTIONS
from .test_ten_stages import NAMES, batch, images
from .tiny_stages import save_parts, stages

ROOT = Path(__file__).parent.parent


def moved(task, pipe):
    """Run `task` where the run's device is another one, and send what it returns, or what went wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "elsewhere:0")
        patch.chdir(ROOT)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            from .elsewhere import Elsewhere

            with Elsewhere():
                pipe.send((task(), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


def elsewhere(task):
    """Return what `task` returns in a process of its own, whose runs are on another device."""
    fresh = multiprocessing.get_context("spawn")  # after a backward pass torch wants to know of no other device
    here, there = fresh.Pipe()
    process = fresh.Process(target=moved, args=(task, there))
    process.start()
    there.close()
    result, wrong = here.recv()
    process.join()
    assert wrong is None, wrong
    return result


def losses(parts, folder):
    """Return the device, the training loss and the held-out losses of every system's stage."""
    run = Run(str(folder), 0, LoopConfig(trackers=(), mixed_precision="no"))
    torch.set_num_threads(1)
    found = {}
    for name in NAMES:
        file = folder / "stage.yaml"
        file.write_text(yaml.safe_dump({"output_dir": "out", **stages(parts)[name]}))
        stage = build_stage(load_config(StageConfig, ["--config", str(file)]), CAPTIONS, lambda: images(range(40)))
        step = DiffusionStep(stage, run, 0.99)
        loss = step.losses(batch(name=name), 0)["denoiser"]
        loss.backward()
        gradient = sum(float(p.grad.square().sum()) for p in stage.model.parameters() if p.grad is not None)
        found[name] = [
            float(loss.detach()),
            gradient,
            *step.held_out_losses(batch(name=name), (0.3, 0.8)).flatten().tolist(),
        ]
    return run.device.type, found


@pytest.mark.slow
def test_every_systems_losses_and_gradients_are_those_of_the_processor(tmp_path):
    save_parts(tmp_path)
    device, moved_losses = elsewhere(functools.partial(losses, tmp_path, tmp_path))
    assert device == "elsewhere"
    device, own = losses(tmp_path, tmp_path)
    assert device == "cpu"
    for name in NAMES:
        assert moved_losses[name] == pytest.approx(own[name], rel=1e-4), name


def call(main, *words):
    sys.argv = ["command", *map(str, words)]
    main()


def train_and_sample(folder):
    """Train an autoencoder and a stage for a few steps, resume the stage, look at it with the doctor, and draw."""
    assert PartialState().device.type == "elsewhere"
    more = ("--loop.mixed_precision", "no", "--loop.trackers", "[]", "--validation.num_images", 2)
    vae, model = folder / "vae", folder / "text2img"
    call(train_vae.main, "--config", "configs/tiny/vae.yaml", "--output_dir", vae, "--loop.max_train_steps", 6, *more)
    stage = ("--config", "configs/tiny/text2img.yaml", "--space.autoencoder", vae / "model", "--output_dir", model)
    short = ("--loop.max_train_steps", 8, "--loop.save_every_steps", 4, "--snapshot_every_steps", 4)
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:  # two steps overfit nothing
        patch.setattr(overfit, "MAX_STEPS", 2)
        patch.setattr(cost, "MEASURED_SECONDS", 0.1)
        call(train_text2img.main, *stage, *more, *short, "--doctor")
    for last in (6, 8):
        changed = ("--allow_config_change", "true", "--loop.max_train_steps", last)
        call(train_text2img.main, *stage, *more, *short, *changed)
    call(cli.main, "sample", "a cat", "--model", model / "model", "--out", folder, "--num_inference_steps", 2)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.slow
def test_the_commands_train_validate_save_resume_and_sample(tmp_path):
    written = elsewhere(functools.partial(train_and_sample, tmp_path))
    assert {"a-cat-0.png", "text2img/doctor/report.json", "text2img/model/model_index.json"} <= set(written)
    assert "text2img/checkpoints/step-8/manifest.json" in written
