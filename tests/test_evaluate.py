"""The whole evaluation on a tiny pipeline: what it writes, what it refuses, and that processes do not matter."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from huggingface_hub import ModelCard
from PIL import Image

from ldm.commands import cli
from ldm.commands.evaluate import evaluate
from ldm.config import DataConfig
from ldm.data.batches import CaptionedImages
from ldm.data.sources import build_source
from ldm.evaluation import evaluation
from ldm.evaluation.evaluation import Evaluation, read_as_trained
from ldm.models.provenance import Provenance, trained_through
from ldm.models.vision import build_feature_network
from ldm.training.record import data_options
from tests.test_sample import STOCK
from tests.tiny_evaluation import COUNT, words, write_place

from .table import table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_place(folder)
    return folder


def read(out):
    report = json.loads((out / "report.json").read_text())
    return report, {row["name"]: row for section in report["sections"] for row in section["rows"]}


@pytest.fixture(scope="module")
def evaluated(place):
    (place / "model" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Mine\n")
    out = place / "everything"
    more = ["--factors", place / "factors.yaml", "--clip", place / "clip"]
    cli.main(words(place, "model", out, *more, "--guidance_sweep", "1,1.5", "--steps_sweep", "1,2"))
    return out


def test_every_question_is_answered_with_its_baselines(evaluated):
    report, rows = read(evaluated)
    titles = [section["title"] for section in report["sections"]]
    assert titles == [
        "Does it follow the caption?",
        "Which words does it follow?",
        "CLIP score",
        "What are the captions worth?",
        "Do its images look like true ones?",
        "What can the latents carry?",
        "Does it copy its training images?",
        "How much do images of one prompt differ?",
        "By guidance_scale",
        "By num_inference_steps",
    ]
    at_1 = rows["R@1, pixels"]
    assert at_1["n"] == COUNT // 3
    assert at_1["low"] <= at_1["value"] <= at_1["high"]
    assert at_1["beside"].keys() == {"copy", "shuffled", "ceiling"}
    assert at_1["beside"]["copy"]["value"] == 0, "a training image is not the caption's own"
    assert at_1["copied"], "random weights draw nothing that is right"
    assert rows["colour"]["beside"]["chance"]["value"] == pytest.approx(1 / 4)
    assert rows["KID, clip"]["beside"].keys() == {"floor", "copy", "ceiling"}
    assert rows["nearer to training than the true image, pixels"]["beside"]["copy"]["value"] == 1
    assert not rows["conditional gain, mean over noise levels"]["beside"]


def test_settings_say_what_the_numbers_depend_on(evaluated, place):
    settings = read(evaluated)[0]["settings"]
    network = build_feature_network(str(place / "clip"))
    assert settings["network that measures"] == f"clip, weights {network.sha256[:16]}"
    assert settings["seeds"] == "0 to 15"
    assert settings["sampler"] == "DPMSolverMultistepScheduler"
    assert {"resize", "held out", "guidance_scale", "num_inference_steps", "versions"} <= settings.keys()


def test_nothing_tells_where_it_was_measured(evaluated, place):
    for name in ("report.json", "report.md", "report.html"):
        text = (evaluated / name).read_text()
        assert str(place) not in text
        assert str(Path.home()) not in text
    assert Image.open(evaluated / "samples.png").width > 100


def test_the_card_has_the_results(evaluated, place):
    card = ModelCard.load(place / "model" / "README.md")
    assert "# Mine" in card.text
    assert "### Does it follow the caption?" in card.text
    assert "R@1, pixels" in {result.metric_name for result in card.data.eval_results}


@pytest.mark.slow
def test_a_stock_pipeline_is_measured_alike(evaluated, place, tmp_path):
    cli.main(words(place, "stock", tmp_path))
    ours, stock = read(evaluated)[1], read(tmp_path)[1]
    for name in ("R@1, pixels", "R@10, clip", "PSNR, dB"):
        assert stock[name]["value"] == pytest.approx(ours[name]["value"], abs=0.07)
    assert stock["conditional gain, mean over noise levels"]["value"] == pytest.approx(
        ours["conditional gain, mean over noise levels"]["value"], abs=1e-4
    )
    assert not (place / "stock" / "README.md").exists()


def test_a_model_that_is_told_nothing_is_measured_by_its_images(place, tmp_path):
    more = ("--guidance_scale", "1")
    cli.main(words(place, "pixels", tmp_path / "stock", *more))
    cli.main(words(place, "pixels", tmp_path / "ours", *more, "--trust_remote_code", "true"))
    (report, stock), (_, ours) = read(tmp_path / "stock"), read(tmp_path / "ours")
    assert [section["title"] for section in report["sections"]] == [
        "What do its samples look like?", "Do its images look like true ones?", "Does it copy its training images?",
    ]  # fmt: skip
    assert stock["KID, clip"]["value"] == pytest.approx(ours["KID, clip"]["value"], abs=1e-4)
    assert Image.open(tmp_path / "stock" / "samples.png").width > 100


@pytest.mark.slow
def test_without_a_list_of_captions_the_test_split_by_hash_is_measured(place, tmp_path):
    named = {"model": str(place / "model"), "data": str(place / "images"), "out": str(tmp_path)}
    settings = {"num_inference_steps": 1, "variety_prompts": 0, "card": False, "network": str(place / "clip")}
    report = evaluate(**named, **settings, held_out_percent=20)
    config = DataConfig(source="imagefolder", path=str(place / "images"), held_out_percent=20, image_size=16)
    held_out = CaptionedImages(build_source(config), config).splits["test"]
    (first, *_) = report.sections[0].rows
    assert first.measure.n == len(held_out) > 2
    with pytest.raises(ValueError, match="raise held_out_percent"):
        evaluate(**named, **settings, held_out_percent=0)


def test_captions_in_the_training_data_of_the_model_are_refused(place, tmp_path):
    record(place, place / "model" / "training.json", held_out_hash="0" * 32)
    with pytest.raises(ValueError, match="may have been trained on"):
        evaluate(*arguments(place, tmp_path))
    (place / "model" / "training.json").unlink()


def test_a_network_that_was_trained_through_may_not_measure(place, tmp_path):
    sha256 = build_feature_network(str(place / "clip")).sha256
    record(place, place / "model" / "training.json", networks=[trained_through("CLIP", sha256)])
    with pytest.raises(ValueError, match="cannot measure it fairly"):
        evaluate(*arguments(place, tmp_path), network=str(place / "clip"))
    (place / "model" / "training.json").unlink()


@table(
    ("settings", "said"),
    [
        ({"num_images_per_prompt": 1}, "images of each; expected 2 or more"),
        ({"classes": "0,1"}, "classes: the data has none; name their column in class_column"),
        ({"class_column": "kind"}, "class_column: model is conditioned on no classes"),
        ({"bound_timesteps": 3}, "TextToImagePipeline diffuses latents|StableDiffusionPipeline diffuses latents"),
        ({"captions": None}, "validation_captions: without captions"),
        ({"captions": ["red thing 0", "red thing 4", "red thing 8"]}, "too few held-out images .* got 3, expected 4"),
        ({"captions": ["red thing 0"] * 3 + ["red thing 4"]}, "3 of 4 captions have the same image"),
        ({"validation_captions": ["blue thing 2"], "steps_sweep": "1,2"}, "validation captions: got one; expected two"),
        ({"factors": "none.yaml"}, "none.yaml"),
        ({"clip": "none"}, "none"),
        ({"classes": "1.9"}, "classes: got 1.9; expected whole numbers"),
        ({"classes": "nan"}, "classes: got nan; expected whole numbers"),
        ({"classes": "0,inf"}, "classes: got inf; expected whole numbers"),
        ({"model": "pixels", "steps_sweep": "1,2"}, "sweeps are measured on captions, and pixels takes none"),
        ({"model": "pixels", "factors": "factors.yaml"}, "factors are measured on captions, and pixels takes none"),
        ({"model": "pixels", "clip": "clip"}, "CLIP scores are measured on captions, and pixels takes none"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_drawn(place, tmp_path, monkeypatch, settings, said):
    monkeypatch.setattr("ldm.evaluation.evaluation.sample_images", None)  # it cannot be called
    named = dict(zip(("model", "data", "out", "captions"), arguments(place, tmp_path), strict=True))
    named |= {"validation_captions": str(place / "validation.txt"), "network": str(place / "clip")} | settings
    named["model"] = str(place / named["model"])
    for option in ("captions", "validation_captions"):
        if isinstance(named[option], list):
            (tmp_path / option).write_text("\n".join(named[option]))
            named[option] = str(tmp_path / option)
    with pytest.raises((ValueError, OSError), match=said):
        evaluate(**named)


def test_a_sweep_needs_the_validation_captions(place, tmp_path):
    with pytest.raises(ValueError, match="sweeps are chosen on the validation captions"):
        evaluate(*arguments(place, tmp_path), network=str(place / "clip"), guidance_sweep="1", num_inference_steps=1)


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_number_of_processes(place, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "ldm.commands.cli"]
    command = [*run, *words(place, "stock", tmp_path / "two"), "--card", "false"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    cli.main([*words(place, "stock", tmp_path / "one"), "--card", "false"])
    one, two = read(tmp_path / "one")[1], read(tmp_path / "two")[1]
    assert one.keys() == two.keys()
    for name, row in one.items():
        assert two[name]["value"] == pytest.approx(row["value"], abs=1e-4), name


def arguments(place, out):
    return str(place / "model"), str(place / "images"), str(out), str(place / "heldout.txt")


def record(place, path, held_out_hash=None, networks=()):
    held_out = {"test": str(place / "heldout.txt")}
    config = DataConfig(source="imagefolder", path=str(place / "images"), held_out=held_out, image_size=16)
    found = CaptionedImages(build_source(config), config).splits.held_out_hash
    Provenance("data", held_out_hash or found, 1, 1, 1.0, 1.0, "none", {}, networks).save(path.parent)


def test_the_gallery_is_looked_at_once(place, monkeypatch):
    model, data, _, captions = arguments(place, "")
    named = (model, data, {}, {"test": captions}, str(place / "clip"))
    first, known = Evaluation(*named).gallery_features, build_feature_network(str(place / "clip"))
    only_named = SimpleNamespace(name=known.name, sha256=known.sha256, resize=known.resize)  # it cannot be called
    monkeypatch.setattr("ldm.evaluation.evaluation.build_feature_network", lambda name: only_named)
    np.testing.assert_array_equal(Evaluation(*named).gallery_features, first)


def titled(place, folder):
    """Images whose captions stand in a column called title, and the model with a record that says so."""
    shutil.copytree(place / "images", folder / "images")
    shutil.copytree(place / "stock", folder / "model")
    metadata = folder / "images" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text"', '"title"'))
    options = {"caption_column": "title", "held_out_percent": 20.0, "background": "black", "source": "imagefolder"}
    config = DataConfig(path=str(folder / "images"), image_size=16, **options)
    images = CaptionedImages(build_source(config), config)
    record = Provenance(
        "data", images.splits.held_out_hash, 1, 1, 1.0, 1.0, "none", {}, data_options=data_options(config)
    )
    record.save(folder / "model")
    return images, ["evaluate", str(folder / "model"), "--data", str(folder / "images"), "--card=false"]


def test_data_are_read_as_the_model_was_trained_on_them_which_is_said(place, tmp_path, caplog):
    images, command = titled(place, tmp_path)
    few = ["--network", str(place / "clip"), "--num_inference_steps=1", "--variety_prompts=0", f"--out={tmp_path}"]
    cli.main([*command, *few])
    report, rows = read(tmp_path)
    assert rows["R@1, pixels"]["n"] == len(images.splits["test"]) > 2
    assert report["settings"]["held out"] == images.splits.held_out_hash
    said = [message for message in caplog.messages if message.startswith("read as the model's training read its data")]
    assert [message.rpartition(": ")[2] for message in said] == [
        "caption_column title, background black, held_out_percent 20.0"
    ]
    with pytest.raises(SystemExit, match=r"none of the .* has a caption; name their column in caption_column"):
        cli.main([*command, *few, "--caption_column=null"])
    with pytest.raises(SystemExit, match=r"data.caption_column: no column 'name' among the columns .*title"):
        cli.main([*command, *few, "--caption_column=name"])
    with pytest.raises(SystemExit, match="other images held out"):
        cli.main([*command, *few, "--held_out_percent=10"])


def test_a_model_of_classes_that_needs_them_asks_for_their_column(place, tmp_path):
    torch.manual_seed(0)
    DiTPipeline(*STOCK["DiTPipeline"]()).save_pretrained(tmp_path / "model")
    more = {"network": str(place / "clip"), "num_inference_steps": 1}
    with pytest.raises(ValueError, match="class_column: DiTPipeline samples classes; name the column of them"):
        evaluate(str(tmp_path / "model"), *arguments(place, tmp_path)[1:], **more)


def test_of_averages_the_best_is_chosen_on_the_captions_that_training_held_out(place, tmp_path, monkeypatch):
    shutil.copytree(place / "stock", tmp_path / "run" / "model")
    lists = {"test": str(place / "heldout.txt"), "validation": str(place / "validation.txt")}
    config = DataConfig(source="imagefolder", path=str(place / "images"), held_out=lists, image_size=16)
    held_out_hash = CaptionedImages(build_source(config), config).splits.held_out_hash
    options = {"held_out": {"test": "heldout.txt", "validation": "validation.txt"}}
    Provenance("x", held_out_hash, 1, 1, 1.0, 1.0, "", {}, data_options=options).save(tmp_path / "run" / "model")
    monkeypatch.setattr(
        "ldm.commands.average.averaged_model", lambda run, length, to: Path(shutil.copytree(run / "model", to))
    )
    command = ["average", str(tmp_path / "run"), "--sigma_rel", "0.1", "--data", str(place / "images")]
    command += ["--network", str(place / "clip"), "--num_inference_steps", "1"]
    with pytest.raises(
        SystemExit, match=r"captions in heldout\.txt, and there is no such file here; name it, --captions"
    ):
        cli.main([*command, "--to", str(tmp_path / "one")])
    assert not (tmp_path / "one").exists(), "nothing is written before the data are known to be right"
    monkeypatch.chdir(place)
    cli.main([*command, "--to", str(tmp_path / "two")])
    found = json.loads((tmp_path / "run" / "averages.json").read_text())
    assert [row["model"] for row in found["lengths"]] == ["model", "two"]
    assert found["lengths"][0]["r_at_1"]["n"] == len((place / "validation.txt").read_text().splitlines())


LISTS = {"test": "lists/t.txt", "validation": "lists/v.txt"}
READ = [  # what a training recorded; data, options and captions that are said; what of it is read
    ({}, "x", {}, {}, {"source": "dataset", "held_out_percent": 2.0, "held_out": {}}),
    ({"source": "openmoji", "languages": ("de",)}, None, {}, {}, {"source": "openmoji", "languages": ("de",)}),
    ({"source": "openmoji", "class_column": "group"}, None, {}, {}, {"class_column": "group"}),
    ({"source": "openmoji"}, "x", {"source": "parquet"}, {}, {"source": "parquet", "path": "x"}),
    ({"split": "a", "limit": 9}, "x", {"limit": None}, {}, {"split": "a", "limit": None}),
    ({"caption_column": "a"}, "x", {"caption_column": "b"}, {}, {"caption_column": "b"}),
    ({"held_out": LISTS}, "x", {}, {}, {"held_out": LISTS}),
    ({"held_out": LISTS}, "x", {}, {"test": "other"}, {"held_out": LISTS | {"test": "other"}}),
    ({"held_out": LISTS}, "x", {"held_out": {}}, {"test": "other"}, {"held_out": {"test": "other"}}),
    ({"held_out": LISTS}, "x", {"held_out_percent": 5.0}, {}, {"held_out": {}, "held_out_percent": 5.0}),
    ({"held_out": {"test": "/etc/passwd"}}, "x", {"held_out": {}}, {}, {"held_out": {}}),
]
REFUSED = [
    ({}, None, {}, {}, "data: name the images to measure on, --data"),
    ({"source": "imagefolder"}, None, {}, {}, "data: name the images to measure on, --data"),
    (
        {"held_out": {"test": "gone.txt"}},
        "x",
        {},
        {},
        r"held out the captions in gone.txt, and .*; name it, --captions",
    ),
    (
        {"held_out": LISTS | {"validation": "gone"}},
        "x",
        {},
        {"test": "a"},
        "in gone, .*; name it, --validation_captions",
    ),
    ({"held_out": {"test": "/etc/passwd"}}, "x", {}, {}, "in passwd, and there is no such file"),
    ({}, "x", {}, {"validation": "a"}, "validation_captions: without captions"),
    ({"limit": -1}, "x", {}, {}, "data.limit: got -1; expected"),
    ({}, "x", {"held_out_percent": 60.0}, {}, "data.held_out_percent: got 60.0; expected"),
]


@table(("recorded", "data", "options", "captions", "expected"), READ)
def test_what_is_said_counts_then_the_record_then_what_is_usual(
    recorded, data, options, captions, expected, tmp_path, monkeypatch
):
    found = read_in(tmp_path, monkeypatch, recorded, data, options, captions)
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.image_size, found.on_bad_data) == (16, "skip")


@table(
    ("recorded", "options", "captions", "said"),
    [
        ({"held_out": LISTS}, {}, {}, f"held_out {LISTS}"),
        ({"held_out": LISTS}, {}, {"test": "other"}, "held_out {'validation': 'lists/v.txt'}"),
        ({"held_out": LISTS, "background": "black"}, {"held_out_percent": 5.0}, {}, "background black"),
        ({"held_out": LISTS, "background": "black"}, {"held_out": {}}, {}, "background black"),
        ({"held_out_percent": 20.0}, {}, {}, "held_out_percent 20.0"),
        ({"held_out_percent": 20.0, "background": "black"}, {}, {"test": "other"}, "background black"),
        ({"background": "black"}, {"background": "white"}, {}, None),
    ],
)
def test_what_is_read_from_the_record_is_said_if_it_is_used(
    recorded, options, captions, said, tmp_path, monkeypatch, caplog
):
    evaluation._say.cache_clear()
    caplog.set_level(logging.INFO)
    read_in(tmp_path, monkeypatch, recorded, "x", options, captions)
    assert [message.rpartition("otherwise: ")[2] for message in caplog.messages] == ([] if said is None else [said])


@table(("recorded", "data", "options", "captions", "said"), REFUSED)
def test_data_that_cannot_be_read_as_recorded_are_refused_with_what_to_do(
    recorded, data, options, captions, said, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match=said):
        read_in(tmp_path, monkeypatch, recorded, data, options, captions)


def read_in(folder, monkeypatch, recorded, data, options, captions):
    """What an evaluation reads in a folder in which the lists of captions are."""
    (folder / "lists").mkdir()
    for file in LISTS.values():
        (folder / file).touch()
    monkeypatch.chdir(folder)
    record = Provenance("data", "0" * 32, 1, 1, 1.0, 1.0, "none", {}, data_options=recorded)
    return read_as_trained(record, data, options, captions, image_size=16, on_bad_data="skip")
