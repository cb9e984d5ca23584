"""The checkpoint that a run goes on from: the same one in every process, or an end with the reason."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ldm.training.checkpoint import CheckpointStore, found
from ldm.training.manifest import MANIFEST, CheckpointError
from ldm.training.processes import faults_everywhere, same_everywhere


def saved_state(folder: Path) -> dict[str, Any]:
    """Return ``state.json`` of the newest checkpoint in `folder`, {} without any; the first process's in every one.

    What must be known before anything is built: the precision, the tokenizer. Only this file is verified.
    """
    return same_everywhere(CheckpointStore.newest_state(folder) if PartialState().is_main_process else {})


def agreed_checkpoint(store: CheckpointStore) -> Path | None:
    """Return the newest checkpoint that verifies, the same one in every process; None where no process has any.

    Raises:
        CheckpointError: in every process, if none of the checkpoints that there are verifies, or if one process sees
            another newest checkpoint than the first one, or none.

    """
    first = PartialState().is_main_process
    path = store.latest() if first else None
    damaged = path is None and store.newest() is not None
    name, digest, damaged = same_everywhere((path and path.name, path and _digest(path), damaged))
    if damaged:
        raise CheckpointError(
            f"none of the {len(found(store.folder))} checkpoints in {store.folder} verifies (see the "
            "warnings above); move that folder away to start anew"
        )
    own, fault = store.newest(), None
    if not first and (_digest(store.folder / name) != digest if name else own is not None):
        seen = "none" if own is None else f"another {name}" if own.name == name else own.name
        fault = f"process {PartialState().process_index} has {seen}, the first process has {name or 'none'}"
    if faults := faults_everywhere(fault):
        raise CheckpointError(
            f"checkpoints: {faults[0]}. All processes of a run go on from one; set output_dir to a folder that all of "
            "them see"
        )
    return None if name is None else store.folder / name


def _digest(path: Path) -> str | None:
    """Return the sha256 of a checkpoint's manifest, which holds those of its files; None without one."""
    try:
        return sha256((path / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None
