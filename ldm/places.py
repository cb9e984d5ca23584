"""What the texts of a config name: folders of this machine, models and data on the Hub, files inside packages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""The name of a file or a folder that leads nowhere else."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]*)?")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\")
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_HOMES = ("home", "users")
"""Folders whose folders are called after their users."""


def portable(tree: Any) -> Any:
    """Return a config's fields as they may travel: without the paths, users and hosts of this machine.

    Paths below the working folder are relative to it. All others, also relative ones that leave it, are cut to their
    last name, or to "." where that is a user's. Addresses lose passwords and what follows "?". Names on the Hub,
    ``package:NAME/FOLDER`` and every other text stay as they are.
    """
    if isinstance(tree, Mapping):
        return {key: portable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [portable(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    if _ADDRESS.match(tree):
        return _without_secrets(tree)
    return _portable_path(re.sub("^file://", "", tree, flags=re.IGNORECASE))


def on_hub(name: str) -> bool:
    """Whether `name`, of a model or data, is ``name``, ``user/name`` or ``user/name@revision`` and not a path here."""
    return _HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def pinned(name: str) -> tuple[str, dict[str, str]]:
    """Return a name without its revision, and ``{"revision": ...}`` if it has one.

    ``user/name@revision`` on the Hub is a commit, a branch or a tag of ``user/name``. Raises ValueError if nothing
    follows the "@"; a path stays as it is.
    """
    if "@" not in name or not on_hub(name):
        return name, {}
    repository, _, revision = name.partition("@")
    if not revision:
        raise ValueError(f"{name}: a commit, branch or tag must follow the @")
    return repository, {"revision": revision}


def _portable_path(text: str) -> str:
    if _WINDOWS.match(text):
        return _last_name(PureWindowsPath(text))
    if text.startswith("~") and not text.startswith("~/"):  # a home
        return _last_name(PurePosixPath(text)) if "/" in text else "."
    whole = os.path.expanduser(text)
    if not os.path.isabs(whole):
        leaves = os.path.normpath(text.replace("\\", "/")).split("/")[0] == ".."
        return _last_name(PureWindowsPath(text)) if leaves else text
    pairs: tuple[tuple[str, str], ...] = ()
    try:
        here = os.getcwd()
        pairs = (here, os.path.normpath(whole)), (os.path.realpath(here), os.path.realpath(whole))  # links on the way
    except (OSError, ValueError):  # a working folder that is gone; characters that no path has
        pass
    for base, path in pairs:
        if path == base or path.startswith(os.path.join(base, "")):
            return os.path.relpath(path, base)
    return _last_name(PurePosixPath(os.path.normpath(whole)))


def _last_name(path: PurePosixPath | PureWindowsPath) -> str:
    """Return the last name of a path, "." if there is none or it is that of a user's home."""
    is_home = str(path) == os.path.expanduser("~") or path.parent.name.lower() in _HOMES
    return "." if is_home or path.name in ("", "..") else path.name


def _without_secrets(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        return "."
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
