"""What is wrong with a data set is found, all of it and nothing else, before a training begins."""

import json
import logging
import os
import subprocess
import sys
import zlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import train_text2img
import train_vae
from ldm.commands import cli
from ldm.config import DataConfig
from ldm.data import headers
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.data.hashes import pixel_digest
from ldm.data.headers import ImageError, open_image
from ldm.data.inspection import inspect
from ldm.data.openmoji import OpenMoji
from ldm.data.preflight import caption_fault, checked_source
from ldm.data.rows import RowSource, TableRows
from ldm.data.sources import build_source, source_config
from ldm.models.text_encoder import train_tokenizer
from tests.image_folders import corrupt, encoded, noise_image, png, write_folder, write_metadata

from .table import table

ROOT = Path(__file__).parent.parent
QUICK = {"too large", "missing", "outside", "bad row", "bad caption"}
NOT_STOPPING = {"no caption", "unlisted", "exact duplicate", "near duplicate", "near duplicate across splits"}


def config(folder, **more):
    return DataConfig(**{"source": "imagefolder", "path": str(folder), "held_out_percent": 0.0, **more})


def words(captions):
    return [len(caption.split()) + 2 for caption in captions]


def found(report):
    kinds = defaultdict(set)
    for problem in report.problems:
        kinds[problem.kind].add(problem.where)
    return dict(kinds)


def report_of(folder, workers=0, **more):
    chosen = config(folder, **{"held_out_percent": 2.0, **more})
    return inspect(build_source(chosen), chosen, words, 77, workers)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A thousand images, about two percent spoiled, and what must be found."""
    folder = tmp_path_factory.mktemp("spoiled") / "images"
    folder.mkdir()
    rows = write_folder(folder, 1000)
    return folder, corrupt(folder, rows)


@pytest.fixture
def clean(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    return folder, write_folder(folder, 30)


def test_r11_r12_r13_r15_everything_that_is_wrong_is_found_and_nothing_else(spoiled):
    folder, expected = spoiled
    report = report_of(folder, workers=2)
    assert found(report) == expected
    assert report.stops
    assert set(expected) | {"near duplicate across splits"} == QUICK | NOT_STOPPING | {"unreadable"}


def test_other_processes_find_the_same(clean):
    folder, _ = clean
    assert report_of(folder, workers=2) == report_of(folder)


def test_the_reason_says_what_to_look_for(spoiled):
    reasons = "\n".join(map(str, report_of(spoiled[0]).problems))
    for reason in (
        "the file is empty",
        "not an image in JPEG, PNG, WEBP, GIF, BMP or TIFF, or its header is cut short",
        "12000x12000 pixels; at most 64,000,000 are read",
        "no such file",
        "the path leads out of the folder",
        "the caption is a dict; expected text or a list of texts",
        "the caption is not valid Unicode at character 5",
        "the caption is not valid Unicode at character 3",
        "no row of the metadata names it",
        "it names no file",
        "not JSON: ",
        "a list; expected an object with file_name and caption",
    ):
        assert reason in reasons


def test_a_clean_folder_has_nothing_wrong_and_its_statistics_are_exact(clean):
    folder, rows = clean
    Image.new("CMYK", (100, 20)).save(folder / "0001.jpg")
    Image.fromarray(np.full((80, 100), 999, np.uint16)).save(folder / "0000.png")
    Image.new("RGBA", (64, 64), (200, 2, 3, 255)).save(folder / "0006.png")
    rows[3]["text"] = rows[4]["text"] = rows[2]["text"]
    rows[5]["text"] = "w " * 100
    write_metadata(folder, rows)
    report = report_of(folder, held_out_percent=10.0)
    assert not report.stops
    assert not report.problems
    statistics = report.statistics
    assert statistics["rows"] == statistics["good rows"] == 30 == sum(statistics["splits"].values())
    assert statistics["splits"] == {
        name: len(CaptionedImages(build_source(config(folder)), config(folder, held_out_percent=10.0)).splits[name])
        for name in ("train", "validation", "test")
    }
    assert statistics["width"] == {"min": 64, "median": 64, "max": 100}
    assert statistics["height"] == {"min": 20, "median": 64, "max": 80}
    assert statistics["aspect"] == {"min": 1, "median": 1, "max": 5}
    assert statistics["share smaller than 64 px"] == round(1 / 30, 4)
    assert statistics["modes"] == {"RGB": 22, "P": 5, "I;16": 1, "CMYK": 1, "RGBA": 1}
    assert statistics["formats"] == dict.fromkeys(headers.FORMATS, 5)
    captions = statistics["captions"]
    assert captions["captions"] == 30
    assert captions["most repeated"] == {rows[2]["text"]: 3}
    assert captions["share of captions cut"] == round(1 / 30, 4)
    assert captions["share of tokens cut"] == round(25 / (29 * 5 + 102), 4)
    assert captions["longest, tokens"] == 102


def test_near_duplicates_across_the_split_are_told_from_those_within(clean, tmp_path):
    folder, rows = clean
    image = Image.open(folder / "0000.png")
    for number, change in enumerate((image, image.resize((128, 128)), Image.open(folder / "0006.png"))):
        change.save(folder / f"copy-{number}.jpg", quality=80)
        rows.append({"file_name": f"copy-{number}.jpg", "text": f"copy {number}"})
    image.save(folder / "same.bmp")
    rows.append({"file_name": "same.bmp", "text": "the same"})
    write_metadata(folder, rows)
    (tmp_path / "test.txt").write_text("image number 0\ncopy 1\n")
    (tmp_path / "validation.txt").write_text("image number 9\n")
    report = report_of(folder, held_out={name: str(tmp_path / f"{name}.txt") for name in ("test", "validation")})
    assert report.near_duplicates == [
        {"train": ["copy-0.jpg"], "test": ["0000.png", "copy-1.jpg"]},
        {"train": ["0006.png", "copy-2.jpg"]},
    ]
    assert report.as_json()["near duplicates"] == report.near_duplicates
    assert found(report) == {
        "near duplicate across splits": {"copy-0.jpg"},
        "near duplicate": {"0006.png"},
        "exact duplicate": {"same.bmp"},
    }
    assert report.statistics["splits"]["test"] == 3  # the same pixels share a split
    across = next(problem for problem in report.problems if problem.kind.endswith("splits"))
    assert across.reason == (
        "3 images look alike (1 in train, 2 in test; this flatters what is measured): "
        "train: copy-0.jpg; test: 0000.png, copy-1.jpg"
    )
    assert (across.row, across.like) == (30, (0, 31)), "one of each split stands first on the contact sheet"


def test_what_cannot_be_split_stops_a_training(clean):
    folder, _ = clean
    assert found(report_of(folder, held_out_percent=100.0)) == {"bad split": {"data.held_out"}}
    with pytest.raises(ValueError, match="nothing is left to train on"):
        assert CaptionedImages(build_source(config(folder)), config(folder, held_out_percent=100.0)).splits


def test_r11_r12_a_training_lists_every_offender_and_stops(spoiled):
    folder, expected = spoiled
    with pytest.raises(ValueError, match=r"leave them out with data\.on_bad_data: skip") as error:
        checked_source(config(folder))
    for kind in QUICK:
        for where in expected[kind]:
            assert f"{kind}: {where}: " in str(error.value)
    for where in NOT_STOPPING:
        assert where not in str(error.value)


def test_r11_a_training_finds_what_only_decoding_shows_before_it_begins(clean):
    folder, rows = clean
    for row in rows[:2]:
        path = folder / row["file_name"]
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"(?s)2 problem.*0000\.png.*0001\.jpg"):
        checked_source(config(folder))
    assert len(checked_source(config(folder, on_bad_data="skip"))) == 28


def test_r11_a_training_can_leave_out_what_is_bad_and_counts_it(spoiled, caplog):
    folder, expected = spoiled
    bad = set().union(*(places for kind, places in expected.items() if kind not in NOT_STOPPING))
    chosen = config(folder, on_bad_data="skip", batch_size=10, image_size=8)
    source = checked_source(chosen)
    rows = len(build_source(chosen))
    assert len(source) == rows - len(bad - expected["bad row"])
    assert f"{len(bad)} rows left out (" in caplog.text
    assert f"make an epoch of {len(source) / 10:.1f} steps of 10" in caplog.text
    assert "2 images of the folder are in no row" in caplog.text
    data = PositionDataset(CaptionedImages(source, chosen), "train", 0)
    captions = {data[position].caption for position in range(len(data))}
    given = [row["text"] for row in read_rows(folder) if row["file_name"] not in bad]
    assert captions == {text.strip() for text in given if isinstance(text, str)} | {""}


def read_rows(folder):
    lines = (folder / "metadata.jsonl").read_text(errors="surrogateescape").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith('{"file_name"') and line.endswith("}")]
    return [row for row in rows if "file_name" in row]


def test_a_clean_folder_is_trained_on_as_it_is(clean, caplog):
    folder, _ = clean
    caplog.set_level(logging.WARNING)
    source = checked_source(config(folder))
    assert (len(source), source.fingerprint) == (30, build_source(config(folder)).fingerprint)
    assert not caplog.records


def test_nothing_good_is_an_error_even_when_skipping(clean):
    folder, rows = clean
    for row in rows:
        (folder / row["file_name"]).write_bytes(b"")
    with pytest.raises(ValueError, match="not one row can be trained on") as error:
        checked_source(config(folder, on_bad_data="skip"))
    assert str(error.value).count("the file is empty") == 20
    assert "unreadable: and 10 more, 30 in all" in str(error.value)


@table(("script", "stage"), [(train_vae, "vae"), (train_text2img, "text2img")])
def test_r11_r12_the_entry_scripts_stop_before_they_begin(script, stage, spoiled, tmp_path, monkeypatch, capsys):
    arguments = [
        "--config",
        f"configs/tiny/{stage}.yaml",
        "--data.source",
        "imagefolder",
        "--data.path",
        str(spoiled[0]),
    ]
    arguments += ["--data.held_out", "{}", "--output_dir", str(tmp_path / "run"), "--loop.trackers", "[]"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2, "in lines, without a traceback"
    assert "data.on_bad_data" in capsys.readouterr().err
    torch.set_num_threads(1)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_openmoji_passes_unseen(monkeypatch):
    monkeypatch.setattr(OpenMoji, "image", None)
    assert isinstance(checked_source(DataConfig()), OpenMoji)


def test_leaving_out_another_row_is_another_set_of_images(clean):
    folder, rows = clean

    def hashes_without(number):
        spoiled = [{**row, "text": 5} if index == number else row for index, row in enumerate(rows)]
        write_metadata(folder, spoiled)
        chosen = config(folder, on_bad_data="skip")
        return CaptionedImages(checked_source(chosen), chosen).hashes

    first, second = hashes_without(0), hashes_without(1)
    assert len(first) == len(second) == 29
    assert set(first) != set(second)  # what was cached of the one is not taken for the other


def test_a_split_folder_is_read_alone(tmp_path):
    for name, count in (("train", 12), ("test", 6)):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, count, seed=count)
    (empty := tmp_path / "empty").mkdir()
    source = build_source(config(tmp_path))
    assert (len(source), source.where(0)) == (12, os.path.join("train", "0000.png"))
    assert len(build_source(config(tmp_path, split="test"))) == 6
    with pytest.raises(ValueError, match=r"data\.split: no split 'nowhere'; there are: train, test"):
        build_source(config(tmp_path, split="nowhere"))
    with pytest.raises(ValueError, match=r"no metadata\.jsonl"):
        build_source(config(empty))


def test_r11_a_pipe_is_no_image_and_is_not_waited_for(clean):
    folder, _ = clean
    (folder / "0000.png").unlink()
    os.mkfifo(folder / "0000.png")
    assert found(report_of(folder)) == {"missing": {"0000.png"}}


def table_of(tmp_path, cells):
    images = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": cells, "text": [f"row {index}" for index in range(len(cells))]}
    datasets.Dataset.from_dict(rows, features=images).to_parquet(tmp_path / "table.parquet")
    return DataConfig(source="parquet", path=str(tmp_path))


def test_r11_r15_rows_of_a_table_are_checked_as_well(tmp_path):
    rng = np.random.default_rng(0)
    whole = [encoded(noise_image(rng), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    cells = [{"bytes": data, "path": None} for data in whole]
    cells += [{"bytes": data, "path": None} for data in (whole[0][:500], b"", b"text", png(9000, 9000))]
    chosen = table_of(tmp_path, [*cells, None])
    report = inspect(build_source(chosen), chosen, words, 77)
    assert found(report) == {
        "unreadable": {"row 6", "row 7", "row 8"},
        "too large": {"row 9"},
        "missing": {"row 10"},
    }
    with pytest.raises(ValueError, match="row 10: the row has no image"):
        checked_source(chosen)
    assert report.statistics["formats"].keys() == {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}


def test_classes_that_are_none_are_found_before_training_and_left_out(tmp_path):
    rows = write_folder(tmp_path, 8)
    kinds = [0, 1, None, 2.0, "three", True, -1, 5]
    write_metadata(tmp_path, [row | {"kind": kind} for row, kind in zip(rows, kinds, strict=True)])
    chosen = config(tmp_path, class_column="kind")
    report = report_of(tmp_path, class_column="kind")
    assert found(report) == {"bad class": {rows[number]["file_name"] for number in (2, 3, 4, 5, 6)}}
    with pytest.raises(ValueError, match="the class is -1; expected 0 or more"):
        checked_source(chosen)
    left = checked_source(replace(chosen, on_bad_data="skip"))
    assert [left.class_label(row) for row in range(len(left))] == [0, 1, 5]
    assert "bad class" not in found(report_of(tmp_path)), "no column named, no classes wanted"


def test_rows_of_equal_pixels_in_another_shape_are_others():
    assert pixel_digest(Image.new("RGB", (4, 1))) != pixel_digest(Image.new("RGB", (1, 4)))
    assert pixel_digest(Image.new("RGB", (2, 2))) == pixel_digest(Image.new("RGB", (2, 2)))


def test_s05_a_table_cannot_read_files_beside_its_folder(tmp_path):
    noise_image(np.random.default_rng(0)).save(tmp_path / "secret.png")
    images = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [str(tmp_path / "secret.png")], "text": ["secret"]}
    table = datasets.Dataset.from_dict(rows, features=images)
    assert RowSource(TableRows(table, None, None, root=os.path.realpath(tmp_path))).image(0).size == (64, 64)
    for elsewhere in (os.path.realpath(tmp_path) + "/data", None):
        with pytest.raises(ImageError, match="leads out of the folder"):
            RowSource(TableRows(table, None, None, root=elsewhere)).image(0)


@table("value", [None, "", "text", ["one", None], ("zwölf", "日本"), []])
def test_r15_captions_without_fault(value):
    assert caption_fault(value) is None


@table("value", [1, 1.5, True, {}, [1], ["a", "\udcff"], b"bytes", [["nested"]]])
def test_r15_captions_with_a_fault(value):
    assert caption_fault(value)


def test_r13_a_bomb_costs_no_memory(tmp_path):
    """12000 x 12000 grey pixels are 144 MB decoded and 432 MB in RGB."""
    pack = zlib.compressobj(1)
    rows = b"".join(pack.compress(bytes(12001)) for _ in range(12000)) + pack.flush()
    (tmp_path / "bomb.png").write_bytes(png(12000, 12000, rows))
    write_metadata(tmp_path, [{"file_name": "bomb.png", "text": "boom"}] * 2)
    code = (
        "from pathlib import Path\n"
        "import datasets\n"
        "from ldm.config import DataConfig\n"
        "from ldm.data.inspection import inspect\n"
        "from ldm.data.sources import build_source\n"
        "def peak():\n"
        "    return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "before = peak()\n"
        f"config = DataConfig(source='imagefolder', path={str(tmp_path)!r})\n"
        "report = inspect(build_source(config), config, len, 77)\n"
        "print(len(report.problems), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    problems, grown = map(int, done.stdout.split())
    assert problems == 2
    assert grown < 50_000  # kilobytes


def test_errors_of_the_disk_are_not_blamed_on_the_image(monkeypatch, tmp_path):
    noise_image(np.random.default_rng(0)).save(tmp_path / "sound.png")

    def failing(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(headers.Image, "open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        open_image(str(tmp_path / "sound.png"))


def test_kinds_of_data_are_told_apart(tmp_path, clean):
    folder, _ = clean
    assert source_config("openmoji").source == "openmoji"
    assert source_config(str(folder)).source == "imagefolder"
    assert source_config("someone/images").source == "dataset"
    table_of(tmp_path, [None])
    assert source_config(str(tmp_path / "table.parquet")).source == "parquet"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    assert source_config(str(tmp_path / "saved")).source == "dataset"
    assert source_config(str(tmp_path), image_size=8) == DataConfig(source="parquet", path=str(tmp_path), image_size=8)


def test_the_command_writes_its_report_and_a_sheet(spoiled, tmp_path, capsys):
    folder, expected = spoiled
    with pytest.raises(SystemExit) as stopped:
        cli.main(["validate", str(folder), "--out", str(tmp_path), "--workers", "0"])
    assert stopped.value.code == 1
    written = json.loads((tmp_path / "validation.json").read_text())
    assert {kind: {row["where"] for row in rows} for kind, rows in written["problems"].items()} == expected
    assert written["trainable"] is False
    assert written["captions"]["share of captions cut"] == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "a training would stop"
    assert "\nwidth: min 40, median 64.0, max 64\n" in printed
    assert all(where in printed for places in expected.values() for where in places)
    assert Image.open(tmp_path / "contact_sheet.png").width > 700


def test_the_command_ends_well_on_good_data_and_counts_with_the_tokenizer_given(clean, tmp_path, capsys):
    folder, rows = clean
    rows[0]["text"] = "x " * 20
    write_metadata(folder, rows)
    train_tokenizer(["image number"], 600, 10).save_pretrained(tmp_path / "model" / "tokenizer")
    for tokenizer in (tmp_path / "model", tmp_path / "model" / "tokenizer"):
        chosen = ["--tokenizer", str(tokenizer), "--max_length", "10", "--workers", "0"]
        cli.main(["validate", str(folder), "--out", str(tmp_path), *chosen])
        captions = json.loads((tmp_path / "validation.json").read_text())["captions"]
        assert captions["longest, tokens"] == 22
        assert captions["share of captions cut"] == round(1 / 30, 4)
    assert capsys.readouterr().out.splitlines()[-1] == "nothing here stops a training"


def test_a_file_name_of_any_bytes_can_be_read_and_reported(clean, tmp_path):
    folder, rows = clean
    name = os.fsdecode(b"\xff.png")
    (folder / name).write_bytes((folder / "0000.png").read_bytes())
    write_metadata(folder, rows, b'{"file_name": "\xff.png", "text": "odd"}\n')
    cli.main(["validate", str(folder), "--out", str(tmp_path), "--workers", "0"])
    problems = json.loads((tmp_path / "validation.json").read_text())["problems"]
    assert problems == {"exact duplicate": [{"where": name, "reason": "the same pixels as 0000.png"}]}


def test_held_out_lists_reach_the_command(clean, tmp_path):
    folder, _ = clean
    (tmp_path / "test.txt").write_text("image number 3\n")
    (tmp_path / "validation.txt").write_text("image number 4\n")
    held_out = json.dumps({name: str(tmp_path / f"{name}.txt") for name in ("test", "validation")})
    cli.main(["validate", str(folder), "--out", str(tmp_path), "--held_out", held_out, "--workers", "0"])
    assert json.loads((tmp_path / "validation.json").read_text())["splits"] == {"train": 28, "validation": 1, "test": 1}
