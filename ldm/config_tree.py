"""The text of a config, YAML and command-line overrides, as one tree of plain values, not yet checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

Tree = dict[Any, Any]


class ConfigError(ValueError):
    """What is wrong with a config: a line for each problem, with its path."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2 scalars: ``no`` and 12:30 are text, 1e-4 is a number; a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for index, (key, _) in enumerate(node.value):
            if any(key.value == earlier.value for earlier, _ in node.value[:index]):
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes text that `_Loader` or a YAML 1.1 reader would take for something else."""


_FLOAT = r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)$|\.nan$"
for _tag, _pattern, _first in (
    ("null", r"(?:null|~|)$", ["n", "~", ""]),
    ("bool", r"(?:true|True|false|False)$", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))


def _represent_text(dumper: Any, text: str) -> Any:
    """Return text as a scalar; PyYAML loses unusual line ends (U+0085) that it does not escape."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


class Text(str):
    """The value of an override, still to be read: how depends on its field."""

    __slots__ = ()

    def parsed(self) -> Any:
        """Return the value as YAML, or as it stands if it is not YAML."""
        try:
            return yaml.load(self, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        except (yaml.YAMLError, ValueError):
            return str(self)


def read_tree(words: list[str], problems: list[str]) -> Tree:
    """Return the tree of the last ``--config FILE.yaml`` in a command line, other options put into it.

    Values of options are `Text`. What is wrong with an option is added to `problems`.

    Raises:
        ConfigError: if the file cannot be read.

    """
    options = list(_options(words, problems))
    files = [text for path, text in options if path == "config"]
    tree = _read_file(files[-1]) if files else {}
    for path, text in options:
        if path != "config":
            _put(tree, path, text, problems)
    return tree


def dump_tree(tree: Tree) -> str:
    """Return YAML from which `read_tree` makes an equal tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def shown(value: Any) -> str:
    """Return how an error shows a value; what a container holds stays out of it."""
    kind = type(value).__name__
    if value is None:
        return "null"
    return f"a {kind} of {len(value)}" if isinstance(value, dict | list) else f"{value!r:.80} ({kind})"


def _read_file(file: str) -> Tree:
    """Return the mapping in a YAML file; an empty file is an empty mapping."""
    try:
        tree = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:  # its own text quotes the file, secrets included
        begun = f" ({error.context} of line {error.context_mark.line + 1})" if error.context_mark else ""
        line = error.problem_mark.line + 1
        raise ConfigError(f"{file}, line {line}: not valid YAML: {error.problem}{begun}") from None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{file}: not valid YAML in UTF-8") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{file}: got {shown(tree)}; expected a mapping of fields")
    return tree or {}


def _options(words: list[str], problems: list[str]) -> Iterator[tuple[str, Text]]:
    """Yield ``(path, value)`` for each ``--path value`` and ``--path=value``."""
    remaining = words[::-1]
    while remaining:
        word = remaining.pop()
        path, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):  # not echoed: it may belong to an unknown option
            problems.append("command line: a word that belongs to no option; write --path.to.field VALUE")
        elif equals:
            yield path, Text(value)
        elif remaining and not remaining[-1].startswith("--"):
            yield path, Text(remaining.pop())
        else:
            problems.append(f"{path}: no value given; write --{path} VALUE")


def _put(tree: Tree, path: str, text: Text, problems: list[str]) -> None:
    """Put an option's value into the tree, with the mappings that lead to it."""
    *parents, name = path.split(".")
    for parent in parents:
        below = tree.get(parent)
        if isinstance(below, Text):  # from an option for the whole part
            below = below.parsed()
        tree[parent] = below = {} if below is None else below
        if not isinstance(below, dict):
            problems.append(f"{path}: {parent!r} holds {shown(below)}, not a mapping; give the whole of it")
            return
        tree = below
    tree[name] = text
