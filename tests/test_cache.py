"""Everything that is kept between runs: interrupted, damaged, shared by processes, listed and deleted."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from ldm.commands import cli
from ldm.data import cache
from ldm.data.cache import CachedRows
from ldm.data.cache_folder import cache_folder, clear, kinds

from .table import table
from .test_checkpoint import damage


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def test_an_interrupted_cache_build_goes_on_where_it_stopped():
    calls = []

    def compute(rows, fail_at=None):
        calls.extend(rows)
        if fail_at in rows:
            raise KeyboardInterrupt
        return {"value": torch.tensor([float(row) for row in rows])}

    with pytest.raises(KeyboardInterrupt):
        CachedRows("test", "interrupted", 10, lambda rows: compute(rows, fail_at=7), rows_per_shard=4)
    calls.clear()
    rows = CachedRows("test", "interrupted", 10, compute, rows_per_shard=4)
    assert sorted(calls) == list(range(4, 10))  # the first shard was kept
    assert [float(rows[row]["value"]) for row in range(10)] == list(range(10))
    calls.clear()
    CachedRows("test", "interrupted", 10, compute, rows_per_shard=4)
    CachedRows("test", "another key", 10, compute, rows_per_shard=4)
    assert sorted(calls) == list(range(10))  # only for the new key


def compute_numbers(rows, calls):
    calls.extend(rows)
    return {"value": torch.tensor([float(row) for row in rows]), "square": torch.tensor([row**2 for row in rows])}


def numbers(calls=None):
    """Ten rows in three shards that know their number; `calls` takes the rows that are computed."""
    calls = [] if calls is None else calls
    return CachedRows("test", "numbers", 10, lambda rows: compute_numbers(rows, calls), rows_per_shard=4)


def shards(rows):
    return sorted(rows.folder.glob("*.safetensors"))


@table("how", ["emptied", "truncated", "zeroed", "flipped", "deleted", "exchanged", "of equal times"])
def test_r25_a_damaged_shard_is_named_and_computed_again(how, caplog):
    path = shards(numbers())[1]
    before, state = path.read_bytes(), path.stat()
    match how:
        case "exchanged":
            path.write_bytes(shards(numbers())[0].read_bytes())
        case "of equal times":
            numbers()  # its hash is known by now
            damage(path, "flipped")
            os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        case _:
            damage(path, how)
    calls = []
    rows = numbers(calls)
    assert [float(rows[row]["value"]) for row in range(10)] == list(range(10))
    assert rows.column("square").tolist() == [row**2 for row in range(10)]
    assert calls == [4, 5, 6, 7]
    assert path.read_bytes() == before
    assert [record.getMessage().startswith(f"{path} is damaged") for record in caplog.records] == (
        [] if how == "deleted" else [True]
    )
    caplog.clear()
    calls.clear()
    numbers(calls)
    assert (calls, caplog.records) == ([], [])


def test_r25_no_flipped_bit_of_a_shard_is_taken_for_data(caplog):
    path = shards(numbers())[0]
    data = path.read_bytes()
    for place in range(0, len(data), 41):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        numbers()
        assert path.read_bytes() == data, place
    assert len(caplog.records) == len(range(0, len(data), 41))


def test_bytes_that_are_known_are_not_read_again(monkeypatch):
    numbers()
    numbers()  # reads what was written, once
    monkeypatch.setattr("ldm.data.content_hashes.file_hash", None)
    assert float(numbers()[7]["value"]) == 7


def test_what_is_kept_is_flushed_before_it_is_renamed(monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((Path(a), Path(b))), replace(a, b)))
    rows = numbers()
    files = [*shards(rows)]
    numbers()
    files += cache_folder().glob("file-hashes/*/hashes.safetensors")
    assert len(events) == 3 * len(files) == 12
    for file, (flushed, renamed, folder) in zip(files, zip(*[iter(events)] * 3, strict=True), strict=True):
        assert renamed == (flushed, file)
        assert folder == file.parent


def test_processes_that_start_together_share_the_work_on_what_is_missing_or_damaged(tmp_path):
    rows = numbers()
    damage(shards(rows)[2], "truncated")
    shards(rows)[0].unlink()
    context = multiprocessing.get_context("fork")
    begun, written = context.Barrier(3), context.Barrier(3)

    def start(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
        calls = []
        put = cache.put_in_place

        def computed(rows):
            if not calls:
                begun.wait(60)  # all have seen what is missing
            return compute_numbers(rows, calls)

        cache.put_in_place = lambda aside, path: (put(aside, path), written.wait(60))
        values = CachedRows("test", "numbers", 10, computed, rows_per_shard=4).column("value").tolist()
        (tmp_path / f"{rank}.txt").write_text(f"{values} {calls}")

    processes = [context.Process(target=start, args=(rank,)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    right = [float(row) for row in range(10)]
    found = [(tmp_path / f"{rank}.txt").read_text() for rank in range(3)]
    assert found == [f"{right} {shard}" for shard in ([0, 1, 2, 3], [0, 1, 2, 3], [8, 9])]
    assert len(shards(rows)) == 3
    assert not list(rows.folder.glob("*.tmp"))


def test_shards_that_vanish_as_they_are_written_are_an_error(monkeypatch):
    monkeypatch.setattr(cache, "put_in_place", lambda aside, path: None)
    monkeypatch.setattr(CachedRows, "_build", lambda *_: {})
    with pytest.raises(OSError, match="shards that were just written are gone or damaged"):
        numbers()


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}


@pytest.fixture
def foreign(tmp_path):
    """Files of other people in the cache folder and links out of it, named as ours are; and then ours beside them."""
    own = numbers().folder
    for kept in kinds():
        clear(kept.name)
    outside = tmp_path / "outside" / own.name
    shard = f"000000000-{'b' * 32}.safetensors"
    for folder in (outside, own, cache_folder() / "photographs", cache_folder()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "notes.safetensors").write_bytes(b"precious")
    (outside / shard).write_bytes(b"precious")
    (cache_folder() / "photographs" / shard).write_bytes(b"precious")
    (cache_folder() / "linked").symlink_to(outside.parent)
    (own.parent / ("a" * 24)).symlink_to(outside)
    (own / "000000009.safetensors").symlink_to(outside / shard)
    before = tree(tmp_path)
    numbers()
    numbers()  # reads what was written, and keeps its hashes
    return before


@pytest.mark.parametrize("kind", ["test", "all"])
def test_only_what_this_project_wrote_is_listed_and_deleted(kind, foreign, tmp_path, capsys):
    hashes = {file for file in tree(tmp_path) if file.startswith("cache/file-hashes/")}
    assert len(hashes) == 2
    cli.main(["cache"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == str(cache_folder())
    assert [line.split()[:2] for line in listed[2:]] == [["file-hashes", "1"], ["test", "1"]]
    cli.main(["cache", "--clear", kind])
    assert tree(tmp_path) == foreign | (hashes if kind == "test" else set())
    calls = []
    numbers(calls)
    assert calls == list(range(10))


def test_an_unknown_kind_lists_those_that_there_are(capsys):
    cli.main(["cache"])  # there is no folder yet
    numbers()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["cache", "--clear", "../test"])
    assert stopped.value.code == "clear: got '../test'; expected one of test, all"
    assert len(kinds()) == 1


def test_what_an_earlier_version_kept_can_be_deleted():
    folder = cache_folder()
    old = ("openmoji/openmoji-17.0.0-64.safetensors", "openmoji/openmoji-17.0.0-64.7.tmp")
    old += (f"latents/{'c' * 24}/000001024.safetensors", f"latents/{'c' * 24}/000001024.7.tmp")
    for name in old:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"abc")
    assert [(kept.name, kept.size) for kept in kinds()] == [("latents", 6), ("openmoji", 6)]
    for kept in kinds():
        clear(kept.name)
    assert not list(folder.iterdir())


@table(("said", "folder"), [("~/kept", "HOME/kept"), ("$PLACE/kept", "HOME/there/kept"), ("", "HOME/.cache/ldm")])
def test_the_folder_of_the_cache_is_expanded_as_every_path_is(said, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "there"))
    monkeypatch.setenv("LDM_CACHE", said)
    assert cache_folder() == Path(folder.replace("HOME", str(tmp_path)))
