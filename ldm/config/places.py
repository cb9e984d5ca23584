"""Places that a config names: folders of this machine, models and data on the Hub, files inside packages."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""A file's or folder's name that cannot lead out of its folder."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]*)?")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\")
_ADDRESS = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_HOMES = ("home", "users")
"""Folders that contain the homes of users."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_SECRET = re.compile("TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)


def expanded(tree: Any, where: str) -> Any:
    """Return a path, or a mapping's paths, with ``~``, ``~USER``, ``$NAME`` and ``${NAME}`` replaced, as a shell does.

    Addresses, and everything that is no text, are not changed. A text with a variable is always a path, never a name
    on the Hub: the variable's value must not be sent there.

    Raises:
        ValueError: there is no such variable or user, or the variable may be a secret. The message begins with `where`.

    """
    if isinstance(tree, Mapping):
        return {key: expanded(value, f"{where}.{key}") for key, value in tree.items()}
    if not isinstance(tree, str) or _ADDRESS.match(tree):
        return tree

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        if _SECRET.search(name):
            raise ValueError(f"{where}: {match[0]} may be a secret, which a path would reveal; name another variable")
        if name not in os.environ:
            raise ValueError(f"{where}: got {tree!r}; the environment variable {name} is not set")
        return os.environ[name]

    home = os.path.expanduser(tree)
    if home.startswith("~"):
        raise ValueError(f"{where}: got {tree!r}; there is no such user; for a folder of that name, write ./{tree}")
    path = _VARIABLE.sub(value, home)
    return os.path.join(".", path) if path != home and on_hub(path) else path


def made_folder(name: str) -> Path:
    """Return the folder for results, created if it is missing; ValueError if it cannot be created."""
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {name} cannot be made a folder: {error.strerror}") from error
    return Path(name)


def portable(tree: Any) -> Any:
    """Return a config's fields for publication: without the paths, users and hosts of this machine.

    Paths below the working folder become relative to it. All other paths, also relative ones that leave it, are cut to
    their last name, or to "." if that is a user's home. Addresses lose passwords and everything after "?". Names on
    the Hub, ``package:NAME/FOLDER`` and every other text are not changed.
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
    """Return True if `name` is ``name``, ``user/name`` or ``user/name@revision`` and no path of this machine."""
    return _HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def pinned(name: str) -> tuple[str, dict[str, str]]:
    """Return a name without its revision, and ``{"revision": ...}`` if it has one.

    ``user/name@revision`` on the Hub is a commit, a branch or a tag of ``user/name``. ValueError if nothing follows
    the "@". A path is not changed.
    """
    if "@" not in name or not on_hub(name):
        return name, {}
    repository, _, revision = name.partition("@")
    if not revision:
        raise ValueError(f"{name}: a commit, branch or tag must follow the @")
    return repository, {"revision": revision}


def pretrained_place(network: Mapping[str, Any]) -> str | None:
    """Return the folder or ``user/name@revision`` that a network's config names, None if it names none."""
    name, revision, subfolder = (network.get(key) for key in ("pretrained", "revision", "subfolder"))
    if not isinstance(name, str):
        return None
    if isinstance(subfolder, str) and os.path.isdir(name):
        return os.path.join(name, subfolder)
    return f"{name}@{revision}" if isinstance(revision, str) and "@" not in name and on_hub(name) else name


def resolve(name: str) -> str:
    """Return the folder that ``package:NAME/FOLDER`` names; any other name unchanged. No code of the package is run.

    Raises:
        ImportError: there is no installed package NAME.
        FileNotFoundError: it has no such folder.

    """
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"{name}: no package {package!r} is installed; pip install the distribution that holds it (often "
            f"{package.replace('_', '-')}), or name a folder"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: the package {package} has no folder {folder!r}")
    return str(path)


def _portable_path(text: str) -> str:
    if _WINDOWS.match(text):
        return _last_name(PureWindowsPath(text))
    if text.startswith("~") and not text.startswith("~/"):  # a user's home
        return _last_name(PurePosixPath(text)) if "/" in text else "."
    whole = os.path.expanduser(text)
    if not os.path.isabs(whole):
        leaves = os.path.normpath(text.replace("\\", "/")).split("/")[0] == ".."
        return _last_name(PureWindowsPath(text)) if leaves else text
    pairs: tuple[tuple[str, str], ...] = ()
    try:
        here = os.getcwd()
        pairs = (here, os.path.normpath(whole)), (os.path.realpath(here), os.path.realpath(whole))  # links resolved
    except (OSError, ValueError):  # a working folder that is gone; characters that no path has
        pass
    for base, path in pairs:
        if path == base or path.startswith(os.path.join(base, "")):
            return os.path.relpath(path, base)
    return _last_name(PurePosixPath(os.path.normpath(whole)))


def _last_name(path: PurePosixPath | PureWindowsPath) -> str:
    """Return the last name of a path; "." if there is none, or if the path is a user's home."""
    is_home = str(path) == os.path.expanduser("~") or path.parent.name.lower() in _HOMES
    return "." if is_home or path.name in ("", "..") else path.name


def _without_secrets(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        return "."
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
