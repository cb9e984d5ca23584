"""Names of images by their bytes: the same wherever and whenever they were written, and read once."""

import multiprocessing
import os
import shutil
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import datasets
import pytest

from ldm.config import DataConfig
from ldm.data import content_hashes as module
from ldm.data.batches import CaptionedImages
from ldm.data.content_hashes import content_hashes, file_hash, images_fingerprint
from ldm.data.openmoji import OpenMoji
from ldm.data.sources import build_source
from ldm.files import locked

from .image_folders import write_folder, write_metadata
from .table import table
from .test_batches import encode

LAYOUTS = ("imagefolder", "parquet", "parquet of paths", "dataset")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def six(folder):
    """Write six images, which every layout is made of, into a folder in this one; return their rows."""
    (folder / "images").mkdir()
    return write_folder(folder / "images", 6)


@pytest.fixture
def rows(tmp_path):
    return six(tmp_path)


def data(layout, folder, rows):
    """Write the images of a folder, and their captions, in a layout; return the config that reads them."""
    if layout == "imagefolder":
        return DataConfig(source="imagefolder", path=str(folder), image_size=8, held_out_percent=0.0)
    files = [str(folder / row["file_name"]) for row in rows]
    cells = files if layout == "parquet of paths" else [{"bytes": Path(file).read_bytes()} for file in files]
    columns = {"image": cells, "text": [row["text"] for row in rows]}
    shutil.rmtree(folder / "table", ignore_errors=True)
    (folder / "table").mkdir()
    if layout == "dataset":
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.save_to_disk(folder / "table")
    else:
        datasets.Dataset.from_dict(columns).to_parquet(folder / "table" / "part.parquet")
    path = folder if layout == "parquet of paths" else folder / "table"
    if layout == "parquet of paths":
        (folder / "table" / "part.parquet").rename(folder / "part.parquet")
    source = "dataset" if layout == "dataset" else "parquet"
    return DataConfig(source=source, path=str(path), image_size=8, held_out_percent=0.0)


def fingerprint(config):
    return build_source(config).fingerprint


def expected(folder, rows):
    hashes = (blake2b((folder / row["file_name"]).read_bytes(), digest_size=16).digest() for row in rows)
    return "images-" + blake2b(b"".join(hashes), digest_size=16).hexdigest()


@table("layout", LAYOUTS)
def test_r25_the_same_bytes_elsewhere_and_later_are_the_same_images(layout, tmp_path):
    rows = six(tmp_path)
    folder = tmp_path / "images"
    config = data(layout, folder, rows)
    before = expected(folder, rows)
    assert fingerprint(config) == before
    CaptionedImages(build_source(config), config).encoded("test", encode)
    for path in folder.rglob("*"):
        os.utime(path, ns=(0, 1))
    assert fingerprint(config) == before, "touched"
    shutil.copytree(folder, copied := tmp_path / "elsewhere" / "copied")
    moved = replace(config, path=config.path.replace(str(folder), str(copied)))
    if layout == "parquet of paths":
        moved = data(layout, copied, rows)
    assert fingerprint(moved) == before, "copied"
    captions = [row | {"text": "another caption"} for row in rows]
    write_metadata(folder, captions)
    assert fingerprint(data(layout, folder, captions)) == before, "captions are no images"
    (folder / rows[0]["file_name"]).rename(folder / "renamed.png")
    renamed = [{**rows[0], "file_name": "renamed.png"}, *rows[1:]]
    write_metadata(folder, renamed)
    again = data(layout, folder, renamed)
    assert fingerprint(again) == before, "renamed"
    CaptionedImages(build_source(again), again).encoded("test", None)  # not computed again


@table("layout", LAYOUTS)
def test_r25_other_bytes_are_other_images(layout, tmp_path):
    rows = six(tmp_path)
    folder = tmp_path / "images"
    names = {fingerprint(data(layout, folder, rows))}
    file = folder / rows[2]["file_name"]
    state, before = file.stat(), file.read_bytes()
    for bit in (1, 2, 3):
        file.write_bytes(before[:-1] + bytes([before[-1] ^ bit]))
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        names.add(fingerprint(data(layout, folder, rows)))
    file.write_bytes(before)
    write_metadata(folder, rows[::-1])
    names.add(fingerprint(data(layout, folder, rows[::-1])))
    write_metadata(folder, rows[:-1])
    names.add(fingerprint(data(layout, folder, rows[:-1])))
    assert len(names) == 6


def test_r25_a_table_whose_file_was_exchanged_below_it_is_another(tmp_path, rows):
    config = data("dataset", tmp_path / "images", rows)
    table = tmp_path / "images" / "table"
    before, state = fingerprint(config), (table / "state.json").read_bytes()
    data("dataset", tmp_path / "images", rows[::-1])
    (table / "state.json").write_bytes(state)
    assert fingerprint(config) == expected(tmp_path / "images", rows[::-1]) != before


def test_r25_parquet_that_was_exchanged_under_its_mtime_is_read_anew(tmp_path, rows):
    for order in (rows, rows[::-1]):
        config = data("parquet", tmp_path / "images", order)
        os.utime(tmp_path / "images" / "table" / "part.parquet", ns=(0, 10**18))
        source = build_source(config)
        assert source.captions(0) == (order[0]["text"],)
        assert source.fingerprint == expected(tmp_path / "images", order)


@table("layout", LAYOUTS)
def test_a_warm_start_reads_no_image(layout, tmp_path, monkeypatch):
    rows = six(tmp_path)
    config = data(layout, tmp_path / "images", rows)
    before = [fingerprint(config), fingerprint(config)]  # the second reads what was kept of the cells
    monkeypatch.setattr(module, "file_hash", None)
    monkeypatch.setattr("ldm.data.rows.content_hash", None)
    assert {fingerprint(config), *before} == {expected(tmp_path / "images", rows)}


def test_only_what_changed_is_read_again(tmp_path, rows, monkeypatch):
    paths = [str(tmp_path / "images" / row["file_name"]) for row in rows]
    content_hashes(str(tmp_path), paths)
    read = []
    monkeypatch.setattr(module, "file_hash", lambda path: (read.append(path), file_hash(path))[1])
    os.utime(paths[1])
    shutil.copy(paths[2], tmp_path / "copy")
    os.replace(tmp_path / "copy", paths[3])
    assert content_hashes(str(tmp_path), paths) == list(map(file_hash, paths))
    assert sorted(read) == [paths[1], paths[3]]


def test_a_file_that_is_written_again_at_once_with_size_and_mtime_as_before_is_another(tmp_path):
    path = tmp_path / "file"
    for number in range(20):
        path.write_bytes(b"%09d" % number)
        os.utime(path, ns=(0, 0))
        assert content_hashes("", [str(path)]) == [file_hash(path)], number


def test_a_file_that_changes_while_it_is_read_is_not_taken_to_be_known(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def changed_meanwhile(name):
        value = file_hash(name)
        path.write_bytes(b"after.")
        return value

    monkeypatch.setattr(module, "file_hash", changed_meanwhile)
    content_hashes("", [str(path)])
    monkeypatch.undo()
    assert content_hashes("", [str(path)]) == [file_hash(path)]


def test_a_file_whose_times_are_ahead_of_the_clock_is_read_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    waited = []
    monkeypatch.setattr(module.time, "time_ns", lambda: 0)
    monkeypatch.setattr(module.time, "sleep", waited.append)
    content_hashes("", [str(tmp_path / "file")])
    content_hashes("", [str(tmp_path / "file")])
    assert waited == [2.0, 2.0]


def test_what_cannot_be_read_is_no_error_and_told_from_what_can(tmp_path, rows):
    folder = tmp_path / "images"
    config = data("imagefolder", folder, rows)
    whole = fingerprint(config)
    (folder / rows[0]["file_name"]).unlink()
    (folder / rows[1]["file_name"]).unlink()
    (folder / rows[1]["file_name"]).symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    broken = fingerprint(config)
    assert broken == fingerprint(config) != whole
    assert content_hashes("", [None, str(tmp_path), str(tmp_path / "nowhere")]) == [None] * 3
    table = datasets.Dataset.from_dict({"image": [None, "nowhere.png", "a\0b", ""], "text": list("abcd")})
    table.to_parquet(tmp_path / "part.parquet")
    assert fingerprint(DataConfig(source="parquet", path=str(tmp_path))) == images_fingerprint([None] * 4)


def kept(tmp_path):
    return next((tmp_path / "cache" / "file-hashes").glob("*/hashes.safetensors"))


def test_no_flipped_bit_of_the_hashes_that_are_kept_gives_a_file_another(tmp_path, rows, caplog):
    paths = [str(tmp_path / "images" / row["file_name"]) for row in rows]
    content_hashes("", paths)
    truth, file = module._load(kept(tmp_path).parent), kept(tmp_path)
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert module._load(file.parent) in ({}, truth)
    caplog.clear()
    for damaged in (b"", whole[: len(whole) // 2], b"{}" * 200, bytes(len(whole))):
        file.write_bytes(damaged)
        assert content_hashes("", paths) == list(map(file_hash, paths))
        assert str(file) in caplog.text
        assert file.read_bytes() == whole
        caplog.clear()


def test_hashes_of_other_files_are_kept_up_to_a_number(tmp_path, rows, monkeypatch):
    paths = [str(tmp_path / "images" / row["file_name"]) for row in rows]
    content_hashes("", paths[:4])
    content_hashes("", paths[4:])
    assert len(module._load(kept(tmp_path).parent)) == 6
    monkeypatch.setattr(module, "KEPT", 1)
    os.utime(paths[0])
    content_hashes("", paths[:1])
    assert len(module._load(kept(tmp_path).parent)) == 2


def test_a_cache_that_cannot_be_written_costs_time_and_no_run(tmp_path, rows, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file"))
    config = data("imagefolder", tmp_path / "images", rows)
    assert fingerprint(config) == expected(tmp_path / "images", rows)
    assert "hashes of files cannot be kept" in caplog.text


def test_processes_that_start_together_read_a_file_once(tmp_path, rows, monkeypatch):
    paths = [str(tmp_path / "images" / row["file_name"]) for row in rows]
    ledger = os.open(tmp_path / "read", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    monkeypatch.setattr(module, "file_hash", lambda path: (os.write(ledger, f"{path}\n".encode()), file_hash(path))[1])
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=content_hashes, args=("", paths)) for _ in range(3)]
    with locked(module.entry_folder("file-hashes", "")):  # all wait, and then go
        for process in processes:
            process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted((tmp_path / "read").read_text().split()) == sorted(paths)


def test_r25_openmojis_name_has_all_that_its_images_depend_on_and_no_more(monkeypatch):
    import emoji

    before = OpenMoji(64).fingerprint
    assert before.startswith("images-openmoji-17.")
    assert OpenMoji(64, ("de", "en"), "group").fingerprint == before
    names = {before, OpenMoji(32).fingerprint}
    monkeypatch.setitem(
        emoji.EMOJI_DATA, "\N{SLICE OF PIZZA}", dict(emoji.EMOJI_DATA["\N{SLICE OF PIZZA}"], en=":another_caption:")
    )
    assert OpenMoji(64).fingerprint == before
    monkeypatch.delitem(emoji.EMOJI_DATA, "\N{SLICE OF PIZZA}")
    names.add(OpenMoji(64).fingerprint)
    monkeypatch.undo()
    monkeypatch.setattr("ldm.data.openmoji.metadata.version", lambda name: "another")
    names.add(OpenMoji(64).fingerprint)
    assert len(names) == 4
