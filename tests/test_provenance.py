"""Which networks taught a model, and that none of them measures it."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import ldm.models.provenance as provenance_module
from ldm.conditioners.image import ImageConditioner
from ldm.config import DataConfig
from ldm.config.places import pretrained_place
from ldm.evaluation.leaks import refuse_leak, refuse_teacher
from ldm.models.clip import load_image_encoder
from ldm.models.features import EFFICIENTNETS, PerceptualDistance, VGGFeatures
from ldm.models.network import weights_sha256
from ldm.models.provenance import (
    Provenance,
    image_keys,
    read_provenance,
    read_trained_images,
    save_trained_images,
    trained_through,
)
from ldm.models.vision import build_feature_network
from ldm.spaces import EmbeddingSpace
from ldm.stage import ConditionedDenoiser
from ldm.training.record import RunRecord, all_trained_images, data_options, provenance
from ldm.training.steps import AutoencoderStep, DiffusionStep
from tests.fake_hub import FakeHub, Repository
from tests.test_entry import train_autoencoder, train_model

from .table import table

RECORD = Provenance("images", "ab" * 16, 64, 40, 1.0, 64.0, "a processor", {"torch": "2.13.0"})
TEACHER, OTHER = (EFFICIENTNETS[name] for name in ("efficientnet_lite2", "efficientnet_lite0"))
TAUGHT = ["efficientnet_lite2 9656183eaeafe8cb"]


def saved(folder, record=RECORD):
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder)
    return folder


def test_a_record_comes_back_as_it_was_saved_with_and_without_networks(tmp_path):
    for record in (RECORD, replace(RECORD, networks=TAUGHT)):
        assert read_provenance(saved(tmp_path, record)) == record
    old = json.loads((tmp_path / "training.json").read_text())
    del old["networks"]
    (tmp_path / "training.json").write_text(json.dumps(old))
    assert read_provenance(tmp_path) == RECORD


GOOD = json.loads(json.dumps(asdict(RECORD)))
NOT_OURS = {
    "empty": "",
    "cut": json.dumps(GOOD)[:-9],
    "a list": "[]",
    "null": "null",
    "a text": '"x"',
    "nested too deeply": "[" * 100_000,
    "a number of 5000 digits": '{"data": ' + "1" * 5000 + "}",
    "of somebody else": '{"base_model": "x", "epochs": 3}',
    "a part is missing": json.dumps({key: value for key, value in GOOD.items() if key != "held_out_hash"}),
    "a part is of another type": json.dumps(GOOD | {"held_out_hash": 5}),
    "true is no number": json.dumps(GOOD | {"global_step": True}),
    "not text": b"\xff\xfe\0",
    "huge": b"\0" * 2**20,
}


@table("what", NOT_OURS)
def test_a_record_that_is_not_ours_is_none_which_is_said_and_nothing_is_raised(what, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ldm.files.MAX_JSON_BYTES", 2**19)
    content = NOT_OURS[what]
    (tmp_path / "training.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for _ in range(2):
        assert read_provenance(tmp_path) is None
    refuse_teacher(tmp_path, "efficientnet_lite2", TEACHER)
    assert len(caplog.records) == 1, "once"
    assert caplog.messages[0].startswith(f"no record of ours, and not read: {tmp_path}/training.json: ")


def test_of_a_record_of_a_later_version_what_is_known_is_read_and_the_rest_is_said(tmp_path, caplog):
    (tmp_path / "training.json").write_text(
        json.dumps(GOOD | {"optimizer": {"a": [1]}, "networks": {"b": 1}, "data_options": {"limit": 3, "split": 5}})
    )
    assert read_provenance(tmp_path) == replace(RECORD, data_options={"limit": 3})
    (said,) = caplog.messages
    assert said.endswith("or of another type, and left out: 'networks', 'split', 'optimizer'")


def test_how_data_are_read_is_recorded_without_folders_of_this_machine(tmp_path):
    lists = {"test": "/home/zaphod/t.txt", "validation": "configs/v.txt"}
    config = DataConfig(source="parquet", path="/home/zaphod/x", caption_column="/title", limit=3, held_out=lists)
    options = data_options(config)
    assert options["held_out"] == {"test": "t.txt", "validation": "configs/v.txt"}
    assert (options["caption_column"], options["languages"]) == ("/title", ("en",))
    record = replace(RECORD, data_options=options)
    assert read_provenance(saved(tmp_path, record)) == record
    assert "zaphod" not in (tmp_path / "training.json").read_text()


def test_a_record_is_read_from_wherever_a_config_may_name_a_model(tmp_path, monkeypatch, caplog):
    taught = replace(RECORD, networks=TAUGHT)
    saved(tmp_path / "my_weights" / "vae", taught)
    (tmp_path / "my_weights" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with FakeHub() as hub:
        hub.serve(monkeypatch, tmp_path)
        content = (tmp_path / "my_weights" / "vae" / "training.json").read_bytes()
        hub.repositories["me/taught"] = Repository(False, [("one", {"training.json": content})])
        hub.repositories["me/foreign"] = Repository(False, [("one", {"config.json": b"{}"})])
        for name in ("package:my_weights/vae", "me/taught", "me/taught@v1"):
            assert read_provenance(name) == taught
            with pytest.raises(ValueError, match="measure it fairly"):
                refuse_teacher(name, "efficientnet_lite2", TEACHER)
        assert any("/resolve/v1/training.json" in request for request in hub.requests)
        assert read_provenance("me/foreign") is None
        asked = len(hub.requests)
        assert read_provenance(Path("me/taught")) is read_trained_images(Path("me/taught")) is None
        assert len(hub.requests) == asked, "a folder of this machine that is not there yet is nobody else's business"
        assert caplog.messages == [], "it says nothing of its training, and that is known"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert read_provenance("me/taught") == taught, "it lies here"
        for name in ("me/another", "me/another@v1"):
            for _ in range(2):
                assert read_provenance(name) is None
    assert [said.partition(":")[0] for said in caplog.messages] == ["me/another", "me/another@v1"]
    assert all("was not checked" in said for said in caplog.messages)
    saved(tmp_path / "me")
    monkeypatch.chdir(tmp_path)
    assert read_provenance("me/another") is None, "a folder of the owner's name is not the model's"
    for nobody in ("package:no_such_weights/x", "package:my_weights/none", "me/taught@", "a\0b", "x" * 5000):
        assert read_provenance(nobody) is None


def test_a_network_is_named_with_its_revision_and_its_folder(tmp_path):
    assert pretrained_place({"pretrained": "me/vae", "revision": "v1"}) == "me/vae@v1"
    assert pretrained_place({"pretrained": "me/vae@v1", "subfolder": "vae"}) == "me/vae@v1"
    assert pretrained_place({"pretrained": str(tmp_path), "subfolder": "a/unet"}) == str(tmp_path / "a/unet")
    assert pretrained_place({"_class_name": "AutoencoderKL"}) is None
    saved(tmp_path / "a")
    (tmp_path / "a" / "unet").mkdir()
    assert read_provenance(pretrained_place({"pretrained": str(tmp_path), "subfolder": "a/unet"})) == RECORD


def test_a_network_may_measure_what_it_did_not_teach(tmp_path):
    model = saved(tmp_path / "model", replace(RECORD, networks=["CLIP 0123456701234567", *TAUGHT]))
    refuse_teacher(model, "efficientnet_lite0", OTHER)
    for name in ("efficientnet_lite2", "mine"):
        with pytest.raises(ValueError, match=f"model was trained through {name}, which cannot measure it fairly"):
            refuse_teacher(model, name, TEACHER)
    refuse_teacher(saved(tmp_path / "untaught"), "efficientnet_lite2", TEACHER)
    refuse_teacher(tmp_path / "foreign", "efficientnet_lite2", TEACHER)


def test_a_part_has_the_teachers_of_its_pipeline(tmp_path):
    saved(tmp_path, replace(RECORD, networks=TAUGHT))
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match="vae was trained through"):
        refuse_teacher(tmp_path / "vae", "efficientnet_lite2", TEACHER)


@table(
    ("trained", "hash_", "held_out", "leaks"),
    [
        ("abcd", "same", "ef", None),
        ("abcd", "other", "ef", None),  # a grown set: nobody trained on what is held out beside
        ("abcd", "other", "", None),
        ("abcd", "other", "aef", "trained on 1 of the 3 images"),
        ("abcd", "same", "ab", "trained on 2 of the 2 images"),  # the images count, not the hash
        (None, "same", "ab", None),
        (None, "other", "ef", "of an earlier version"),
    ],
)
def test_r25_a_model_is_refused_for_the_images_it_was_trained_on_and_for_nothing_else(
    trained, hash_, held_out, leaks, tmp_path
):
    model = saved(tmp_path / "model", replace(RECORD, held_out_hash="same"))
    (model / "vae").mkdir()
    if trained is not None:
        save_trained_images(model, image_keys(trained))
        assert read_trained_images(model / "vae").tolist() == sorted(read_trained_images(model).tolist())
    for name in (model, model / "vae"):
        with pytest.raises(ValueError, match=leaks) if leaks else nullcontext():
            refuse_leak(name, hash_, image_keys(held_out))
    refuse_leak(tmp_path / "foreign", hash_, image_keys(held_out))


def test_a_model_was_trained_on_what_its_parts_were_trained_on(tmp_path):
    save_trained_images(saved(tmp_path / "vae"), image_keys("abc"))
    parts = [str(tmp_path / "vae"), str(tmp_path / "foreign")]
    assert torch.equal(all_trained_images(image_keys("bcd"), parts), image_keys("abcd"))


def named(kind, **attributes):
    """The networks of a step that has nothing but `attributes`."""
    return kind.networks.fget(SimpleNamespace(**attributes))


def test_an_autoencoder_is_taught_by_its_perceptual_network():
    vgg, none = PerceptualDistance(VGGFeatures()), SimpleNamespace(perceptual="none")
    assert named(AutoencoderStep, distance=None, config=none) == []
    lpips = SimpleNamespace(perceptual="lpips_vgg")
    expected = trained_through("lpips_vgg", weights_sha256(vgg.features))
    assert named(AutoencoderStep, distance=vgg, config=lpips) == [expected]
    lite2 = SimpleNamespace(perceptual="efficientnet_lite2")
    assert named(AutoencoderStep, distance=vgg, config=lite2) == TAUGHT


def test_a_stage_is_taught_by_the_clips_it_sees_through(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("space", "condition"):
        vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
        CLIPVisionModelWithProjection(vision).save_pretrained(tmp_path / name)
    space, condition = (load_image_encoder(str(tmp_path / name), name) for name in ("space", "condition"))
    model = ConditionedDenoiser(torch.nn.Identity(), {"image": ImageConditioner(condition, "zeros", 0.1)})
    stage = SimpleNamespace(space=EmbeddingSpace(space, torch.rand(4, 3, 8, 8)), model=model)
    model = saved(tmp_path / "model", replace(RECORD, networks=named(DiffusionStep, stage=stage)))
    assert len(read_provenance(model).networks) == 2
    for name in ("space", "condition"):  # the network that measures, loaded on its own way, is known again
        network = build_feature_network(str(tmp_path / name))
        with pytest.raises(ValueError, match="measure it fairly"):
            refuse_teacher(model, network.name, network.sha256)


def test_what_taught_a_part_taught_the_whole(tmp_path):
    progress = SimpleNamespace(global_step=1, train_seconds=1.0, images_per_second=1.0)
    record = RunRecord({"pictures": {"fingerprint": "f", "held_out_hash": "h"}}, train_images=7)
    part = saved(tmp_path / "part", replace(RECORD, networks=TAUGHT))
    found = provenance(progress, record, DataConfig(), ["CLIP 01"], [str(part), str(tmp_path / "of nobody")])
    assert found.networks == ["CLIP 01", *TAUGHT]
    assert (found.data, found.held_out_hash, found.train_pictures) == ("f", "h", 7)


def test_a_tiny_training_records_its_teacher_and_its_stage_inherits_it(tmp_path, monkeypatch):
    quick = ("--loop.max_train_steps", 2, "--loop.validate_every_steps", 9, "--optim.warmup_steps", 1)
    perceptual = ("--reconstruction.perceptual", "efficientnet_lite2")
    vae = train_autoencoder(monkeypatch, tmp_path / "vae", *quick, *perceptual)
    assert read_provenance(vae).networks == TAUGHT
    model = train_model(monkeypatch, tmp_path / "model", vae, *quick)
    record = read_provenance(model)
    assert record.networks == TAUGHT
    lists = {"validation": "configs/openmoji/validation.txt", "test": "configs/openmoji/heldout.txt"}
    assert (record.data_options["source"], record.data_options["held_out"]) == ("openmoji", lists)


def test_the_version_is_known_where_nothing_is_installed(monkeypatch):
    def other(name, real=provenance_module.version):
        assert name != "ldm", "asked of pip"
        return real(name)

    monkeypatch.setattr(provenance_module, "version", other)
    assert provenance_module.versions()["ldm"] == metadata.version("ldm")
