"""JSON of others, and ours after an accident: every reader answers junk in its own words, naming the file."""

import hashlib
import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import save_file

from ldm.commands.validate import token_counter
from ldm.evaluation.factors import read_factors
from ldm.export.card import _newest_metrics
from ldm.export.hub import model_files
from ldm.files import read_object
from ldm.models.foreign import refuse_strange_shards
from ldm.models.pipeline import load_pipeline
from ldm.models.vision import build_feature_network
from ldm.training.checkpoint import CheckpointError, CheckpointStore
from ldm.training.manifest import read_manifest
from ldm.training.snapshots import read_snapshots

from .table import table
from .test_sample import unet

JUNK = {
    "empty": b"",
    "cut": b'{"a": {"b": [1, ',
    "a list": b"[1, 2]",
    "null": b"null",
    "a text": b'"x"',
    "not a number": b"NaN",
    "not UTF-8": b"\xff\xfe{\0",
    "nested too deeply": b"[" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "values of other types": b'{"weight_map": 5, "format": [], "files": "x", "model_type": {}, "unet": [1], "a": "b"}',
}
"""Contents of a file."""


READERS = {
    "x.json": read_object,
    "diffusion_pytorch_model.safetensors.index.json": lambda path: refuse_strange_shards(path.parent),
    "model_index.json": lambda path: load_pipeline(str(path.parent), False),
    "model/model_index.json": lambda path: model_files(path.parent),
    "config.json": lambda path: build_feature_network(str(path.parent)),
    "preprocessor_config.json": lambda path: build_feature_network(str(path.parent)),
    "tokenizer_config.json": lambda path: list(token_counter(str(path.parent), 9)(["a"])),
    "pipeline/unet/config.json": lambda path: load_pipeline(str(path.parent.parent), False),
    "pipeline/scheduler/scheduler_config.json": lambda path: load_pipeline(str(path.parent.parent), False),
    "factors.json": read_factors,
    "run/step-1/manifest.json": read_manifest,
}
"""What reads a file of a name."""
OBJECTS = {"x.json", "model/model_index.json", "pipeline/scheduler/scheduler_config.json"}
"""Those of which any object is one: keys that are not known are left out."""


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """A pipeline of diffusers."""
    folder = tmp_path_factory.mktemp("pixels")
    DDPMPipeline(unet(), DDPMScheduler(20)).save_pretrained(folder)
    return folder


@table("junk", JUNK)
@table("name", READERS)
def test_junk_is_refused_with_the_name_of_the_file_or_its_model(name, junk, pixels, tmp_path):
    path = tmp_path / name
    if name.startswith("pipeline/"):
        shutil.copytree(pixels, tmp_path / "pipeline")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JUNK[junk])
    if junk == "values of other types" and name in OBJECTS:
        READERS[name](path)
        return
    with pytest.raises((ValueError, OSError, CheckpointError)) as refused:
        READERS[name](path)
    assert str(tmp_path) in str(refused.value) or path.name in str(refused.value)


def signed(content):
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


@table(
    "manifest",
    [
        *(
            {},
            {"format": 1},
            {"format": 1, "global_step": 1, "files": []},
            {"format": 1, "global_step": "1", "files": {}},
        ),
        {"format": 1, "global_step": 1, "files": {"state.json": 5}},
        {"format": 1, "global_step": 1, "files": {"state.json": {"size": 2}}},
    ],
)
def test_a_manifest_that_is_signed_and_says_too_little_is_refused(manifest, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_state_that_is_signed_and_no_object_is_refused(tmp_path):
    step = CheckpointStore(tmp_path, 1).save(1, {"a": {"w": torch.ones(2)}}, [])
    with pytest.raises(CheckpointError, match=r"state\.json .*a list; expected an object"):
        CheckpointStore.load(step)


@table(
    "about",
    [
        *({}, {"global_step": "x"}, {"global_step": "1", "steps_taken": "1", "sigma_rel": "nan"}),
        {"global_step": "1", "steps_taken": "0", "sigma_rel": "0.1"},
        {"global_step": "9" * 5000, "steps_taken": "1", "sigma_rel": "0.1"},
    ],
)
def test_a_snapshot_that_says_nothing_that_can_be_is_named(about, tmp_path):
    (tmp_path / "snapshots").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "snapshots" / "step-1-0.1.safetensors", about)
    with pytest.raises(ValueError, match=r"step-1-0\.1\.safetensors is no snapshot"):
        read_snapshots(tmp_path)


def test_a_card_is_written_after_a_line_of_metrics_that_was_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 20, "validation/loss": 1.5}\n{"step": 40, "validation/lo')
    assert _newest_metrics(file) == (20, {"loss": 1.5})
