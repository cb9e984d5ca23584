"""Snapshots during a training, and the model folder that is made of them afterwards."""

import json
import logging
import shutil
from dataclasses import asdict
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel

from ldm.commands import cli
from ldm.conditioners.text import TextConditioner
from ldm.config import LoopConfig, OptimConfig
from ldm.evaluation.measure import Measure
from ldm.evaluation.report import Report, Row, Section
from ldm.export.card import CARD, write_card
from ldm.export.evaluation_card import merge_into_card
from ldm.export.folder import averaged_model
from ldm.models.pipeline import load_pipeline
from ldm.models.provenance import read_provenance
from ldm.stage import ConditionedDenoiser
from ldm.training.averages import Average, power_function
from ldm.training.loop import Loop
from ldm.training.posthoc import averaged_weights
from ldm.training.run import Run, opened
from ldm.training.signals import StopSignals
from ldm.training.snapshots import Snapshots, read_snapshots, read_tensors
from tests.test_card import RECORD, stage, worded
from tests.test_loop import Points
from tests.tiny_pipeline import pipeline, text_encoder, tokenizer, unet

from .table import table

STORED = (0.05, 0.1)
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


class Regression:
    """A small network that learns a sine from noise, with averages of every length."""

    def __init__(self, run, sigma_rels):
        torch.manual_seed(0)
        self.modules = {"main": nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))}
        self.forwards = {"main": run.prepare(self.modules["main"])}
        self.by_length = {value: Average(self.modules["main"], power_function(value)) for value in sigma_rels}
        self.averages = {f"main-{value}": average for value, average in self.by_length.items()}
        self.memory = {}
        self.poison = ()

    def after_step(self):
        pass

    def losses(self, batch, global_step):
        draw = torch.Generator().manual_seed(global_step)
        x = 6 * torch.rand(16, 1, generator=draw) - 3
        target = x.sin() + 0.3 * torch.randn(16, 1, generator=draw)
        loss = (self.forwards["main"](x) - target).square().mean()
        return {"main": loss * (float("nan") if global_step in self.poison else 1)}


def batches(start_step, **share):
    for step in count(start_step):
        yield [Points([step])]


def train(folder, steps, every_steps, sigma_rels=STORED, stored=STORED, poison=(), stop=None):
    """Train to `steps`, or as if killed after `stop`; save every 10 steps."""
    settings = {"max_train_steps": steps, "log_every_steps": 1000, "save_every_steps": 10}
    config = LoopConfig(**settings, trackers=(), mixed_precision="no")

    def until(start_step, **share):
        for step, batch in enumerate(batches(start_step), start_step):
            if step == stop:
                raise KeyboardInterrupt
            yield batch

    with opened(Run(str(folder), 0, config)) as run:
        step = Regression(run, sigma_rels)
        step.poison = poison
        loop = Loop(step, OptimConfig(learning_rate=0.01), config, run, 10)
        loop.resume()
        event = Snapshots(run, loop.progress, {value: step.by_length[value] for value in stored})
        event.forget_later()
        try:
            loop.fit(until, (every_steps, event))
        except KeyboardInterrupt:
            assert loop.progress.global_step == stop
    return step


def names(folder):
    return sorted(path.name for path in (folder / "snapshots").iterdir())


def flat(tensors):
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def test_a_real_training_is_averaged_afterwards_as_if_it_had_been_on_the_way(tmp_path):
    """Errors relative to how far the average is from the nearest that was stored."""
    lengths = (0.07, 0.15, 0.2)
    step = train(tmp_path, 200, 5, (*STORED, *lengths))
    final = {length: flat(average.module.state_dict()) for length, average in step.by_length.items()}
    stored = read_snapshots(tmp_path)
    assert len(stored) == 2 * 40
    for every_steps, most in ((25, 0.1), (10, 0.015), (5, 0.003)):
        fewer = [one for one in stored if one.global_step % every_steps == 0]
        for length in lengths:
            distance = min(float((final[one] - final[length]).norm()) for one in STORED)
            error = float((flat(averaged_weights(fewer, length)) - final[length]).norm())
            assert error < most * distance, (every_steps, length)
        for length in STORED:
            assert torch.equal(flat(averaged_weights(fewer, length)), final[length])


def test_r04_power_averages_and_snapshots_of_a_killed_training_are_those_of_one_that_was_not(tmp_path):
    whole = train(tmp_path / "whole", 40, 5)
    for stop in (13, 29):
        train(tmp_path / "killed", 40, 5, stop=stop)
    killed = train(tmp_path / "killed", 40, 5)
    for sigma_rel in STORED:
        one, two = (step.by_length[sigma_rel].module.state_dict() for step in (whole, killed))
        assert torch.equal(flat(one), flat(two))
    assert names(tmp_path / "whole") == names(tmp_path / "killed")
    for one, two in zip(read_snapshots(tmp_path / "whole"), read_snapshots(tmp_path / "killed"), strict=True):
        assert torch.equal(flat(read_tensors(one)), flat(read_tensors(two)))


def test_snapshots_of_steps_that_are_taken_again_are_gone_before_they_are(tmp_path):
    train(tmp_path, 40, 6, stop=29)  # the checkpoint is of step 20
    for half in (".tmp-step-0000030-0.05.safetensors", "0123.tmp"):
        (tmp_path / "snapshots" / half).write_text("half")
    assert names(tmp_path)[-2:] == ["step-0000024-0.05.safetensors", "step-0000024-0.1.safetensors"]
    train(tmp_path, 40, 10)
    assert [one.global_step for one in read_snapshots(tmp_path)] == [6, 6, 12, 12, 18, 18, 30, 30, 40, 40]
    assert not [name for name in names(tmp_path) if "tmp" in name]


def test_the_last_step_has_a_snapshot_and_skipped_steps_are_not_counted(tmp_path):
    step = train(tmp_path, 25, 10, poison=(3, 11, 12))
    stored = read_snapshots(tmp_path)
    assert [(one.global_step, one.steps_taken) for one in stored[::2]] == [(10, 9), (20, 17), (25, 22)]
    assert [one.sigma_rel for one in stored] == [*STORED] * 3
    assert names(tmp_path)[0] == "step-0000010-0.05.safetensors"
    assert torch.equal(flat(read_tensors(stored[-1])), flat(step.by_length[0.1].module.state_dict()))


def test_before_any_weight_has_changed_there_is_nothing_to_keep(tmp_path):
    train(tmp_path, 4, 2, poison=(0, 1))
    assert [one.global_step for one in read_snapshots(tmp_path)] == [4, 4]


def test_none_are_kept_unless_asked_for(tmp_path):
    train(tmp_path, 4, None)
    assert not (tmp_path / "snapshots").exists()
    with pytest.raises(ValueError, match=r"holds no snapshots: .* if snapshot_every_steps is set"):
        read_snapshots(tmp_path)


def test_averages_that_begin_in_the_middle_are_refused(tmp_path):
    train(tmp_path, 10, 5, sigma_rels=(0.05,), stored=(0.05,))
    with pytest.raises(RuntimeError, match=r"holds no main-0\.1-average: .*snapshot_sigma_rels"):
        train(tmp_path, 20, 5)
    train(tmp_path, 20, None, sigma_rels=(), stored=())  # while they may end


def test_r17_a_full_disk_costs_snapshots_and_no_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    run = SimpleNamespace(folder=tmp_path, is_main=True, stop=StopSignals())
    module = nn.Linear(30, 30)
    progress = SimpleNamespace(global_step=7, steps_taken=7)
    snapshots = Snapshots(run, progress, {0.05: Average(module, power_function(0.05))})
    with caplog.at_level(logging.WARNING):
        snapshots(7)
    assert "step-0000007-0.05.safetensors, which needs 4242 bytes, was not written" in caplog.text
    assert "1000 bytes are free. Training goes on" in caplog.text
    assert list((tmp_path / "snapshots").iterdir()) == []
    monkeypatch.undo()
    snapshots(7)
    assert (tmp_path / "snapshots" / "step-0000007-0.05.safetensors").stat().st_size <= 4242


def test_tied_and_strided_weights_are_written(tmp_path):
    strided = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), strided)
    module[1].weight = module[0].weight
    progress = SimpleNamespace(global_step=1, steps_taken=1)
    run = SimpleNamespace(folder=tmp_path, is_main=True, stop=StopSignals())
    average = Average(module, power_function(0.05))
    Snapshots(run, progress, {0.05: average})(1)
    found = read_tensors(read_snapshots(tmp_path)[0])
    assert torch.equal(found["0.weight"], average.module[0].weight)
    assert torch.equal(found["1.weight"], average.module[0].weight)
    assert torch.equal(found["2.weight"], average.module[2].weight)


@table("bad", ["cut", "foreign"])
def test_a_file_that_is_no_snapshot_is_named(bad, tmp_path):
    train(tmp_path, 4, 2)
    path = tmp_path / "snapshots" / "step-0000002-0.1.safetensors"
    if bad == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"step-0000002-0\.1\.safetensors is no snapshot"):
        read_snapshots(tmp_path)


@pytest.fixture
def run(tmp_path):
    """A finished run: a model folder, and snapshots of a text-to-image stage whose weights wandered."""
    pipeline().save_pretrained(tmp_path / "model")
    RECORD.save(tmp_path / "model")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 40, "validation/loss": 1.25}) + "\n")
    write_card(tmp_path / "model", tmp_path, *worded(stage("--output_dir", str(tmp_path))), RECORD)
    return tmp_path


def wander(folder, train_text=True, steps=40):
    """Write snapshots of a stage into the run's folder; return the averages at its end."""
    text = TextConditioner(text_encoder(), tokenizer(), train=train_text, dropout=0.1)
    model = ConditionedDenoiser(unet(), {"text": text})
    averages = {value: Average(model, power_function(value)) for value in (*STORED, 0.08)}
    progress = SimpleNamespace(global_step=0, steps_taken=0)
    main = SimpleNamespace(folder=folder, is_main=True, stop=StopSignals())
    keep = Snapshots(main, progress, {value: averages[value] for value in STORED})
    for step in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        for average in averages.values():
            average.update(step)
        progress.global_step = progress.steps_taken = step + 1
        if progress.global_step % 5 == 0:
            keep(progress.global_step)
    return averages


def weights_of(folder):
    return {part: load_file(next((folder / part).glob("*.safetensors"))) for part in ("unet", "text_encoder", "vae")}


def test_the_averaged_model_is_the_model_with_those_weights_in_denoiser_and_text_encoder(run):
    average = wander(run)[0.05].module
    cli.main(["average", str(run), "--sigma_rel", "0.05"])
    before, after = weights_of(run / "model"), weights_of(run / "model-0.05")
    parts = {"unet": average.denoiser, "text_encoder": average.conditioners["text"].text_encoder}
    for part, network in parts.items():
        now = network.state_dict()
        assert after[part].keys() == before[part].keys()
        assert all(torch.equal(tensor, now[name]) for name, tensor in after[part].items())
        assert not any(torch.equal(tensor, before[part][name]) for name, tensor in after[part].items())
    assert all(torch.equal(tensor, before["vae"][name]) for name, tensor in after["vae"].items())
    files = [sorted(path.relative_to(one) for path in one.rglob("*")) for one in (run / "model", run / "model-0.05")]
    assert files[0] == files[1]
    assert load_pipeline(str(run / "model-0.05"), False)("a cat", num_inference_steps=1).images[0]


def test_several_lengths_are_several_folders_near_what_was_tracked(run):
    expected = wander(run)[0.08].module.denoiser.state_dict()
    cli.main(["average", str(run), "--sigma_rel", "0.08,0.1"])
    found, other = (flat(weights_of(run / f"model-{value}")["unet"]) for value in (0.08, 0.1))
    wanted = flat(expected)
    assert float((found - wanted).norm()) < 0.05 * float((other - wanted).norm())


def test_a_frozen_text_encoder_stays_what_it_is(run):
    wander(run, train_text=False)
    after = weights_of(averaged_model(run, 0.1, run / "other"))
    before = weights_of(run / "model")
    assert all(torch.equal(tensor, before["text_encoder"][name]) for name, tensor in after["text_encoder"].items())
    assert not torch.equal(flat(after["unet"]), flat(before["unet"]))


def test_what_no_keyword_uses_of_a_trained_text_encoder_stays_what_it_is(run, monkeypatch):
    bert = BertModel(text_encoder("bert").config)  # with the pooler
    bert.save_pretrained(run / "model" / "text_encoder")
    before = weights_of(run / "model")["text_encoder"]
    monkeypatch.setitem(globals(), "text_encoder", lambda: bert)
    wander(run)
    oldest = read_snapshots(run)[0].path  # as version 0.1.0 would have written it
    old = load_file(oldest) | {f"conditioners.text.text_encoder.{name}": before[name] for name in POOLER}
    save_file(old, oldest, {"global_step": "5", "steps_taken": "5", "sigma_rel": "0.05"})
    after = weights_of(averaged_model(run, 0.1, run / "other"))["text_encoder"]
    assert after.keys() == before.keys()
    assert {name for name in after if torch.equal(after[name], before[name])} == POOLER


def test_record_and_card_say_which_weights_these_are(run):
    wander(run)
    row = Row("R@1", Measure(0.5, 0.4, 0.6, 10), "higher", {})
    merge_into_card(run / "model", Report("Evaluation", "model", {}, [Section("Retrieval of others", "", [row])]))
    folder = averaged_model(run, 0.08, run / "other")
    assert asdict(read_provenance(folder)) == asdict(RECORD) | {"sigma_rel": 0.08, "global_step": 40}
    card, before = ((one / CARD).read_text() for one in (folder, run / "model"))
    assert 'model = "other"' in card
    assert "average whose standard deviation is 0.08 of the training" in card
    assert "model-index" in before
    assert "Retrieval of others" in before
    assert "Retrieval of others" not in card, "an evaluation of the other weights"
    assert "model-index" not in card, "the Hub would show numbers of other weights"
    assert card.index("## Which weights") < card.index("## How good it is") < card.index("| loss | 1.25 |")


def test_what_cannot_be_made_is_refused_and_leaves_nothing(run):
    with pytest.raises(SystemExit, match="holds no snapshots"):
        cli.main(["average", str(run), "--sigma_rel", "0.08"])
    wander(run)
    refusals = {
        ("0.08", "model"): "model is there already",
        ("0.001", "other"): "cannot be made of 16 snapshots",
        ("long", "other"): "sigma_rel: got 'long'; expected numbers separated by commas",
        ("0.05,0.1", "other"): "to: got one folder for 2 lengths",
    }
    for (sigma_rel, to), message in refusals.items():
        with pytest.raises(SystemExit, match=message):
            cli.main(["average", str(run), "--sigma_rel", sigma_rel, "--to", str(run / to)])
    with pytest.raises(SystemExit, match="cannot be made of 16 snapshots"):
        cli.main(["average", str(run), "--sigma_rel", "0.05,0.001"])
    assert not (run / "model-0.05").exists(), "all lengths or none, so that the command can be said again"
    RECORD.save(run)  # of no model: a folder above it
    with pytest.raises(ValueError, match="holds no model: name the output_dir of a finished"):
        averaged_model(run / "elsewhere" / "deeper", 0.05, run / "other")
    pipeline(unet=unet(layers_per_block=2)).save_pretrained(run / "model")
    with pytest.raises(ValueError, match=r"unet: the snapshots hold no .* of another network than the model"):
        averaged_model(run, 0.05, run / "other")
    assert not (run / "other").exists()
    assert not list(run.glob(".tmp-*"))


def test_a_model_older_than_its_snapshots_is_averaged_at_its_own_step(run):
    wander(run, steps=60)
    stored = [one for one in read_snapshots(run) if one.global_step <= RECORD.global_step]
    expected = averaged_weights(stored, 0.08)
    folder = averaged_model(run, 0.08, run / "other")
    assert read_provenance(folder).global_step == RECORD.global_step == 40
    name, tensor = next(iter(load_file(next((folder / "unet").glob("*.safetensors"))).items()))
    assert torch.equal(tensor, expected[f"denoiser.{name}"])
    for one in stored:
        one.path.unlink()
    with pytest.raises(ValueError, match="model is of step 40, before the first snapshot"):
        averaged_model(run, 0.08, run / "another")
