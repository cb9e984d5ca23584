"""Several processes train as one: the same samples, the same losses, and none outlives the others."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertModel

from ldm.errors import ConfigError
from ldm.training.rehearsal import rehearse
from ldm.training.resume_check import differences

from . import trainers
from .test_resume import GAN, STAGE, VAE, parts, space  # noqa: F401 (parts: a fixture)
from .tiny_pipeline import LENGTH, WIDTH, text_encoder, tokenizer
from .trainers import KILLED, ROOT, STEPS, Fault, ended, ledger, metrics, run, saved_step, start_several, wait_for

TIMEOUT_SECONDS = 5


def codes(processes):
    return [ended(process) for process in processes]


@pytest.mark.slow
def test_r04_two_processes_resume_as_two_to_the_bit_and_as_one_with_the_same_samples_and_losses(parts, tmp_path):  # noqa: F811
    arguments = (*STAGE, *space(parts), "--data.workers", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert codes(start_several(2, "train_text2img.py", (*arguments, "--output_dir", whole), tmp_path / "log")) == [0, 0]

    faults = [Fault(trainers.killed, 5, rank=0), Fault(trainers.killed, 5, rank=1)]
    log = tmp_path / "log-killed"
    pair = start_several(2, "train_text2img.py", (*arguments, "--output_dir", killed), log, faults)
    assert codes(pair) == [KILLED, KILLED]
    alone = tmp_path / "alone"
    subprocess.run(["cp", "-r", killed, alone], check=True)

    assert codes(start_several(2, "train_text2img.py", (*arguments, "--output_dir", killed), log)) == [0, 0]
    assert list(differences(whole, killed)) == []
    assert ledger(killed) == ledger(whole)
    assert [len(samples) for samples in ledger(whole).values()] == [8] * STEPS, "4 of each process"

    run("train_text2img.py", (*arguments, "--output_dir", alone), tmp_path / "log-alone")
    assert ledger(alone) == ledger(whole)
    for one, two in zip(metrics(alone), metrics(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    one, two = (
        load_file(folder / "checkpoints" / f"step-{STEPS}" / "denoiser-weights.safetensors")
        for folder in (alone, whole)
    )
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3


@pytest.mark.slow
def test_r04_two_processes_train_the_autoencoder_with_discriminator_as_one_does(tmp_path):
    arguments = (*VAE, "--reconstruction", GAN)
    pair = start_several(2, "train_vae.py", (*arguments, "--output_dir", tmp_path / "two"), tmp_path / "log-two")
    assert codes(pair) == [0, 0]
    run("train_vae.py", (*arguments, "--output_dir", tmp_path / "one"), tmp_path / "log-one")
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        # sums of other order round otherwise, and a discriminator makes more of it with each step
        assert one == pytest.approx(two, rel=1e-4 if one["step"] <= 4 else 3e-3, abs=1e-5)


@pytest.mark.slow
def test_a_bert_that_is_trained_along_and_has_a_pooler_is_trained_by_two_processes(parts, tmp_path):  # noqa: F811
    BertModel(text_encoder("bert").config).save_pretrained(tmp_path / "bert" / "text_encoder")
    tokenizer().save_pretrained(tmp_path / "bert" / "tokenizer")
    text = f"{{pretrained: {tmp_path / 'bert'}, max_length: {LENGTH}}}"
    arguments = (*STAGE, *space(parts), "--conditioners.text", text, "--denoiser.cross_attention_dim", WIDTH)
    arguments = (*arguments, "--loop.max_train_steps", 3, "--output_dir", tmp_path / "run")
    assert codes(start_several(2, "train_text2img.py", arguments, tmp_path / "log")) == [0, 0]
    assert "no keyword uses pooler.dense.weight, pooler.dense.bias: frozen" in (tmp_path / "log-0").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_parameters_that_the_loss_does_not_depend_on_are_found_before_several_processes_wait_for_them(world, caplog):
    model = nn.ModuleDict({"used": nn.Linear(48, 1), "idle": nn.Linear(2, 2)})
    step = SimpleNamespace(
        modules={"denoiser": model},
        forwards={},
        run=SimpleNamespace(attention=nullcontext, accelerator=SimpleNamespace(num_processes=world)),
        losses=lambda batch, global_step: {"denoiser": model["used"](batch.pixel_values.flatten(1)).mean()},
    )
    batch = SimpleNamespace(pixel_values=torch.zeros(2, 3, 4, 4))
    refused = pytest.raises(ConfigError, match="several processes cannot train them: leave them out, or use one")
    with caplog.at_level("INFO"), refused if world > 1 else nullcontext() as error:
        rehearse(step, batch, "denoiser")
    said = str(error.value) if world > 1 else caplog.text
    assert "the loss does not depend on 2 parameters, such as denoiser.idle.weight" in said
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_processes_that_measure_time_plan_the_same_number_of_steps(tmp_path):
    arguments = (
        *VAE,
        "--loop.max_train_steps",
        "null",
        "--loop.max_train_seconds",
        1.5,
        "--loop.validate_every_steps",
        10**6,
    )
    arguments = (*arguments, "--loop.save_every_steps", 10**6, "--output_dir", tmp_path / "run")
    assert codes(start_several(2, "train_vae.py", arguments, tmp_path / "log")) == [0, 0]
    assert saved_step(tmp_path / "run") > 2  # if they had planned others, one would wait for the other in vain


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raises", "is killed", "exits", "is stopped"])
def test_r19_one_process_that_fails_ends_the_training_and_leaves_it_resumable(what, tmp_path):
    do = {
        "raises": trainers.broken,
        "is killed": trainers.killed,
        "exits": trainers.gone,
        "is stopped": trainers.stopped,
    }
    arguments = (*VAE, "--loop.process_timeout_seconds", TIMEOUT_SECONDS, "--output_dir", tmp_path / "run")
    began = time.monotonic()
    main, other = start_several(2, "train_vae.py", arguments, tmp_path / "log", [Fault(do[what], 3, rank=1)])
    assert ended(main, 60) not in (0, None)
    assert time.monotonic() - began < 60
    other.kill()  # as the launcher does
    assert saved_step(tmp_path / "run") == 3
    if what == "is killed":  # the others leave the same checkpoint
        run("train_vae.py", ("--output_dir", tmp_path / "run", *VAE), tmp_path / "log-again")
        assert saved_step(tmp_path / "run") == STEPS


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [(4, None, "process 1 has none"), (None, 4, "process 1 has step-4"), (4, 3, "process 1 has step-3")],
)
def test_r25_processes_that_see_different_checkpoints_end_with_the_reason(first, second, message, tmp_path):
    quick = (*VAE, "--loop.max_train_steps", 4, "--optim.warmup_steps", 1, "--loop.process_timeout_seconds", 60)
    run("train_vae.py", (*quick, "--output_dir", tmp_path / "whole"), tmp_path / "log-whole")
    for name, newest in (("first", first), ("second", second)):
        if newest is not None:
            shutil.copytree(tmp_path / "whole", tmp_path / name)
            shutil.rmtree(tmp_path / name / "checkpoints" / f"step-{7 - newest}")
    own = [("--output_dir", tmp_path / name) for name in ("first", "second")]
    pair = start_several(2, "train_vae.py", (*quick, "--loop.max_train_steps", 6), tmp_path / "log", own=own)
    assert 0 not in codes(pair)
    for rank in (0, 1):
        assert message in Path(f"{tmp_path / 'log'}-{rank}").read_text()


@pytest.mark.parametrize(
    ("do", "ranks", "code"), [(trainers.asked_to_stop, [1], 143), (trainers.interrupted, [0, 1], 130)]
)
def test_r21_r27_a_signal_to_one_process_or_all_stops_both_at_the_same_step(do, ranks, code, tmp_path):
    arguments = (*VAE, "--data.workers", 1, "--loop.save_every_steps", 10**6, "--output_dir", tmp_path / "run")
    faults = [Fault(do, 3, rank=rank) for rank in ranks]
    assert codes(start_several(2, "train_vae.py", arguments, tmp_path / "log", faults)) == [code, code]
    assert saved_step(tmp_path / "run") == 4
    said = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert [text.count("stopped by") for text in said] == [1, 0]
    assert not any("Traceback" in text for text in said)


@pytest.mark.slow
def test_r21_r27_r19_under_torchrun_a_signal_saves_and_a_failure_ends_all(tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    launch = [torchrun, "--nproc_per_node", 2, "--master_port", trainers.free_port(), "train_vae.py"]
    words = [*VAE, "--data.workers", 1, "--loop.max_train_steps", 10**6, "--loop.validate_every_steps", 10**6]
    words += ["--loop.save_every_steps", 10**6, "--output_dir", tmp_path / "run"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    for number in (signal.SIGINT, signal.SIGKILL):
        before = saved_step(tmp_path / "run")
        with (tmp_path / "log").open("w") as log:
            launcher = subprocess.Popen([*map(str, launch + words)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(tmp_path / "run" / "metrics.jsonl", f'"step": {before + 3},', 120)
        pair = children(launcher.pid)
        assert len(pair) == 2
        if number == signal.SIGINT:
            launcher.send_signal(number)
        else:
            os.kill(pair[1], number)
        assert launcher.wait(90) != 0
        end = time.monotonic() + 30
        while any(alive(pid) for pid in pair):
            assert time.monotonic() < end, "a process outlives its launcher"
            time.sleep(0.1)
        if number == signal.SIGINT:
            assert saved_step(tmp_path / "run") >= 3, (tmp_path / "log").read_text()[-2000:]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
