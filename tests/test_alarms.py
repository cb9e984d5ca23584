"""Each alarm is said of the training that has exactly its fault, and none of a training that has none."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_text2img
from ldm.conditioners.text import TextConditioner
from ldm.config import LoopConfig, OptimConfig
from ldm.data.pixels import to_pixel_values
from ldm.objectives.denoising import Objective
from ldm.training import alarms as alarms_module
from ldm.training import loop as loop_module
from ldm.training.alarms import (
    CUT,
    LEARNED,
    NOT_FINITE,
    NULL,
    RATE,
    SCALE,
    STILL,
    TEXT,
    WARMUP,
    Alarms,
    long_warmup,
    skipped_sentence,
)
from ldm.training.optim import update_norms, weights
from ldm.training.progress import Progress

from . import coloured_shapes
from .table import table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder: images, the same with the training captions shuffled, a list of held-out captions, autoencoders."""
    folder = tmp_path_factory.mktemp("shapes")
    for name in ("right", "shuffled"):
        (folder / name).mkdir()
        held_out = coloured_shapes.write_shapes(folder / name)
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")
    metadata = folder / "shuffled" / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    trained = [row for row in rows if row["text"] not in held_out]
    captions = [row["text"] for row in trained]
    random.Random(1).shuffle(captions)
    for row, caption in zip(trained, captions, strict=True):
        row["text"] = caption
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [to_pixel_values(image) for image in coloured_shapes.images(1)]
    for name, scale in (("unit", 1.0), ("small", 0.18215)):
        coloured_shapes.save_autoencoder(folder / name, torch.stack(images), scale)
    coloured_shapes.save_text_encoder(folder / "clip")
    return folder


@pytest.fixture
def train(shapes, tmp_path, monkeypatch):
    """Train on coloured shapes; return the names of the alarms, in their order, and the sentences."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # one: see conftest

    def run(steps, *more, images="right", autoencoder="unit", folder="run"):
        words = {
            "config": "configs/tiny/text2img.yaml",
            "output_dir": tmp_path / folder,
            "space.autoencoder": shapes / autoencoder,
            "data.source": "imagefolder",
            "data.path": shapes / images,
            "data.image_size": coloured_shapes.PIXELS,
            "data.limit": "null",
            "data.held_out": f"{{validation: {shapes / 'held_out.txt'}}}",
            "data.batch_size": 16,
            "denoiser.sample_size": coloured_shapes.PIXELS // 2,
            "loop.mixed_precision": "no",
            "loop.trackers": "[]",
            "loop.max_train_steps": steps,
            "loop.log_every_steps": 2,
            "loop.validate_every_steps": 20,
            "loop.save_every_steps": 1000,
            "validation.num_images": 1,
            "validation.num_inference_steps": 1,
            "validation.loss_images": 60,
            **dict(more),
        }
        arguments = [str(word) for key, value in words.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["train", *arguments])
        train_text2img.main()
        return said(tmp_path / folder)

    return run


def said(folder):
    """Return the alarms of a training, name and sentence."""
    file = folder / "alarms.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["alarm"], row["sentence"]) for row in rows]


@pytest.fixture
def impatient(monkeypatch):
    """Ask after 320 images whether text is used, so that a short training is told, or wrongly told."""
    monkeypatch.setattr(alarms_module, "IMAGES", (320, 100_000))
    monkeypatch.setattr(alarms_module, "EPOCHS", 0)


FAST = ("objective", "{path: cosine, prediction_type: v_prediction}"), ("optim.optimizer", "muon")

# ---- a fault, and its alarm ----


@pytest.mark.slow
def test_shuffled_captions_leave_the_text_unused(train, impatient):
    ((name, sentence),) = train(60, *FAST, images="shuffled")
    assert name == TEXT
    assert re.search(r"conditional gain -?0\.000\d \+- 0\.000\d of a loss of 0\.\d+ after [46]0 steps", sentence)


def test_latents_of_another_scale(train):
    ((name, sentence),) = train(4, ("optim.warmup_steps", 1), autoencoder="small")
    assert name == SCALE
    assert "std 0.1" in sentence


@pytest.mark.parametrize("how", ["frozen", "no rate"])
def test_a_denoiser_that_stands_still(train, monkeypatch, how):
    class Still(loop_module.Loop):
        def __init__(self, step, *more):
            denoiser = step.stage.model.denoiser.requires_grad_(how != "frozen")
            for parameter in denoiser.parameters():  # those that start at 0 would let no gradient reach the text
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
            super().__init__(step, *more)

        def _take_step(self, micro_batches):
            if how == "no rate":
                denoiser = {id(parameter) for parameter in self.step.modules["denoiser"].denoiser.parameters()}
                for group in self.optimizers["denoiser"].param_groups:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in denoiser]
            return super()._take_step(micro_batches)

    monkeypatch.setattr("ldm.recipes.recipe.Loop", Still)
    ((name, sentence),) = train(4, ("optim.warmup_steps", 1))
    assert name == STILL
    assert "other parts moved" in sentence


def test_a_null_that_the_pipeline_does_not_use(train, monkeypatch):
    tokenize = TextConditioner.tokenize
    monkeypatch.setattr(TextConditioner, "tokenize", lambda self, some: tokenize(self, [c or "nothing" for c in some]))
    ((name, sentence),) = train(4, ("optim.warmup_steps", 1))
    assert name == NULL
    assert "differ by" in sentence


def test_a_null_that_is_never_trained(train):
    none = ("conditioners.text.dropout", 0), ("optim.warmup_steps", 1)
    ((name, sentence),) = train(4, *none)
    assert name == NULL
    assert "guidance_scale is 3" in sentence
    assert train(4, *none, ("validation.guidance_scale", 1), folder="unguided") == []


def test_a_rate_of_zero(train, monkeypatch):
    monkeypatch.setattr(loop_module, "learning_rate", lambda *_: 0.0)
    ((name, sentence),) = train(6, ("optim.warmup_steps", 1))
    assert name == RATE
    assert "at step 4" in sentence


def test_a_warm_up_that_training_never_leaves(train):
    ((name, sentence),) = train(4, ("optim.warmup_steps", 1000), ("optim.decay", "constant"))
    assert name == WARMUP
    assert "4 of 1,000 steps of warm-up, at 0.4%" in sentence


def test_a_loss_that_is_infinite_near_the_image(train, monkeypatch):
    weight = Objective.weight

    def infinite(self, alpha, sigma):
        return torch.where(sigma < 0.12, torch.inf, weight(self, alpha, sigma))

    monkeypatch.setattr(Objective, "weight", infinite)
    ((name, sentence),) = train(
        12, ("optim.warmup_steps", 1), ("loop.validate_every_steps", 1000), ("data.batch_size", 8)
    )
    assert name == NOT_FINITE
    low, high = (float(sentence.partition("noise levels from ")[2].split()[place]) for place in (0, 2))
    assert 0 < low <= high <= 0.12


def test_captions_that_are_cut(train):
    ((name, sentence),) = train(4, ("optim.warmup_steps", 1), ("conditioners.text.max_length", 3))
    assert name == CUT
    assert "100% of the training captions" in sentence


# ---- no fault, no alarm ----

HEALTHY = {
    "flow": [],
    "another seed, a warm-up, no decay": [("seed", 1), ("optim.warmup_steps", 20), ("optim.decay", "constant")],
    "epsilon": [("objective", "{path: scaled_linear, prediction_type: epsilon}")],
    "v, muon": FAST,
    "frozen text": [
        *FAST,
        ("conditioners.text.pretrained", "CLIP"),
        ("conditioners.text.encoder", "{}"),
        ("conditioners.text.max_length", coloured_shapes.TOKENS),
        ("conditioners.text.train", "false"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_trainings_raise_no_alarm(train, impatient, shapes, tmp_path, name):
    more = [(key, shapes / "clip" if value == "CLIP" else value) for key, value in HEALTHY[name]]
    assert train(40, *more) == []
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "conditional_gain/mean" in row][-1]
    used = measured["conditional_gain/mean"] > 2 * measured["conditional_gain/standard_error"]
    assert used or measured["explained_share"] < LEARNED, "quiet because it is healthy, or too young to be asked"
    assert used or name == "epsilon"
    assert measured["captions/cut"] == 0
    assert abs(measured["latents/std"] - 1) < 0.1


# ---- the rules, on series of metrics ----


def series(gain, error, steps, loss=1.0, explained=0.5):
    """Return rows of validations, the same measures at each of these steps."""
    return [
        (
            step,
            {
                "conditional_gain/mean": gain,
                "conditional_gain/standard_error": error,
                "validation/loss": loss,
                "explained_share": explained,
            },
        )
        for step in steps
    ]


def heard(rows, *, epoch=1000, batch_size=100, total=1000, levels=(), scaler=None, **optim):
    """Return the names of the alarms that these rows raise."""
    names, progress = [], Progress(total_steps=total)
    run = SimpleNamespace(
        accelerator=SimpleNamespace(scaler=scaler),
        config=LoopConfig(),
        log_alarm=lambda name, sentence, step: names.append((name, step)),
    )
    alarms = Alarms(run, progress, OptimConfig(**optim), epoch, lambda: list(levels))
    for step, row in rows:
        progress.global_step, progress.images = step, step * batch_size
        alarms(row, step)
    return names


@table(
    ("rows", "expected"),
    [
        (series(0.0001, 0.001, (100, 200, 300)), [(TEXT, 200)]),
        (series(0.0, 0.0, (100, 200)), [(TEXT, 200)]),
        (series(-0.003, 0.001, (100, 200)), [(TEXT, 200)]),
        (series(0.0021, 0.001, (100, 200, 300)), []),  # little, but surely above 0
        (series(0.01, 0.01, (100, 200, 300)), []),  # too few images to tell
        (series(0.0001, 0.001, (100, 200, 300), explained=0.05), []),  # nothing is learned yet
        (series(0.0001, 0.001, (10, 20, 30)), []),  # before four epochs
        (series(0.0001, 0.001, (200,)), []),  # once is chance
        (series(0.0001, 0.001, (100,)) + series(0.01, 0.001, (200,)) + series(0.0001, 0.001, (300,)), []),
        (series(0.0001, 0.001, (100, 200), loss=0.05), []),  # as large as the loss allows to say
    ],
)
def test_text_is_unused_only_if_that_is_certain(rows, expected):
    assert heard(rows) == expected


def test_a_text_is_given_time_by_images_epochs_warm_up_and_length():
    rows = series(0.0, 0.001, range(10, 1010, 10))
    assert heard(rows, epoch=20) == [(TEXT, 110)]  # a tenth of the training
    assert heard(rows, epoch=20, total=None) == [(TEXT, 30)]  # 2,000 images
    assert heard(rows, epoch=10_000) == [(TEXT, 410)]  # four epochs
    assert heard(rows, epoch=10**9, batch_size=1000) == [(TEXT, 110)]  # 100,000 images
    assert heard(rows, epoch=20, warmup_steps=500) == [(TEXT, 510)]


def logged(step, rate, moved=0.01, others=0.01):
    names = {"update_norm/denoiser.denoiser": moved, "update_norm/denoiser.conditioners": others}
    return step, {"learning_rate": rate, **names}


def test_what_another_alarm_explains_is_not_said():
    unused = series(0.0, 0.001, (100, 200, 300))
    none = [logged(10, 0.0, 0.0, 0.0), logged(20, 0.0, 0.0, 0.0)]
    assert heard(none + unused) == [(RATE, 20)]
    assert heard([logged(10, 1e-4, 0.0), *unused]) == [(STILL, 10)]
    assert heard([logged(10, 1e-4), *unused]) == [(TEXT, 200)]


def test_a_rate_of_zero_at_the_end_of_a_decay_is_none():
    assert heard([logged(10, 1e-4), logged(20, 0.0, 0.0, 0.0)]) == []
    optim = OptimConfig(warmup_steps=100)
    assert long_warmup(optim, 10) is None
    assert "9 of 100 steps" in long_warmup(optim, 9)
    assert long_warmup(optim, None) is None


def test_skipped_steps_are_said_when_they_are_many():
    def skipped(*steps, finite=False):
        return [(step, {"skipped_steps": n, "finite_loss": float(finite)}) for n, step in enumerate(steps, 1)]

    assert heard(skipped(5, 6), levels=[0.1]) == []
    assert heard(skipped(5, 6, 7), levels=[0.1]) == [(NOT_FINITE, 7)]
    assert heard(skipped(1000, 2000, 3000), levels=[0.1]) == []  # one of a thousand
    assert heard(skipped(5, 6, 7, finite=True)) == [(NOT_FINITE, 7)]  # gradients alone
    assert heard(skipped(5, 6, 7, finite=True), scaler=object()) == []  # float16 looks for its scale
    assert heard(skipped(5, 6, 7), scaler=object()) == [(NOT_FINITE, 7)]


@table(
    ("finite", "levels", "said", "unsaid"),
    [
        (True, [], "their losses are finite, their gradients are not; what", ["objective", "images"]),
        (False, [], "the loss is not finite; what", ["objective", "gradients"]),
        (False, [0.2, 0.1], "the loss is not finite at noise levels from 0.10 to 0.20", ["gradients"]),
    ],
)
def test_a_skipped_step_is_explained_by_what_was_not_finite(finite, levels, said, unsaid):
    sentence = skipped_sentence(3, 7, finite, levels)
    assert said in sentence
    assert not any(word in sentence for word in unsaid)


def test_the_relative_update_of_each_part_is_that_of_its_weights():
    module = nn.ModuleDict(
        {"moved": nn.Linear(2, 2), "frozen": nn.Linear(2, 2).requires_grad_(False), "plain": nn.ReLU()}
    )
    norms = {}
    for name, one in {"one": module, "other": nn.Linear(1, 1, bias=False)}.items():
        before = weights(name, one)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.25)
        norms |= {part: float(value) for part, value in update_norms(name, one, before).items()}
    assert norms == pytest.approx({"update_norm/one.moved": 0.25, "update_norm/one.frozen": 0, "update_norm/other": 0})
