"""Configs as files: YAML and command-line overrides into the frozen dataclasses of `ldm.config`, and back.

The dataclasses are the schema: a value is read by the annotation of its field, nothing is guessed. That is
why jsonargparse does not read here: under ``dict[str, Any]`` it turns the text "2" into a number, and imports
and calls whatever class a ``class_path`` key names.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .config_tree import ConfigError, Text, Tree, dump_tree, read_tree, shown

__all__ = ["ConfigError", "config_differences", "exit_on_config_error", "load_config", "save_config"]

T = TypeVar("T")


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

    ``argv`` defaults to the command line; of several values for a field the last counts. A value is YAML, but
    a text field takes it as it stands. An override inside a mapping, or inside an optional part that is null,
    adds what is missing; an override of a whole part or mapping replaces it. ``--help`` lists every field and
    exits.

    Raises:
        ConfigError: with all problems. Values under unknown keys are left out, they may be secrets.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        _help_parser(kind).print_help()
        sys.exit(0)
    problems: list[str] = []
    config: T = _read_fields(kind, read_tree(words, problems), "", problems)
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def save_config(config: object, path: str | Path) -> None:
    """Write every field as YAML in UTF-8, into an existing folder; `load_config` reads back an equal config.

    Under ``dict[str, Any]`` that takes values that YAML has: a tuple there would come back as a list.
    """
    Path(path).write_text(dump_tree(_plain(config)), encoding="utf-8")


def config_differences(a: object, b: object) -> list[str]:
    """Return a line ``path: old -> new`` for each leaf in which two configs of one kind differ."""
    return list(_differences(_plain(a), _plain(b), ""))


# ---- the tree to dataclasses: a problem is noted and None stands in for the value ----


def _read(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Return a value of the tree as its annotation wants it."""
    container, args = get_origin(annotation), get_args(annotation)
    if container in (Union, UnionType):
        return _read_union(annotation, value, path, problems)
    if isinstance(value, Text):
        value = str(value) if annotation is str else value.parsed()
    if isinstance(annotation, type) and is_dataclass(annotation) and isinstance(value, dict):
        return _read_fields(annotation, value, path, problems)
    if annotation is Any and isinstance(value, dict):  # an override may be inside
        return {key: _read(Any, item, path, problems) for key, item in value.items()}
    if container is dict and isinstance(value, dict):
        wrong = [key for key in value if type(key) is not str]
        problems += [f"{_join(path, key)}: got the key {shown(key)}; expected text" for key in wrong]
        return {key: _read(args[1], item, _join(path, key), problems) for key, item in value.items()}
    if container is tuple and isinstance(value, list):
        kinds = args[:1] * len(value) if Ellipsis in args else args
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value, strict=True))
            return tuple(_read(item_kind, item, f"{path}[{i}]", problems) for i, (item_kind, item) in items)
    if container is Literal and any(value == choice and type(value) is type(choice) for choice in args):
        return value
    if annotation in (Any, type(value)):  # exactly that type: True is not an int here
        return value
    if annotation is float and type(value) is int:
        return float(value)
    problems.append(f"{path}: got {shown(value)}; {_wanted(annotation, value)}")
    return None


def _read_union(annotation: Any, value: Any, path: str, problems: list[str]) -> Any:
    """Return the value as the first alternative that takes it."""
    if NoneType in get_args(annotation) and (value is None or (isinstance(value, Text) and value == "null")):
        return None
    arms = [arm for arm in get_args(annotation) if arm is not NoneType]
    for arm in arms:
        found: list[str] = []
        result = _read(arm, value, path, found)
        if not found:
            return result
    value = value.parsed() if isinstance(value, Text) else value
    problems += found if len(arms) == 1 else [f"{path}: got {shown(value)}; {_wanted(annotation, value)}"]
    return None


def _read_fields(kind: type[Any], tree: Tree, path: str, problems: list[str]) -> Any:
    """Return the dataclass; a ValueError of its ``__post_init__`` is a problem as well."""
    hints, before = get_type_hints(kind), len(problems)
    for key in [key for key in tree if key not in hints]:
        inside = [_join(part, key) for part, below in _parts(kind, path) if key in get_type_hints(below)]
        meant = inside or difflib.get_close_matches(str(key), hints, n=1)
        hint = f"did you mean {meant[0]!r}?" if meant else f"choose from {', '.join(hints)}"
        problems.append(f"{_join(path, key)}: no such field; {hint}")
    for field in fields(kind):
        if field.name not in tree and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{_join(path, field.name)}: required")
    known = [name for name in hints if name in tree]
    values = {name: _read(hints[name], tree[name], _join(path, name), problems) for name in known}
    if len(problems) == before:
        try:
            return kind(**values)
        except ValueError as error:
            problems.append(f"{path}: {error}" if path else str(error))
    return None


# ---- words for people ----


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _wanted(annotation: Any, value: Any) -> str:
    """Return how an error asks for a type, with the choice nearest to the value."""
    if get_origin(annotation) is not Literal:
        return f"expected {_type_name(annotation)}"
    choices = [str(choice) for choice in get_args(annotation)]
    meant = difflib.get_close_matches(str(value), choices, n=1)
    return f"choose from {', '.join(choices)}" + (f"; did you mean {meant[0]!r}?" if meant else "")


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return name.replace("typing.", "").replace("None", "null")


def _plain(value: Any) -> Any:
    """Return a config as mappings, lists and scalars."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            yield from _differences(a.get(key, MISSING), b.get(key, MISSING), _join(path, key))
    elif a != b:
        old, new = ("not set" if value is MISSING else repr(value) for value in (a, b))
        yield f"{path}: {old} -> {new}"


def _parts(kind: type[Any], path: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield ``(path, dataclass)`` for a dataclass and those below it, optional ones included."""
    yield path, kind
    for name, annotation in get_type_hints(kind).items():
        for below in (annotation, *get_args(annotation)):
            if isinstance(below, type) and is_dataclass(below):
                yield from _parts(below, _join(path, name))


def _field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the string literal below each field, as one line."""
    docs = {}
    for statements in pairwise(ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body):  # type: ignore[attr-defined]
        match statements:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _help_parser(kind: type[Any]) -> argparse.ArgumentParser:
    """Return a parser that is only printed: a group for each dataclass, an option for each field."""
    usage = "%(prog)s [--help] [--config FILE.yaml] [--path.to.field VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, add_help=False)
    for path, part in _parts(kind):
        group = parser.add_argument_group(path or "fields", inspect.getdoc(part))
        hints, docs = get_type_hints(part), _field_docs(part)
        for field in fields(part):
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            if is_dataclass(default):
                continue  # a group of its own
            note = "required" if default is MISSING else f"default: {_plain(default)!r}"
            text = f"{docs.get(field.name, '')} ({_type_name(hints[field.name])}; {note})".strip()
            group.add_argument(f"--{_join(path, field.name)}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser
