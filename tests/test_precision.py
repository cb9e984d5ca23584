"""The precision of a run: the config's, the checkpoint's, the launcher's, the machine's, in this order."""

import logging
from contextlib import nullcontext

import pytest
import torch

import ldm.machine as machine_module
import ldm.training.precision as precision_module
from ldm.config import LoopConfig, OptimConfig
from ldm.machine import native_precision
from ldm.training.launcher import check_launcher
from ldm.training.loop import Loop
from ldm.training.optim import build_optimizer, flatten_optimizer, restore_optimizer
from ldm.training.precision import LAUNCHED, chosen_precision
from ldm.training.record import RunRecord
from ldm.training.run import Run, opened

from .table import table
from .test_loop import Quadratic, batches


def test_native_precision_is_what_the_device_is_faster_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert native_precision() == "no"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for speed, expected in ((1.5, "bf16"), (0.6, "no")):
        monkeypatch.setattr(machine_module, "bf16_speed", lambda speed=speed: speed)
        assert native_precision() == expected


@table(
    ("wanted", "recorded", "launched", "chosen", "warning"),
    [
        ("auto", None, None, "measured", None),
        ("auto", None, "no", "measured", None),  # the launcher's default says nothing
        ("auto", None, "bf16", "bf16", None),
        ("auto", None, "fp16", "fp16", None),
        ("auto", None, "fp8", "measured", "fp8 is not followed"),
        ("auto", "bf16", None, "bf16", None),
        ("auto", "no", "bf16", "no", "bf16 is not followed: the checkpoint was trained in float32"),
        ("auto", "bf16", "bf16", "bf16", None),
        ("no", None, "bf16", "no", "bf16 is not followed: the config says loop.mixed_precision: no"),
        ("fp16", None, "bf16", "fp16", "bf16 is not followed: the config says loop.mixed_precision: fp16; fp16 is"),
        ("bf16", "no", "no", "bf16", None),  # the record's own comparison refuses it
        ("bf16", None, "bf16", "bf16", None),
    ],
)
def test_r25_auto_keeps_what_the_checkpoint_was_trained_in_and_launch_flags_are_followed_or_said(
    wanted, recorded, launched, chosen, warning, monkeypatch, caplog
):
    monkeypatch.setattr(precision_module, "native_precision", lambda: "measured")
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched:
        monkeypatch.setenv(LAUNCHED, launched)
    with caplog.at_level(logging.WARNING):
        assert chosen_precision(wanted, recorded) == chosen
    assert (warning in caplog.text) if warning else not caplog.records


def test_r25_a_resume_computes_in_the_precision_of_its_checkpoint_whatever_is_measured_now(tmp_path, monkeypatch):
    """Muon's iteration too, which is measured as well."""

    def run(steps, measured):
        monkeypatch.setattr("ldm.training.run.chosen_precision", chosen_precision)
        monkeypatch.setattr(precision_module, "native_precision", lambda: measured)
        monkeypatch.setattr("ldm.training.muon.native_precision", lambda: measured)
        config = LoopConfig(max_train_steps=steps, save_every_steps=1, trackers=(), mixed_precision="auto")
        with opened(Run(str(tmp_path), 0, config)) as run:
            record = RunRecord({"captions": "", "precision": run.precision})
            optim = OptimConfig(optimizer="muon")
            loop = Loop(Quadratic(run), optim, config, run, 10)
            loop.resume(record)
            loop.fit(batches())
            return run.precision, {group["iterate_in"] for group in loop.optimizers["main"].param_groups}

    assert run(2, "no") == ("no", {"no"})
    assert run(4, "bf16") == ("no", {"no"})


@table(
    ("words", "environment", "processes", "error", "warning"),
    [
        ("python accelerate launch --cpu train_vae.py --num_processes 2", {}, 1, None, None),  # the script's own
        ("accelerate launch --cpu --num_processes 2 train_vae.py", {}, 1, "has started one process", None),
        ("accelerate launch --num-processes=2 train_vae.py", {}, 1, "has started one process", None),
        ("accelerate launch --num_processes 2 train_vae.py", {}, 2, None, None),
        ("accelerate launch --gradient_accumulation_steps 4 train_vae.py", {}, 1, None, "steps 4 is not followed"),
        ("accelerate launch --gradient_accumulation_steps 3 train_vae.py", {}, 1, None, None),
        ("torchrun --nproc_per_node 2 train_vae.py", {}, 2, None, None),
        ("accelerate launch train_vae.py", {"ACCELERATE_USE_FSDP": "true"}, 1, "use_fsdp: models are not", None),
        ("accelerate launch train_vae.py", {"ACCELERATE_USE_DEEPSPEED": "true"}, 1, "use_deepspeed: models", None),
    ],
)
def test_launch_flags_that_a_run_does_not_follow_are_said(
    words, environment, processes, error, warning, monkeypatch, caplog
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: "\0".join(words.split()).encode())
    with pytest.raises(RuntimeError, match=error) if error else nullcontext():
        check_launcher(LoopConfig(gradient_accumulation_steps=3), processes)
    assert (warning in caplog.text) if warning else not caplog.records


def test_an_optimiser_of_before_its_iteration_was_recorded_is_resumed(monkeypatch):
    module = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(module.parameters(), OptimConfig(optimizer="muon"))
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tensors, description = flatten_optimizer(optimizer)
    for group in description["groups"]:
        del group["iterate_in"]
    restore_optimizer(optimizer, tensors, description)
    assert optimizer.param_groups[0]["iterate_in"] == native_precision()
