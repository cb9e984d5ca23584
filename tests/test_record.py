"""What a resumed run may do differently, and what it may not."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ldm.config import AutoencoderConfig, DataConfig, LoopConfig, OptimConfig, StageConfig, ValidationConfig
from ldm.config_check import ConfigError
from ldm.config_doctor import DoctorConfig
from ldm.data.batches import CaptionedImages
from ldm.places import portable
from ldm.training.record import refuse_changes, run_record

from .test_batches import Shades

CONFIG = AutoencoderConfig(
    "out", {"_class_name": "AutoencoderKL", "block_out_channels": [8]}, data=DataConfig(image_size=8)
)


def record(config=CONFIG, count=12):
    source = Shades(count)
    source.fingerprint = f"shades-{count}"
    return run_record(config, CaptionedImages(source, config.data))


def test_the_same_run_is_resumed_silently(caplog):
    with caplog.at_level(logging.INFO):
        refuse_changes(record(), record(), allowed=False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"optim": OptimConfig(learning_rate=0.5)}, "optim.learning_rate: 0.0001 -> 0.5"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"data": DataConfig(image_size=16)}, "data.image_size: 8 -> 16"),
        ({"data": DataConfig(image_size=8, batch_size=3)}, "data.batch_size: 64 -> 3"),
        ({"autoencoder": {"_class_name": "AutoencoderKL"}}, "autoencoder.block_out_channels: [8] -> not set"),
        ({"loop": LoopConfig(mixed_precision="bf16")}, "loop.mixed_precision: 'auto' -> 'bf16'"),
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


def test_r22_other_pictures_are_refused():
    with pytest.raises(ValueError, match=r"pictures\.fingerprint: 'shades-12' -> 'shades-13'"):
        refuse_changes(record(), record(count=13), allowed=False)


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
    below, elsewhere = tmp_path / "a" / "b", "/home/somebody/pictures"
    config = replace(CONFIG, output_dir=str(below), data=DataConfig(path=elsewhere, image_size=8))
    written = portable(asdict(config))
    assert written["output_dir"] == "a/b"
    assert written["data"]["path"] == "pictures"
    assert portable("~/x/y") == "y"
    assert portable("me/data") == "me/data"
    assert portable("configs/a.txt") == "configs/a.txt"
    assert str(Path.home()) not in str(record(config))
