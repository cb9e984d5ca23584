"""Configs as files: YAML and command-line overrides into the frozen dataclasses of `ldm.config`, and back.

jsonargparse reads each field by its annotation and prints the help; the error messages are our own. Networks
(``dict[str, Any]``) are not passed to it: it would read the text "2" as a number, and import any ``class_path``.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, set_loader, set_parsing_settings

from ldm.errors import ConfigError

from .check import FILES, checked, field_hints, network_fields, shown
from .conditioners import Network
from .places import expanded, portable

__all__ = [
    "config_text",
    "exit_on_config_error",
    "load_config",
    "save_config",
    "tree_differences",
]

T = TypeVar("T")
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """A loader of YAML 1.2: 1e-4 is a number; on, off, yes, no and dates are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; a key that is written null is a name, as any other."""
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == "null":
                key.tag = "tag:yaml.org,2002:str"
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that quotes text which `_Loader` or a YAML 1.1 reader would read as another type."""


_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|false|False)$"), list("tTfF"))


def _load_yaml(text: str, place: str = "value") -> Any:
    """Return the value of a YAML text; an error names place and line and quotes nothing, since it may be a secret."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except RecursionError:
        raise ConfigError(f"{place}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: not valid YAML{f': {problem}' if problem else ''}") from None


def _load_word(text: str) -> Any:
    """Return the value of a word of a command line: YAML, except that only "null" is null ("~" and "" are text)."""
    value = _load_yaml(text)
    return text if value is None and text != "null" else value


set_loader("yaml_1_2", _load_yaml, exceptions=(ConfigError,))
set_loader("words", _load_word, exceptions=(ConfigError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Print a `ConfigError`'s message on stderr and exit with code 2; also a decorator, for ``main``."""
    try:
        yield
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def load_config(kind: type[T], argv: Sequence[str] | None = None) -> T:
    """Return the config in ``--config FILE.yaml``, changed by ``--path.to.field VALUE`` (or ``=VALUE``).

    ``argv`` defaults to the command line. If an option is given twice, the last value counts. A value is YAML, except
    for a text field, which takes it literally. ``--path.to.field`` alone means true. For an optional part, true stands
    for its defaults (with its other overrides), and false for null. An override inside a mapping, or inside an optional
    part that is null, adds what is missing; an override of a whole part or mapping replaces it. ``~`` and ``$NAME`` in
    paths are replaced. ``--help`` lists every field and exits.

    Raises:
        ConfigError: with all problems. Values of unknown keys are not quoted, they may be secrets.

    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        _parser(*_parts(kind)).print_help()
        sys.exit(0)
    problems: list[str] = []
    config = _build(kind, _read_tree(kind, words), "", problems)
    if config is not None:
        config = _with_places(config, "", problems)
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return checked(config)


def config_kind(file: str, kinds: Sequence[type[T]]) -> type[T]:
    """Return the one of some kinds of configs that a file holds: the one whose required fields the file sets."""
    tree = _read_file(file)
    required = {kind: [name for name, default in _defaults(kind).items() if default is MISSING] for kind in kinds}
    for kind, names in required.items():
        if tree.keys() >= {*names}:
            return kind
    wanted = "; or ".join(", ".join(names) for names in required.values())
    raise ConfigError(f"{file}: a config of no kind; expected one that sets {wanted}")


def save_config(config: Any, path: str | Path) -> None:
    """Write every field as YAML into an existing folder; `load_config` reads back an equal config.

    Two things differ: paths are made `portable`, and a tuple in a network's config comes back as a list.
    """
    Path(path).write_text(config_text(portable(asdict(config))), encoding="utf-8")


def config_text(tree: Mapping[str, Any]) -> str:
    """Return the fields of a config as the YAML that `load_config` reads."""
    text: str = yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)
    return text


def with_defaults(tree: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return the tree of a config, as JSON, with the fields of the dataclass `kind` that it lacks at their defaults.

    So a config reads that an earlier version wrote: the default of a field that is added is what was done before.
    """
    filled, hints = dict(tree), field_hints(kind)
    for name, default in _defaults(kind).items():
        part = _part(hints[name])
        if name not in tree and default is not MISSING:
            plain = asdict(default) if part and default is not None else default
            filled[name] = json.loads(json.dumps(plain))
        elif part and isinstance(tree.get(name), dict):
            filled[name] = with_defaults(tree[name], part)
    return filled


def _defaults(kind: type[Any]) -> Tree:
    """Return the default of each field of a dataclass, `MISSING` where it is required."""
    made = {field.name: field.default_factory() for field in fields(kind) if field.default_factory is not MISSING}
    return {field.name: made.get(field.name, field.default) for field in fields(kind)}


def tree_differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield a line ``path: old -> new`` for each difference between two trees."""
    for key in {**a, **b}:
        both = [tree[key] for tree in (a, b) if key in tree]
        if all(isinstance(value, dict) for value in both) and len(both) == 2:
            yield from tree_differences(a[key], b[key], _join(path, key))
        elif len(both) == 1 or both[0] != both[1]:
            old, new = (repr(tree[key]) if key in tree else "not set" for tree in (a, b))
            yield f"{_join(path, key)}: {old} -> {new}"


# ---- the fields: a part is a dataclass, optional or not; a leaf is any other field ----


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _part(hint: Any) -> type[Any] | None:
    return next((arm for arm in (hint, *get_args(hint)) if isinstance(arm, type) and is_dataclass(arm)), None)


def _parts(kind: type[Any], path: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield ``(path, dataclass)`` for a dataclass and those below it."""
    yield path, kind
    for name, hint in field_hints(kind).items():
        if part := _part(hint):
            yield from _parts(part, _join(path, name))


def _leaves(kind: type[Any]) -> Tree:
    """Return the annotation of each leaf by its path."""
    fields = ((_join(path, name), hint) for path, part in _parts(kind) for name, hint in field_hints(part).items())
    return {path: hint for path, hint in fields if not _part(hint)}


def _switches(kind: type[Any]) -> set[str]:
    """Return the paths of everything that can be switched on or off: bool fields and optional parts."""
    fields = ((_join(path, name), hint) for path, part in _parts(kind) for name, hint in field_hints(part).items())
    return {path for path, hint in fields if hint is bool or (_part(hint) and NoneType in get_args(hint))}


@cache
def _parser(*parts: tuple[str, type[Any]]) -> ArgumentParser:
    """Return a parser with an option for each leaf of the parts."""
    usage = "%(prog)s [--help] [--config FILE.yaml] [--path.to.field VALUE ...]"
    parser = ArgumentParser(usage=usage, exit_on_error=False, parser_mode="yaml_1_2")
    parser.add_argument("--config", metavar="FILE.yaml", help="values of fields; the other options change them")
    for path, part in parts:
        group = parser.add_argument_group(path or "fields", inspect.getdoc(part))
        below = {name for name, hint in field_hints(part).items() if _part(hint)}
        group.add_class_arguments(part, path or None, as_group=False, skip=below)
    return parser


# ---- the tree: the mapping in the file, with the overrides applied ----


def _read_tree(kind: type[Any], words: list[str]) -> Tree:
    """Return the tree of a command line, unchecked; overrides of leaves other than mappings are still text."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    switches = _switches(kind)
    for option in {word.partition("=")[0] for word in words if re.match("--[^=]", word)}:
        alone: Tree = {"nargs": "?", "const": "true"} if option[2:] in switches else {}
        options.add_argument(option, dest=option[2:], default=argparse.SUPPRESS, **alone)
    try:
        given, stray = options.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        raise ConfigError(f"{name[2:]}: no value given; write {name}=VALUE") from None
    if stray:  # not echoed: it may belong to an unknown option
        raise ConfigError("command line: a word that belongs to no option; write --path.to.field VALUE")
    overrides, leaves = vars(given), _leaves(kind)
    tree = _read_file(overrides.pop("config")) if "config" in overrides else {}
    for path, text in overrides.items():
        below, (*parents, name) = tree, path.split(".")
        for parent in parents:
            held = below.get(parent)
            below[parent] = dict(held) if isinstance(held, dict) else {}  # a copy: YAML aliases share mappings
            below = below[parent]
        hint: Any = leaves.get(path, Network)
        if get_origin(hint) is dict:
            value = _load_yaml(text, path)
            switched = path in switches and isinstance(value, bool)
            below[name] = ((below.get(name) or {}) if value else None) if switched else value
        else:
            below[name] = None if text == "null" and hint is not str else text
    return tree


def _read_file(file: str) -> Tree:
    """Return the mapping in a YAML file; an empty file is an empty mapping."""
    try:
        file = expanded(file, "--config")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        tree = _load_yaml(Path(file).read_text(encoding="utf-8"), file)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not text in UTF-8") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{file}: {_complaint(dict, tree)}")
    return tree or {}


# ---- from the tree to the dataclasses; each problem is appended to a list ----


def _build(kind: type[T], tree: Tree, path: str, problems: list[str]) -> T | None:
    """Return the dataclass of a mapping, None if there are problems; they are appended to `problems`."""
    hints = field_hints(kind)
    values: Tree = {}
    leaves: Tree = {}
    for key, value in tree.items():
        hint, at = hints.get(key), _join(path, key)
        part = _part(hint)
        if key not in hints:
            inside = [_join(path, leaf) for leaf in _leaves(kind) if leaf.endswith(f".{key}")]
            meant = inside or difflib.get_close_matches(str(key), hints, n=1)
            advice = f"did you mean {meant[0]!r}?" if meant else f"choose from {', '.join(hints)}"
            problems.append(f"{at}: no such field; {advice}")
        elif NoneType in get_args(hint) and (value is None or (isinstance(value, str) and str in get_args(hint))):
            values[key] = value  # jsonargparse would read the text "#1" as YAML: a comment, so null
        elif value is None or (part and not isinstance(value, dict)):  # jsonargparse takes null for not given
            problems.append(f"{at}: {_complaint(hint, value)}")
        elif part:
            values[key] = _build(part, value, at, problems)
        else:
            leaves[key] = value
    values |= _read_leaves(kind, leaves, path, problems)
    return None if problems else kind(**values)


def _read_leaves(kind: type[Any], leaves: Tree, path: str, problems: list[str]) -> Tree:
    """Return the leaves as jsonargparse reads them, networks unchanged; append each value it refuses to `problems`."""
    hints = field_hints(kind)
    networks = {name: value for name, value in leaves.items() if hints[name] == Network}
    asked = leaves | {name: {} if isinstance(value, dict) else [] for name, value in networks.items()}
    while True:
        try:
            read: Tree = _parser(("", kind)).parse_object(asked, defaults=False).as_dict()
            return read | networks
        except ArgumentError as error:
            message = str(error)
        if required := re.search("arguments are required: (.*)", message):
            noted = {problem.partition(": ")[0] for problem in problems}
            missing = [_join(path, name) for name in required[1].split(", ")]
            problems += [f"{at}: required" for at in missing if at not in noted]
            return {}
        name = re.findall('Parser key "(.+?)"', message)[0]
        problems.append(f"{_join(path, name)}: {_complaint(hints[name], leaves[name])}")
        del asked[name]


def _with_places(config: T, path: str, problems: list[str]) -> T:
    """Return the config with `expanded` paths; append paths that cannot be expanded to `problems`."""
    changes: Tree = {}
    networks = network_fields(type(config))
    for field in fields(config):  # type: ignore[arg-type]
        value, at = getattr(config, field.name), _join(path, field.name)
        if is_dataclass(value):
            changes[field.name] = _with_places(value, at, problems)
            continue
        try:
            if field.name in networks:
                place = {"pretrained": value["pretrained"]} if "pretrained" in value else {}
                changes[field.name] = value | expanded(place, at)
            elif field.name in FILES:
                changes[field.name] = expanded(value, at)
        except ValueError as error:
            problems.append(str(error))
    return replace(config, **changes)  # type: ignore[type-var]


def _complaint(hint: Any, value: Any) -> str:
    """Return the message on a wrong value, with the most similar choice; the entries of a container are not quoted."""
    kind = type(value).__name__
    got = f"a {kind} of {len(value)}" if isinstance(value, dict | list) else shown(value)
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        meant = difflib.get_close_matches(str(value), choices, n=1)
        return f"got {got}; choose from {', '.join(choices)}" + (f"; did you mean {meant[0]!r}?" if meant else "")
    typed = got if value is None or isinstance(value, dict | list) else f"{got} ({kind})"
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
    return f"got {typed}; expected {name}"
