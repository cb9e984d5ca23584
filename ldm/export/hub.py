"""Models on the Hugging Face Hub: pushed in one commit, with errors that say what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ldm.config.places import PLAIN_NAME
from ldm.errors import HubError
from ldm.export.card import CARD, with_name
from ldm.files import read_object
from ldm.models.provenance import FILE as RECORD
from ldm.models.provenance import TRAINED_IMAGES, read_provenance

MODEL_FILES = (
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "preprocessor_config.json",
    "diffusion_pytorch_model*.safetensors",
    "model*.safetensors",
    "*model*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "pipeline.py",
    "temporal.py",
    "samples.png",
    RECORD,
    TRAINED_IMAGES,
    CARD,
)
"""Patterns of the files that are pushed. Every other file of the folder stays private."""


def check(repo_id: str, private: bool = False) -> None:
    """Check that `push` will be possible; creates the repository if there is none.

    Raises:
        HubError: `repo_id` is not user/name; there is no token, the Hub refuses it, or it may only read; the repository
            cannot be created, or it is public and `private` is true.

    """
    with _explained(f"cannot push to {repo_id}", "a model can also be pushed later: ldm push OUTPUT_DIR/model NAME"):
        api = _client(repo_id)
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError("the token may only read; make one that may write")
        _open(api, repo_id, private)


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Push the model in `folder` in one commit and return the repository's address; creates it if there is none.

    Args:
        folder: Folder of a pipeline or an autoencoder; it is not changed. Only the files of a model are pushed.
        repo_id: Repository, user/name.
        private: Make the repository private, and refuse one that is public.

    Raises:
        ValueError: `folder` is not a model folder.
        HubError: the push failed, and the repository is unchanged; the message says how to push again.

    """
    files = model_files(Path(folder))
    again = shlex.join(["ldm", "push", str(folder), repo_id, *(["--private", "true"] if private else [])])
    with _explained(f"not pushed to {repo_id}", f"the model is whole in {folder}; to push it again: {again}"):
        api = _client(repo_id)
        _open(api, repo_id, private)
        # not upload_folder: it splits a large model into several commits, and a download between two gets half a model
        additions = [CommitOperationAdd(file, _content(Path(folder) / file, repo_id)) for file in files]
        record = read_provenance(folder)
        message = f"Model at step {record.global_step}" if record else "Model"
        api.create_commit(repo_id, additions, commit_message=message)
    return f"{api.endpoint}/{repo_id}"


def model_files(folder: Path) -> list[str]:
    """Return the paths of the model's files, relative to `folder`: its own and those of its components.

    Raises ValueError for a folder with neither ``model_index.json`` nor ``config.json``, and for components and files
    outside of the folder, also by a symbolic link: those may not be part of a model.
    """
    index = folder / "model_index.json"
    if not index.is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not the folder of a model: it has neither model_index.json nor config.json; "
            "training writes one to OUTPUT_DIR/model"
        )
    components = read_object(index) if index.is_file() else {}
    names = [name for name, value in components.items() if isinstance(value, list)]
    if odd := [name for name in names if not PLAIN_NAME.fullmatch(name)]:
        raise ValueError(f"{index} names the component {odd[0]!r}; expected the name of a folder beside it")
    folders = [folder, *(folder / name for name in names)]
    found = {file for inside in folders for pattern in MODEL_FILES for file in inside.glob(pattern) if file.is_file()}
    if away := sorted(file for file in found if not file.resolve().is_relative_to(folder.resolve())):
        raise ValueError(f"{away[0]} is a link that leads out of {folder}; push a copy without links (cp -rL)")
    return sorted(file.relative_to(folder).as_posix() for file in found)


def _content(file: Path, repo_id: str) -> str | bytes:
    """Return the content to push for a file: its path; or the text of a card, with the repository's name in it."""
    return with_name(file.read_text(encoding="utf-8"), repo_id).encode() if file.name == CARD else str(file)


def _client(repo_id: str) -> HfApi:
    """Return the Hub's client; HubError for a wrong name or a missing token, which need no request."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"the name must be user/name. {error}") from None
    if repo_id.count("/") != 1:
        raise HubError("the name must be user/name")
    if get_token() is None:
        raise HubError("there is no token; run `hf auth login`, or set HF_TOKEN to one that may write")
    return HfApi()


def _open(api: HfApi, repo_id: str, private: bool) -> None:
    """Create the repository if there is none; HubError if it is public and `private` is true."""
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise HubError("the repository is public; make it private in its settings, or push without private")


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Turn any error into a `HubError` that begins with `what` and ends with `advice`."""
    try:
        yield
    # Any error: of the client, of its HTTP library, of a thread of either. None of them may end a training.
    except Exception as error:
        said = str(error) if isinstance(error, HubError) else f"{type(error).__name__}: {error}"
        said = re.sub(r"\bhf_[\w.-]{16,}", "(token)", " ".join(said.split()))  # a server may repeat what it was sent
        raise HubError(f"{what}: {said[:500].rstrip('.')}; {advice}") from None
