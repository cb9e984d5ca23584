"""The errors that other packages catch, and `explained`, which turns errors of libraries into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """An error in a config: one line for each problem, with the path of the setting."""


class HubError(RuntimeError):
    """A failed request to the Hub, and what to do about it, in one line; never with the token."""


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn any error of a library into a `ConfigError` that begins with `where`, the path of the setting."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise every kind
        said = " ".join(str(error).split())[:500] or "no reason given"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigError(said if said.startswith(where) else f"{where}: {kind}{said}") from error
