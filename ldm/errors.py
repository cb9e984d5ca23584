"""The errors that other packages catch, and how those of libraries become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """What is wrong with a config: a line for each problem, with its path."""


class HubError(RuntimeError):
    """What the Hub, or the way to it, refused, and what to do about it; one line, without the token."""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn whatever a library makes of a config's values into a `ConfigError` that begins with the path `where`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise every kind
        said = " ".join(str(error).split())[:500] or "no reason given"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(said if said.startswith(where) else f"{where}: {kind}{said}") from error
