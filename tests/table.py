"""A claim with a table of rows is one test: all rows run, and each that fails is named with its values."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import product
from typing import Any

import pytest

Test = Callable[..., None]


def table(
    names: str | tuple[str, ...], rows: Iterable[Any], ids: Callable[[Any], object] = lambda value: value
) -> Callable[[Test], Test]:
    """Run the decorated test once for each row, within one item.

    Written like ``pytest.mark.parametrize``, for cheap rows; two tables on one test are their product. Each row is a
    subtest of pytest with a ``tmp_path`` and a ``monkeypatch`` of its own; other fixtures are shared by all rows. What
    ``ids`` makes of its values names a row that fails.
    """
    columns = tuple(names.replace(",", " ").split()) if isinstance(names, str) else names
    cases = [dict(zip(columns, row if len(columns) > 1 else (row,), strict=True)) for row in rows]
    named = [(case, {name: ids(value) for name, value in case.items()}) for case in cases]

    def decorate(test: Test) -> Test:
        below = getattr(test, "rows", [({}, {})])
        every = [(row | other, called | others) for (row, called), (other, others) in product(named, below)]
        test = getattr(test, "of_one_row", test)
        parameters = inspect.signature(test).parameters.values()
        taken = [parameter for parameter in parameters if parameter.name not in every[0][0]]

        @wraps(test)
        def of_all_rows(subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, (row, called) in enumerate(every):
                with subtests.test(**called), own(fixtures, number) as fresh:
                    test(**fresh, **row)

        subtests = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        of_all_rows.__signature__ = inspect.Signature([subtests, *taken])  # the fixtures that pytest passes
        of_all_rows.rows, of_all_rows.of_one_row = every, test
        return of_all_rows

    return decorate


@contextmanager
def own(fixtures: Mapping[str, Any], number: int) -> Iterator[dict[str, Any]]:
    """Yield the fixtures as a row finds them: an empty folder, nothing patched, nothing logged or printed."""
    fresh = dict(fixtures)
    with pytest.MonkeyPatch.context() as patch:
        if "monkeypatch" in fresh:
            fresh["monkeypatch"] = patch
        if "tmp_path" in fresh:
            fresh["tmp_path"] = fresh["tmp_path"] / str(number)
            fresh["tmp_path"].mkdir()
        if "caplog" in fresh:
            fresh["caplog"].clear()
        if "capsys" in fresh:
            fresh["capsys"].readouterr()
        yield fresh
