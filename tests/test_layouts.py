"""Splits and columns are read as `datasets` reads them, in every layout of a table; where not, it is said why."""

import json
import logging
import re
from io import BytesIO
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.data.inspection import inspect
from ldm.data.preflight import checked_source
from ldm.data.sources import build_source, source_config
from ldm.evaluation.evaluation import read_as_trained
from ldm.models.provenance import Provenance
from ldm.training.record import data_options

from .table import table


def image(number):
    return Image.fromarray(np.full((4, 4, 3), number, np.uint8))


def png(number):
    file = BytesIO()
    image(number).save(file, "PNG")
    return file.getvalue()


def numbers_of(path, split="train", **more):
    """The number that each image of a split shows and its caption, as a training, validate and evaluate read them."""
    config = source_config(str(path), split=split, **more)  # of validate
    trained = DataConfig(source=config.source, path=str(path), split=split, **more)
    record = Provenance("data", "0" * 32, 1, 1, 1.0, 1.0, "none", {}, data_options=data_options(trained))
    readings = (config, trained, read_as_trained(record, str(path), {}, {}))
    try:
        sources = [build_source(reading) for reading in readings]
    except ValueError as error:
        for reading in readings:
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                build_source(reading)
        raise
    numbers, *others = (
        sorted((source.image(row).getpixel((0, 0))[0], source.captions(row)) for row in range(len(source)))
        for source in sources
    )
    assert others == [numbers, numbers]
    return numbers


def expected(numbers):
    return [(number, (f"number {number}",)) for number in numbers]


def splits_of_datasets(table):
    return {split: sorted(image.getpixel((0, 0))[0] for image in rows["image"]) for split, rows in table.items()}


def write_images(folder, files):
    """Write ``{path of a metadata file: paths beside it}`` and the images, numbered as they come."""
    count = 0
    for metadata, names in files.items():
        rows = []
        for name in names:
            path = folder / Path(metadata).parent / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image(count).save(path)
            rows.append({"file_name": name, "text": f"number {count}"})
            count += 1
        (folder / metadata).write_text("".join(json.dumps(row) + "\n" for row in rows))


IMAGE_FOLDERS = {
    "flat": {"metadata.jsonl": ["0.png", "1.png"]},
    "folders that are no splits": {"metadata.jsonl": ["a/0.png", "b/1.png"]},
    "metadata in each split": {"train/metadata.jsonl": ["0.png", "1.png"], "test/metadata.jsonl": ["2.png"]},
    "splits below another folder": {"data/train/metadata.jsonl": ["0.png"], "data/dev/metadata.jsonl": ["1.png"]},
    "metadata above the splits": {"metadata.jsonl": ["train/0.png", "train/1.png", "test/2.png"]},
    "metadata far above the splits": {"metadata.jsonl": ["images/train/0.png", "images/val/1.png"]},
    "splits by another name": {"training/metadata.jsonl": ["0.png"], "eval_2/metadata.jsonl": ["1.png"]},
    "names of files": {"metadata.jsonl": ["train-0.png", "train_1.png", "my test 2.png"]},
    "one split": {"metadata.jsonl": ["test/0.png", "test/1.png"]},
}


@table("layout", IMAGE_FOLDERS)
def test_r26_splits_of_image_folders_are_those_of_datasets_and_captions_come_along(layout, tmp_path):
    write_images(tmp_path / "images", IMAGE_FOLDERS[layout])
    wanted = splits_of_datasets(datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images")))
    for split, numbers in wanted.items():
        assert numbers_of(tmp_path / "images", split) == expected(numbers)
    for split in {"train", "test", "validation", "nowhere"} - wanted.keys():
        with pytest.raises(ValueError, match=rf"^data\.split: no split '{split}'; there are: {', '.join(wanted)}$"):
            numbers_of(tmp_path / "images", split)


PARQUET = {
    "flat": (["a.parquet", "b.parquet"], ""),
    "shards beside one another": (["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"], ""),
    "a clone of the Hub": (
        ["data/train-00000-of-00001-0123456789abcd.parquet", "data/odd-00000-of-00001.parquet"],
        "",
    ),
    "folders": (["train/0.parquet", "train/1.parquet", "valid/0.parquet"], ""),
    "names": (["birds_train.parquet", "birds_test.parquet", "birds.parquet"], ""),
    "a card": (
        ["a/x.parquet", "b/x.parquet", "b/y.parquet"],
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*\n"
        "  - split: odd\n    path: [b/x*, b/y*]\n---\n",
    ),
    "a card of one config": (
        ["train/x.parquet", "b/x.parquet"],
        "---\nconfigs:\n- config_name: b\n  data_files: b/*.parquet\n---\n",
    ),
}


@table("layout", PARQUET)
def test_r26_splits_of_tables_are_those_of_datasets(layout, tmp_path):
    folder = tmp_path / "tables"
    names, card = PARQUET[layout]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": png(number), "path": None}]
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict({"image": cells, "text": [f"number {number}"]}, features).to_parquet(folder / name)
    if card:
        (folder / "README.md").write_text(card)
    wanted = splits_of_datasets(datasets.load_dataset(str(folder)))
    for split, numbers in wanted.items():
        assert numbers_of(folder, split) == expected(numbers)
    assert numbers_of(folder, "+".join(wanted)) == expected(sorted(chain.from_iterable(wanted.values())))
    with pytest.raises(ValueError, match="no split 'nowhere'; there are: ") as error:
        numbers_of(folder, "nowhere")
    assert set(str(error.value).partition("there are: ")[2].split(", ")) == wanted.keys()
    assert numbers_of(folder / names[0]) == expected([0])
    with pytest.raises(ValueError, match="no split 'test'; there are: train"):
        numbers_of(folder / names[0], "test")


def test_r26_splits_of_saved_data_sets_are_theirs(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    one = datasets.Dataset.from_dict({"image": [image(1)], "text": ["number 1"]}, features, split="test")
    datasets.DatasetDict({"train": one, "odd": one}).save_to_disk(tmp_path / "several")
    one.save_to_disk(tmp_path / "one")
    for folder, splits in (("several", ("train", "odd")), ("one", ("train", "test"))):
        for split in splits:
            assert numbers_of(tmp_path / folder, split) == expected([1])
        with pytest.raises(ValueError, match=f"no split 'nowhere'; there are: {', '.join(splits)}"):
            numbers_of(tmp_path / folder, "nowhere")


def test_r26_a_card_with_several_configs_and_no_default_is_refused(tmp_path):
    card = (
        "---\nconfigs:\n- config_name: de\n  data_files: a.parquet\n- config_name: en\n  data_files: b.parquet\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="names the configs de, en and no default: name the folder or the file of one"):
        numbers_of(tmp_path)


def test_r26_one_image_called_like_a_split_is_no_split(tmp_path, caplog):
    """`datasets` would read test-tube.png alone, as a test split, and leave out the others."""
    write_images(tmp_path, {"metadata.jsonl": ["0.png", "1.png", "test-tube.png"]})
    assert numbers_of(tmp_path) == expected([0, 1, 2])
    assert "test-tube.png looks like split test by its name, 0.png like none: all are train" in caplog.text


def test_r26_rows_of_images_in_no_split_are_counted_and_those_of_others_are_not_our_problem(tmp_path, caplog):
    write_images(tmp_path, {"metadata.jsonl": ["train/0.png", "extra/1.png"], "test/metadata.jsonl": ["2.png"]})
    with (tmp_path / "test" / "metadata.jsonl").open("a") as more:
        more.write("[no row]\n")
    image(7).save(tmp_path / "test" / "unlisted.png")
    source = build_source(source_config(str(tmp_path)))
    assert [(problem.kind, problem.where) for problem in source.problems] == [("in no split", "extra/1.png")]
    assert len(checked_source(source_config(str(tmp_path)))) == 1
    assert "1 rows are of images in no split and left out, such as extra/1.png" in caplog.text


def test_r26_validate_and_train_read_the_same_of_every_kind_of_data(tmp_path):
    write_images(tmp_path / "images", {"metadata.jsonl": ["train/0.png", "train/1.png", "test/2.png"]})
    (tmp_path / "tables").mkdir()
    table = pyarrow.table({"image": [png(number) for number in range(2)], "text": ["number 0", "number 1"]})
    for name in ("train.parquet", "test.parquet"):
        pyarrow.parquet.write_table(table, tmp_path / "tables" / name)
    for name, rows in (("images", {"train": 2, "test": 1}), ("tables", {"train": 2, "test": 2})):
        for split, count in rows.items():
            config = source_config(str(tmp_path / name), split=split)
            report = inspect(build_source(config), config, lambda some: [1] * len(some), 77)
            assert report.statistics["rows"] == len(checked_source(config)) == count
            assert build_source(config).fingerprint == checked_source(config).fingerprint


@table("named", ["folder", "file"])
def test_r26_image_paths_are_relative_to_their_parquet_file(named, tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    image(3).save(tmp_path / "data" / "images" / "3.png")
    table = pyarrow.table({"image": ["images/3.png", "../../elsewhere.png"], "text": ["number 3", "number 4"]})
    image(4).save(tmp_path.parent / "elsewhere.png")
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train.parquet")
    source = build_source(source_config(str(tmp_path if named == "folder" else tmp_path / "data" / "train.parquet")))
    assert source.image(0).getpixel((0, 0))[0] == 3
    with pytest.raises(ValueError, match="the path leads out of the folder"):
        source.image(1)


BINARY, KEY = pyarrow.binary(), pyarrow.int32()
STRUCT = pyarrow.struct({"bytes": pyarrow.large_binary(), "path": pyarrow.string_view()})
COLUMNS = {  # what pandas, polars and others write
    "bytes": (BINARY, pyarrow.string()),
    "large": (pyarrow.large_binary(), pyarrow.large_string()),
    "views": (pyarrow.binary_view(), pyarrow.string_view()),
    "dictionaries": (
        pyarrow.dictionary(pyarrow.int32(), BINARY),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ),
    "struct and list": (STRUCT, pyarrow.list_(pyarrow.string_view())),
    "large list": (BINARY, pyarrow.large_list(pyarrow.large_string())),
    "no text": (BINARY, pyarrow.null()),
}


@table("kind", COLUMNS)
def test_r26_columns_of_every_writer_are_read(kind, tmp_path):
    images, texts = COLUMNS[kind]
    cell = {"bytes": png(5), "path": None} if images is STRUCT else png(5)
    text = None if kind == "no text" else ["number 5"] if "list" in kind else "number 5"
    table = pyarrow.table({"image": pyarrow.array([cell], images), "text": pyarrow.array([text], texts)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert numbers_of(tmp_path) == ([(5, ())] if kind == "no text" else expected([5]))


@table("kind", ["torch", "numpy", "pandas", "arrow", "columns"])
def test_r26_a_format_that_a_table_was_saved_with_changes_nothing(kind, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    table = datasets.Dataset.from_dict({"image": [image(6)], "text": [["number 6", "six"]]}, features)
    formatted = table.with_format("torch", columns=["image"]) if kind == "columns" else table.with_format(kind)
    formatted.save_to_disk(tmp_path / "saved")
    assert numbers_of(tmp_path / "saved") == [(6, ("number 6", "six"))]


IMAGE_KEYS = [  # keys of the rows in any order, what data.image_column says, the key that names the images
    (["file_name", "text"], None, "file_name"),
    (["image", "file_name"], None, "file_name"),
    (["file_name", "text_file_name"], None, "file_name"),
    (["file_name", "mask_file_name", "conditioning_image_file_name"], None, "file_name"),
    (["picture_file_name", "mask_file_name"], None, "picture_file_name"),
    (["photo_file_name", "text_file_name"], None, "photo_file_name"),
    (["img", "text"], None, "img"),
    (["image", "file_name"], "image", "image"),
    (["file_name"], "image", "file_name"),
    (["image_file_name", "photo_file_name"], "photo", "photo_file_name"),
    (["file_name", "image_file_name"], None, "data.image_column: any of file_name, image_file_name may be it"),
    (["photo_file_name", "mask_file_name"], None, "any of photo_file_name, mask_file_name may be it"),
    (["img", "picture"], None, "any of picture, img may be it among the columns"),
    (["image", "photo_file_name"], None, "any of image, photo_file_name may be it"),
    (["text"], None, "data.image_column: none of the usual names image, "),
    (["image"], "photo", "data.image_column: no column 'photo' among the columns image"),
]


@table("backwards", [False, True])
@table(("keys", "wanted", "found"), IMAGE_KEYS)
def test_r26_the_key_that_names_the_images(keys, wanted, found, backwards, tmp_path):
    image(1).save(tmp_path / "1.png")
    row = {key: "1.png" if key == found else f"other {key}" for key in keys[:: -1 if backwards else 1]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    config = source_config(str(tmp_path), image_column=wanted)
    if found in keys:
        assert build_source(config).image(0).getpixel((0, 0))[0] == 1
    else:
        listed = found.partition("any of ")[2].partition(" may")[0].split(", ") if "any of" in found else [found]
        with pytest.raises(ValueError, match="name the right one") as error:
            build_source(config)
        assert all(name in str(error.value) for name in listed)


def test_r26_a_caption_column_that_was_chosen_by_its_name_is_said_and_two_are_an_error(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    image(1).save(tmp_path / "1.png")
    row = {"file_name": "1.png", "prompt": "one", "text_file_name": "1.txt"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert numbers_of(tmp_path) == [(1, ("one",))]
    assert "data.caption_column: 'prompt', by its name" in caplog.text
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row | {"text": "two"}))
    with pytest.raises(ValueError, match=r"data\.caption_column: any of text, prompt may be it .*; name the right one"):
        numbers_of(tmp_path)
    assert numbers_of(tmp_path, caption_column="text") == [(1, ("two",))]


def test_r26_the_image_column_of_a_table_is_the_one_of_images(tmp_path):
    features = {"image": datasets.Value("string"), "photo": datasets.Image(), "text": datasets.Value("string")}
    rows = {"image": ["https://example.org/1"], "photo": [image(8)], "text": ["number 8"]}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features))
    table.save_to_disk(tmp_path / "one")
    assert numbers_of(tmp_path / "one") == expected([8])
    table.add_column("jpg", [png(9)]).remove_columns("photo").save_to_disk(tmp_path / "bytes")
    assert numbers_of(tmp_path / "bytes") == [(9, ("number 8",))]
    table.add_column("mask", [{"bytes": png(0), "path": None}], feature=datasets.Image()).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"data\.image_column: any of photo, mask may be it"):
        numbers_of(tmp_path / "two")


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@table("encoding", ENCODINGS)
@table("end", ["\n", "\r\n", "\r"])
def test_r26_metadata_of_every_encoding_and_line_end_is_read(encoding, end, tmp_path):
    image(1).save(tmp_path / "1.png")
    for name, lines in {
        "metadata.jsonl": ['{"file_name": "1.png", "text": "größe 日本\u2028🐈"}'],
        "metadata.csv": ["file_name,text", '1.png,"größe 日本\u2028🐈"'],
    }.items():
        for other in tmp_path.glob("metadata.*"):
            other.unlink()
        (tmp_path / name).write_bytes((end.join(lines) + end).encode(encoding))
        assert numbers_of(tmp_path) == [(1, ("größe 日本\u2028🐈",))]


def test_r26_absolute_names_and_those_of_windows_are_of_the_images_in_the_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    names = ["a/1.png", "a/2.png", "a/3.png"]
    write_images(tmp_path / "images", {"metadata.jsonl": names})
    written = [str(tmp_path / "images" / names[0]), "a\\2.png", str(tmp_path / "link" / names[2])]
    rows = [json.dumps({"file_name": name, "text": f"number {number}"}) for number, name in enumerate(written)]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    source = build_source(source_config(str(tmp_path / "images")))
    assert [source.where(row) for row in range(3)] == names
    assert not source.problems


CSV_FAULTS = {
    "an unquoted comma": (b"file_name,text\n1.png,a cat, asleep\n", "more fields than the 2 columns; quote texts"),
    "a column twice": (b"file_name,text,text\n1.png,a,b\n", "several columns are called 'text'"),
    "a quote without end": (b'file_name,text\n1.png,"a cat\n', "not CSV: unexpected end of data"),
    "half a character of UTF-16": ("file_name,text\n1.png,a".encode("utf-16") + b"\0", "not text in UTF-16"),
}


@table("fault", CSV_FAULTS)
def test_r26_rows_of_csv_that_would_be_misread_are_named(fault, tmp_path):
    image(1).save(tmp_path / "1.png")
    data, reason = CSV_FAULTS[fault]
    (tmp_path / "metadata.csv").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        checked_source(DataConfig(source="imagefolder", path=str(tmp_path)))
