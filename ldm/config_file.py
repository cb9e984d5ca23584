"""Configs as files: YAML and command-line overrides into the frozen dataclasses of `ldm.config`, and back.

jsonargparse reads each field by its annotation and prints the help; the words of the errors are our own, and
networks (``dict[str, Any]``) pass it by: there it turns the text "2" into a number and imports a ``class_path``.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

from .config import Network

__all__ = ["ConfigError", "config_differences", "exit_on_config_error", "load_config", "save_config"]

T = TypeVar("T")
Tree = dict[str, Any]
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class ConfigError(ValueError):
    """What is wrong with a config: a line for each problem, with its path."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """1e-4 is a number; on, off, yes, no and dates are text, as in YAML 1.2."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that `_Loader` or a YAML 1.1 reader would take for something else."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|false|False)$"), list("tTfF"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


set_loader("ldm", _load_yaml, exceptions=(yaml.YAMLError, ValueError))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a `ConfigError` into its message on stderr and exit code 2; also a decorator, for ``main``."""
    try:
        yield
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def load_config(kind: type[T], argv: Sequence[str] | None = None) -> T:
    """Return the config in ``--config FILE.yaml``, changed by ``--path.to.field VALUE`` (or ``=VALUE``).

    ``argv`` defaults to the command line; of several values for an option the last counts. A value is YAML, but
    a text field takes it as it stands. An override inside a mapping, or inside an optional part that is null,
    adds what is missing; an override of a whole part or mapping replaces it. ``--help`` lists every field and
    exits.

    Raises:
        ConfigError: with all problems. Values under unknown keys are left out, they may be secrets.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        _parser(kind).print_help()
        sys.exit(0)
    problems: list[str] = []
    tree = _read_tree(kind, words)
    typed = _read_fields(kind, _known(kind, tree, "", problems), problems)
    if problems:
        raise ConfigError("\n".join(problems))
    config: T = _build(kind, tree, typed)
    return config


def save_config(config: object, path: str | Path) -> None:
    """Write every field as YAML in UTF-8, into an existing folder; `load_config` reads back an equal config.

    Two things are not kept: a tuple in a network comes back as a list, the text "null" in an optional field as None.
    """
    Path(path).write_text(yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")  # type: ignore[call-overload]


def config_differences(a: object, b: object) -> list[str]:
    """Return a line ``path: old -> new`` for each leaf in which two configs of one kind differ."""
    return list(_differences(asdict(a), asdict(b), ""))  # type: ignore[call-overload]


def _differences(a: Tree, b: Tree, path: str) -> Iterator[str]:
    for key in a | b:
        old, new = (tree.get(key, _MISSING) for tree in (a, b))
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, _join(path, key))
        elif old != new:
            yield f"{_join(path, key)}: {old!r} -> {new!r}"


class _Missing:
    def __repr__(self) -> str:
        return "not set"


_MISSING = _Missing()


# ---- the schema: a part is a dataclass, optional or not, and a leaf is any other field ----


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _part(hint: Any) -> type[Any] | None:
    return next((arm for arm in (hint, *get_args(hint)) if isinstance(arm, type) and is_dataclass(arm)), None)


def _parts(kind: type[Any], path: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield ``(path, dataclass)`` for a dataclass and those below it."""
    yield path, kind
    for name, hint in get_type_hints(kind).items():
        if part := _part(hint):
            yield from _parts(part, _join(path, name))


@cache
def _leaves(kind: type[Any]) -> Tree:
    """Return the annotation of each leaf by its path."""
    fields = ((_join(path, name), hint) for path, part in _parts(kind) for name, hint in get_type_hints(part).items())
    return {path: hint for path, hint in fields if not _part(hint)}


@cache
def _parser(kind: type[Any]) -> ArgumentParser:
    """Return a parser with an option for each leaf, in a group for each part."""
    usage = "%(prog)s [--help] [--config FILE.yaml] [--path.to.field VALUE ...]"
    parser = ArgumentParser(usage=usage, exit_on_error=False, parser_mode="ldm")
    parser.add_argument("--config", metavar="FILE.yaml", help="values of fields; the other options change them")
    for path, part in _parts(kind):
        group = parser.add_argument_group(path or "fields", inspect.getdoc(part))
        below = {name for name, hint in get_type_hints(part).items() if _part(hint)}
        group.add_class_arguments(part, path or None, as_group=False, skip=below)
    return parser


# ---- the tree: the mapping in the file, with the overrides put into it ----


def _read_tree(kind: type[Any], words: list[str]) -> Tree:
    """Return the values a command line gives, unchecked; those of leaves that are no mappings are still text."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in dict.fromkeys(re.findall(r"^--[^=\n]+", "\n".join(words), re.MULTILINE)):
        options.add_argument(option, dest=option[2:], default=argparse.SUPPRESS)
    try:
        given, stray = options.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        raise ConfigError(f"{name[2:]}: no value given; write {name}=VALUE") from None
    if stray:  # not echoed: it may belong to an unknown option
        raise ConfigError("command line: a word that belongs to no option; write --path.to.field VALUE")
    overrides = vars(given)
    tree = _read_file(overrides.pop("config")) if "config" in overrides else {}
    for path, text in overrides.items():
        below, (*parents, name) = tree, path.split(".")
        for parent in parents:
            if not isinstance(below.get(parent), dict):
                below[parent] = {}
            below = below[parent]
        below[name] = _yaml_or_text(text) if get_origin(_leaves(kind).get(path, Network)) is dict else text
    return tree
