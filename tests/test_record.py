"""What a resumed run may do differently, and what it may not."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.config import (
    AutoencoderConfig,
    DataConfig,
    DoctorConfig,
    LoopConfig,
    OptimConfig,
    StageConfig,
    ValidationConfig,
)
from ldm.config.places import portable
from ldm.data.batches import CaptionedImages
from ldm.errors import ConfigError
from ldm.training.checkpoint import Checkpoint
from ldm.training.record import RunRecord, refuse_changes, run_record

from .table import table
from .test_batches import Shades

CONFIG = AutoencoderConfig(
    "out", {"_class_name": "AutoencoderKL", "block_out_channels": [8]}, data=DataConfig(image_size=8)
)


STEP = SimpleNamespace(frozen={"space": "latent-1"}, tokenizer=None)


def whole_record(config=CONFIG, count=12, captions=None, step=STEP, precision="no"):
    source = Shades(count)
    source.fingerprint = f"images-{count}"
    if captions is not None:
        source.captions = captions
    return run_record(config, CaptionedImages(source, config.data), step, precision)


def record(*arguments, **more):
    return whole_record(*arguments, **more).facts


def test_the_same_run_is_resumed_silently(caplog):
    before, now, leave = record(), record(), record(replace(CONFIG, allow_config_change=True))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        refuse_changes(before, now, allowed=False)
        refuse_changes(before, leave, allowed=True)
    assert not caplog.records


@table(
    ("changed", "line"),
    [
        ({"optim": OptimConfig(learning_rate=0.5)}, "optim.learning_rate: 0.0001 -> 0.5"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"data": DataConfig(image_size=16)}, "data.image_size: 8 -> 16"),
        ({"data": DataConfig(image_size=8, batch_size=3)}, "data.batch_size: 64 -> 3"),
        ({"autoencoder": {"_class_name": "AutoencoderKL"}}, "autoencoder.block_out_channels: [8] -> not set"),
    ],
)
def test_r22_what_decides_the_result_is_refused_with_both_values_unless_allowed(changed, line, caplog):
    now = record(replace(CONFIG, **changed))
    with pytest.raises(ValueError, match="started with other values") as refused:
        refuse_changes(record(), now, allowed=False)
    assert line in str(refused.value)
    assert "--allow_config_change true" in str(refused.value)
    refuse_changes(record(), now, allowed=True)
    assert line in caplog.text


def test_r22_other_images_are_refused():
    with pytest.raises(ValueError, match=r"pictures\.fingerprint: 'images-12' -> 'images-13'"):
        refuse_changes(record(), record(count=13), allowed=False)


@table(
    ("changed", "line"),
    [
        ({"captions": lambda row: ["mended"]}, "captions: '"),
        ({"step": SimpleNamespace(frozen={"space": "latent-2"}, tokenizer=None)}, "networks.space: 'latent-1' -> '"),
        ({"step": SimpleNamespace(frozen={}, tokenizer=None)}, "networks.space: 'latent-1' -> not set"),
        ({"precision": "bf16"}, "precision: 'no' -> 'bf16'"),
    ],
)
def test_r25_what_changed_underneath_an_unchanged_config_is_refused_with_both_values_unless_allowed(
    changed, line, caplog
):
    with pytest.raises(ConfigError, match="started with other values") as refused:
        refuse_changes(record(), record(**changed), allowed=False)
    assert line in str(refused.value)
    refuse_changes(record(), record(**changed), allowed=True)
    assert line in caplog.text


@table(
    "changed",
    [
        {"data": DataConfig(image_size=8, source="imagefolder", path="elsewhere", image_column="image")},
        {"loop": LoopConfig(mixed_precision="no")},
    ],
)
def test_r25_the_same_data_and_precision_by_other_names_are_the_same(changed, caplog):
    refuse_changes(record(), record(replace(CONFIG, **changed)), allowed=False)
    old = {name: value for name, value in record().items() if name in ("config", "pictures")}
    with pytest.raises(ConfigError, match="started with other values"):
        refuse_changes(old, record(replace(CONFIG, **changed)), allowed=False)


def test_r24_r25_a_record_of_an_earlier_version_is_compared_as_far_as_it_goes_and_one_line_says_so(caplog):
    now = record()
    images = {**now["pictures"], "fingerprint": "folder-of-paths-and-times"}
    old = {"config": now["config"], "pictures": images}
    caplog.clear()
    refuse_changes(old, now, allowed=False)
    (line,) = caplog.messages
    assert "does not say: captions, classes, networks, precision, tokenizer, content of the images" in line
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        refuse_changes(old, record(replace(CONFIG, seed=1)), allowed=False)
    with pytest.raises(ConfigError, match=r"pictures\.held_out_hash"):
        refuse_changes(old, record(count=40), allowed=False)


def test_r24_a_field_that_an_earlier_version_did_not_have_is_compared_as_what_it_did(caplog):
    now = whole_record()
    facts = json.loads(json.dumps(now.facts))
    del facts["config"]["optim"]["decay_fraction"], facts["config"]["doctor"]
    old = Checkpoint(1, {}, {"record": facts})
    caplog.clear()
    now.going_on_from(old, allowed=False)
    assert not caplog.records
    other = whole_record(replace(CONFIG, optim=OptimConfig(decay_fraction=0.3)))
    with pytest.raises(ConfigError, match=r"optim\.decay_fraction: 1\.0 -> 0\.3"):
        other.going_on_from(old, allowed=False)


def test_r25_images_that_were_trained_on_and_are_held_out_now_are_refused_and_stay_on_record_where_allowed(caplog):
    now = whole_record(count=40)
    assert len(now.held_out_images)
    before = Checkpoint(1, {"record": {"trained_images": now.held_out_images}}, {"record": now.facts})
    with pytest.raises(ConfigError, match=f"held out now: {len(now.held_out_images)}"):
        now.going_on_from(before, allowed=False)
    both = now.going_on_from(before, allowed=True).trained_images
    assert set(both.tolist()) == {*now.held_out_images.tolist(), *now.trained_images.tolist()}
    assert "held out now" in caplog.text
    old = Checkpoint(1, {}, {"record": now.facts})
    assert torch.equal(now.going_on_from(old, allowed=False).trained_images, now.trained_images)


def test_a_training_without_a_record_is_resumed():
    assert RunRecord().going_on_from(Checkpoint(1, {}, {}), allowed=False).tensors() == {}


def test_r22_what_does_not_decide_it_is_taken_over_and_logged(caplog):
    loop = LoopConfig(max_train_steps=9, keep_checkpoints=5, trackers=())
    now = replace(CONFIG, output_dir="b", loop=loop, validation=ValidationConfig(num_images=3), push_to_hub="a/b")
    refuse_changes(record(), record(now), allowed=False)
    assert "loop.max_train_steps: None -> 9" in caplog.text
    assert "validation.num_images: 8 -> 3" in caplog.text


def test_snapshots_and_the_doctor_decide_nothing_of_where_a_training_arrives(caplog):
    config = StageConfig("out", {"_class_name": "UNet2DConditionModel"}, data=DataConfig(image_size=8))
    more = replace(config, snapshot_every_steps=9, doctor=DoctorConfig())
    refuse_changes(record(config), record(more), allowed=False)
    assert "snapshot_every_steps: None -> 9" in caplog.text
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        refuse_changes(record(config), record(replace(more, seed=1)), allowed=False)


def test_s04_records_and_saved_configs_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    below, elsewhere = tmp_path / "a" / "b", "/home/somebody/images"
    config = replace(CONFIG, output_dir=str(below), data=DataConfig(path=elsewhere, image_size=8))
    written = portable(asdict(config))
    assert written["output_dir"] == "a/b"
    assert written["data"]["path"] == "images"
    assert portable("~/x/y") == "y"
    assert portable("me/data") == "me/data"
    assert portable("configs/a.txt") == "configs/a.txt"
    assert str(Path.home()) not in str(record(config))
