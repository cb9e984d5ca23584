"""A checkpoint is whole or not there, whatever happens while it is written and to its files afterwards."""

import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ldm.training.checkpoint import CheckpointError, CheckpointStore
from ldm.training.manifest import read_manifest

from .table import table

CRASHED = 9
FILES = ["weights.safetensors", "moments.safetensors", "state.json", "manifest.json"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the children are forked: an OpenMP pool does not survive that
    yield
    torch.set_num_threads(threads)


def save(store: CheckpointStore, step: int, version: int = 0, size: int = 7) -> Path:
    """Save tensors and a state that all carry `step` and `version`, so that a mixture would be seen."""
    tensors = {"weights": {"w": torch.full((size,), step)}, "moments": {"m": torch.full((size, 2), version)}}
    path = store.save(step, tensors, {"step": step, "version": version})
    store.wait()
    return path


def load(path: Path) -> tuple[int, int]:
    """Return the step and version of a checkpoint, all parts of which have to agree."""
    checkpoint = CheckpointStore.load(path)
    step, version = checkpoint.state["step"], checkpoint.state["version"]
    assert checkpoint.global_step == step
    assert set(checkpoint.tensors["weights"]["w"].tolist()) == {step}
    assert set(checkpoint.tensors["moments"]["m"].flatten().tolist()) == {version}
    return step, version


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a forked child, return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def crash_at_disk_call(number: int) -> None:
    """Make this process end at its `number`-th call that changes the disk; a write is then half done."""
    calls = count(1)

    def replace(name: str) -> None:
        original = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if next(calls) == number:
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])
                os._exit(CRASHED)
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in ("write", "fsync", "replace", "mkdir", "unlink", "rmdir"):
        replace(name)


@table(
    ("keep", "before", "then"),
    [
        (1, [(1, 0)], (2, 0)),
        (1, [(1, 0)], (1, 1)),
    ],
)
def test_r01_a_crash_at_any_disk_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path, caplog, monkeypatch, keep, before, then
):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no matter to a crash that leaves the system up
    template = CheckpointStore(tmp_path / "template", keep)
    for step, version in before:
        save(template, step, version)
    seen = []
    for number in count(1):
        folder = tmp_path / str(number)
        shutil.copytree(template.folder, folder)

        def child(folder: Path = folder, number: int = number) -> None:
            store = CheckpointStore(folder, keep)
            crash_at_disk_call(number)
            save(store, *then)

        code = exit_code(forked(child))
        assert code in (0, CRASHED)
        store = CheckpointStore(folder, keep)
        store.remove_leftovers()
        assert not list(folder.glob(".tmp-*"))
        seen.append(load(store.latest()))
        save(store, then[0] + 1)
        assert load(store.latest()) == (then[0] + 1, 0)
        assert sum(name.startswith("step-") for name in names(folder)) <= keep
        if code == 0:
            break
    switch = seen.index(then)
    assert set(seen[:switch]) == {before[-1]}  # the old one up to a moment, the new one ever after
    assert set(seen[switch:]) == {then}
    assert len(seen) > 15
    assert not caplog.records  # nothing that a crash leaves looks like a damaged checkpoint


def test_r01_a_kill_at_a_random_moment_loses_no_finished_save(tmp_path, caplog):
    delays = torch.rand(10, generator=torch.Generator().manual_seed(0)) * 0.1  # seconds; a save takes some 0.03
    store = CheckpointStore(tmp_path, 1)
    save(store, 0)
    for delay in delays.tolist():
        reader, writer = os.pipe()

        def child(writer: int = writer) -> None:
            store = CheckpointStore(tmp_path, 1)
            for step in count(CheckpointStore.load(store.latest()).global_step + 1):
                save(store, step, size=200_000)
                os.write(writer, f"{step}\n".encode())

        pid = forked(child)
        os.close(writer)
        with os.fdopen(reader) as finished:
            furthest = int(finished.readline())
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            assert exit_code(pid) == -signal.SIGKILL
            furthest = max([furthest, *map(int, finished.read().split())])
        store = CheckpointStore(tmp_path, 1)
        store.remove_leftovers()
        step, _ = load(store.latest())
        assert step in (furthest, furthest + 1)
        assert not list(tmp_path.glob(".tmp-*"))
    assert step >= len(delays)
    assert not caplog.records


def test_r01_r02_everything_is_flushed_before_the_rename_and_the_rename_before_the_deletion(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"{Path(a).name} -> {Path(b).name}"), replace(a, b)))
    save(store, 2)
    temporary, trash = f".tmp-step-2-{os.getpid()}", f".tmp-step-1-{os.getpid()}"
    renames = [f"{temporary} -> step-2", tmp_path.name, f"step-1 -> {trash}"]
    assert events == [*FILES, temporary, *renames]


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            middle = len(data) - 9  # in the last tensor, in the last hash
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        case "zeroed":
            path.write_bytes(data[:8] + bytes(4) + data[12:])
        case "emptied":
            path.write_bytes(b"")
        case "deleted":
            path.unlink()


@table("how", ["truncated", "flipped", "zeroed", "emptied", "deleted"])
@table("file", FILES)
def test_r03_a_damaged_file_is_named_and_the_older_checkpoint_is_the_latest(tmp_path, caplog, file, how):
    store = CheckpointStore(tmp_path, 2)
    old, new = save(store, 1), save(store, 2)
    damage(new / file, how)
    with pytest.raises(CheckpointError) as error:
        CheckpointStore.load(new)
    assert str(error.value).startswith(f"{new / file} ")
    assert "delete its folder and resume from an older checkpoint" in str(error.value)
    assert store.latest() == old
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(error.value) in caplog.text
    damage(old / file, how)
    assert store.latest() is None


def test_r03_every_bit_flip_in_the_manifest_is_blamed_on_the_manifest(tmp_path):
    path = save(CheckpointStore(tmp_path, 1), 1) / "manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            read_manifest(path.parent)


def test_a_manifest_of_another_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.training.manifest.FORMAT", 2)
    path = save(CheckpointStore(tmp_path, 1), 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, expected 1: use the version"):
        CheckpointStore.load(path)


@table("call", ["write", "fsync"])
def test_r02_r17_a_full_disk_keeps_the_old_checkpoint_and_says_how_many_bytes(tmp_path, monkeypatch, call):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    original = getattr(os, call)
    for number in count(1):
        calls = count(1)

        def full(*args: object, calls=calls, number=number) -> object:
            if next(calls) == number:
                raise OSError(28, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                save(store, 2)
                break
            except CheckpointError as error:
                assert "No space left" in str(error)  # noqa: PT017 (the last round must not raise)
                assert "needs 66" in str(error)  # noqa: PT017
        if "step-2" not in names(tmp_path):  # only the flush of the parent folder comes after the rename
            assert names(tmp_path) == ["step-1"]
        assert load(store.latest())[0] in (1, 2)
    assert number > 4
    assert names(tmp_path) == ["step-2"]


def test_r17_a_file_size_limit_keeps_the_old_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        with pytest.raises(CheckpointError, match=r"needs \d+ bytes, was not written: .*File too large"):
            save(store, 2, size=100_000)
        save(store, 3)  # and a run may go on after it

    assert exit_code(forked(child)) == 0
    assert names(tmp_path) == ["step-3"]


def test_r17_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    monkeypatch.setattr(os, "write", None)
    with pytest.raises(CheckpointError, match=r"needs \d{6,} bytes, was not written: .*100000 bytes are free"):
        save(store, 2, size=10_000)
    assert names(tmp_path) == ["step-1"]


def test_r17_what_is_needed_is_an_upper_bound_of_what_is_written(tmp_path, monkeypatch):
    tensors = {"w": {f"layer.{n}.weight": torch.zeros(3, n) for n in range(400)}}
    path = CheckpointStore(tmp_path, 1).save(1, tensors, {"history": list(range(1000))})
    written = sum(file.stat().st_size for file in path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=written))
    with pytest.raises(CheckpointError, match=f"{written} bytes are free"):
        CheckpointStore(tmp_path, 1).save(2, tensors, {"history": list(range(1000))})


def test_tensors_and_state_come_back_bitwise(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-128, 128, (4, 6, 8), dtype=torch.int8, generator=generator)
    floats = torch.float64, torch.float32, torch.float16, torch.bfloat16
    integers = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
    tensors = {str(dtype): bits.view(dtype) for dtype in (*floats, *integers)}  # not-a-numbers included
    base = torch.arange(12.0).reshape(3, 4)
    tensors |= {
        "bool": bits > 0,
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "transposed": base.T,
        "a view": base[1:, 2:],
        "the same": base,
        "the same again": base,
        "expanded": torch.ones(1).expand(5),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    state = {"float": 0.1 + 0.2, "tiny": 5e-324, "inf": float("inf"), "list": [1, None, True], "text": "ä"}
    path = CheckpointStore(tmp_path, 1).save(3, {"all": tensors, "none": {}}, state)
    checkpoint = CheckpointStore.load(path)
    assert checkpoint.state == state
    assert checkpoint.tensors["none"] == {}
    by_the_library = load_file(path / "all.safetensors")
    for found in (checkpoint.tensors["all"], by_the_library):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            ours, theirs = (t.detach().contiguous().flatten().view(torch.uint8) for t in (found[name], tensor))
            assert torch.equal(ours, theirs)
    checkpoint.tensors["all"]["the same"].zero_()
    assert torch.equal(checkpoint.tensors["all"]["the same again"], base)


def test_r02_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / ".tmp-step-9-1").mkdir()
    (tmp_path / ".tmp-step-9-1" / "weights.safetensors").write_text("left behind by a kill")
    store = CheckpointStore(tmp_path, 2)
    assert store.latest() is None
    assert len(names(tmp_path)) == 3, "to look deletes nothing"
    store.remove_leftovers()
    assert names(tmp_path) == ["notes.txt", "step-by-step"]
    for step in (8, 9, 10, 11):  # 9 sorts after 10 as a string
        assert save(store, step) == tmp_path / f"step-{step}"
    assert names(tmp_path) == ["notes.txt", "step-10", "step-11", "step-by-step"]
    assert store.latest() == tmp_path / "step-11"


def test_r02_a_run_that_fell_back_is_not_pulled_forward_again(tmp_path, caplog):
    store = CheckpointStore(tmp_path, 2)
    for step in (10, 20, 30):
        save(store, step)
    damage(tmp_path / "step-30" / "state.json", "flipped")
    assert load(store.latest()) == (20, 0)
    save(store, 25)  # keep=2 by number alone would delete 25 and 20, and keep the damaged one
    assert names(tmp_path) == ["step-20", "step-25", "step-30.rolled-back-0"]
    assert "step-30.rolled-back-0, delete it if not wanted" in caplog.text
    assert load(CheckpointStore(tmp_path, 2).latest()) == (25, 0)


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save(store, 4, version=1)
    damage(tmp_path / "step-4" / "weights.safetensors", "emptied")
    save(store, 4, version=2)
    assert load(store.latest()) == (4, 2)
    assert names(tmp_path) == ["step-4"]


def test_r01_an_interrupt_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "new" / "checkpoints", 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(store, 1)
    assert names(store.folder) == []


def test_r02_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match="keep_checkpoints: got 0; expected 1 or more"):
        CheckpointStore(folder, 0)
    store = CheckpointStore(folder, 1)
    with pytest.raises(ValueError, match=r"got the name '\.\./x'; expected a plain file name"):
        store.save(1, {"../x": {}}, {})
    with pytest.raises(ValueError, match=r"a: w is torch\.complex64; expected one of \[torch\.float64"):
        store.save(1, {"a": {"w": torch.zeros(1, dtype=torch.complex64)}}, {})
    with pytest.raises(ValueError, match="global_step: got -1"):
        store.save(-1, {}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(1, {}, {"path": folder})
    assert not folder.exists()


def test_r03_a_folder_that_is_no_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        CheckpointStore.load(tmp_path / "step-1")


def test_the_manifest_lists_every_file(tmp_path):
    path = save(CheckpointStore(tmp_path, 1), 5)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["global_step"]) == (1, 5)
    assert sorted([*manifest["files"], "manifest.json"]) == names(path) == sorted(FILES)
    for name, entry in manifest["files"].items():
        assert entry["size"] == (path / name).stat().st_size
