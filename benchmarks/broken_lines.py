"""Lines drawn by seed, broken one at a time, and the tests that notice it: python -m benchmarks.broken_lines OUT.

``--again EARLIER`` breaks the lines of an earlier result again, wherever they stand now: what was noticed before a
change to the tests must be noticed after it.

First the fast tests run once, in a copy of the tree in which every statement notes that it was reached, and by which
test; also in processes that a test starts. Then each line is broken in another copy, and the fastest of the tests that
reach it run until one fails. A test counts only if it passes while nothing is broken.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("ldm", "pipelines")
TESTS = 40
"""Run at most, for each line: the fastest that reach it."""
OTHER: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
}
"""What an operator is exchanged for."""


@dataclass(frozen=True)
class Broken:
    """A statement and the other one that takes its place."""

    file: str
    line: int
    was: str
    now: str
    mutation: str


FIELDS = tuple(field.name for field in fields(Broken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file for the result")
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="an earlier result, whose lines are broken")
    parser.add_argument("--tests", nargs="*", default=[], help="files of tests to run; all, if none is named")
    parser.add_argument("--contexts", type=Path, help="file that keeps which test reaches which line: read, or written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder) / "tree")
        contexts = arguments.contexts or Path(folder) / "contexts.json"
        if not contexts.exists():
            watch(copied(Path(folder) / "watched"), arguments.tests, contexts)
        reached = json.loads(contexts.read_text(encoding="utf-8"))
        if arguments.again:
            earlier = json.loads(arguments.again.read_text(encoding="utf-8"))["lines"]
            again = [found_again(Broken(**{name: line[name] for name in FIELDS}), tree) for line in earlier]
            earlier = [line for line, broken in zip(earlier, again, strict=True) if broken]
            drawn = [broken for broken in again if broken]
        else:
            earlier, drawn = [], draw(reached, tree, arguments.lines, random.Random(arguments.seed))
        warm(tree)
        lines = []
        for broken in drawn:
            lines.append(asdict(broken) | {"by": noticed_by(broken, reached, tree)})
            print(json.dumps(lines[-1]), flush=True)
    for line, before in zip(lines, earlier, strict=False):
        line["before"] = before["by"]
    counts = {when: sum(line[when] is not None for line in lines) for when in ("by", "before") if when in lines[0]}
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    result = {"commit": commit, "noticed": counts, "lines": lines}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lost = [f"{line['file']}:{line['line']}" for line in lines if line.get("before") and not line["by"]]
    sys.exit(f"no longer noticed: {', '.join(lost)}" if lost else 0)


def copied(to: Path) -> Path:
    """Return a folder with all files of the project that git knows, as they are in the working tree."""
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).exists():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


WATCHER = """
import builtins, os, pathlib

log = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
now = pathlib.Path(os.environ["REACHED"] + ".test")  # for the processes that a test starts
seen, test, process = set(), "", 0

def begin(name):
    global test, process
    now.write_text(name)
    test, process = name, os.getpid()
    seen.clear()

def reached(place):
    global test, process
    if place not in seen:
        seen.add(place)
        if process != os.getpid():
            test, process = now.read_text() if now.exists() else "", os.getpid()
        os.write(log, f"{test}\\t{place}\\n".encode())

builtins.__reached__ = reached
"""
"""What every process of the watched tree begins with."""


def watch(tree: Path, tests: list[str], out: Path) -> None:
    """Run tests once and write, as JSON, the seconds of each that passes and the tests that reach each line."""
    for package in PACKAGES:
        for path in (tree / package).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            noted = Noted(path.relative_to(tree).as_posix(), statements(source)).visit(ast.parse(source))
            path.write_text(ast.unparse(ast.fix_missing_locations(noted)) + "\n", encoding="utf-8")
    (tree / "sitecustomize.py").write_text(WATCHER, encoding="utf-8")
    log, seconds = tree / "reached.log", tree / "seconds.json"
    run = [sys.executable, "-c", "import sys; from benchmarks.broken_lines import timed; timed(*sys.argv[1:])"]
    subprocess.run([*run, str(seconds), *tests], cwd=tree, env=environment(tree) | {"REACHED": str(log)}, check=True)
    reached: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in log.read_text(encoding="utf-8").splitlines():
        test, _, place = line.partition("\t")
        file, _, number = place.rpartition(":")
        if test:
            reached[file][number].add(test)
    lines = {file: {number: sorted(names) for number, names in of.items()} for file, of in reached.items()}
    found = {"seconds": json.loads(seconds.read_text(encoding="utf-8")), "lines": lines}
    out.write_text(json.dumps(found), encoding="utf-8")


class Noted(ast.NodeTransformer):
    """Puts a call before each of some statements, which notes that it was reached."""

    def __init__(self, file: str, nodes: dict[int, ast.stmt]):
        self.file, self.lines = file, {line for line, node in nodes.items() if mutations(node)}

    def visit(self, node: ast.AST) -> Any:
        """Return the node, with the call before it where it is one of the statements."""
        self.generic_visit(node)
        if not isinstance(node, ast.stmt) or node.lineno not in self.lines or isinstance(node, SKIPPED):
            return node
        note = ast.Call(ast.Name("__reached__", ast.Load()), [ast.Constant(f"{self.file}:{node.lineno}")], [])
        return [ast.Expr(note), node]


def timed(out: str, *tests: str) -> None:
    """Run tests in this process; say which is running, and write the seconds of those that pass."""
    import pytest
    import sitecustomize

    class Timed:
        """Pytest plugin."""

        def __init__(self) -> None:
            self.seconds: dict[str, float] = defaultdict(float)
            self.failed: set[str] = set()

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
            sitecustomize.begin(item.nodeid)
            return (yield)

        @pytest.hookimpl(wrapper=True)
        def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
            if fixturedef.scope == "function":
                return (yield)
            sitecustomize.begin(request._pyfuncitem.nodeid.partition("::")[0])  # made once: for all tests of the file
            try:
                return (yield)
            finally:
                sitecustomize.begin(request._pyfuncitem.nodeid)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if type(report) is pytest.TestReport:  # not a row of a table
                self.seconds[report.nodeid] += report.duration
            if report.outcome != "passed":
                self.failed.add(report.nodeid)

    plugin = Timed()
    pytest.main(["-q", "-m", "not slow", "-p", "no:xdist", "-p", "no:cacheprovider", *tests], plugins=[plugin])
    print(f"left out, because they do not pass here: {sorted(plugin.failed)}")
    seconds = {test: took for test, took in plugin.seconds.items() if test not in plugin.failed}
    Path(out).write_text(json.dumps(seconds), encoding="utf-8")


def draw(reached: dict[str, Any], tree: Path, number: int, rng: random.Random) -> list[Broken]:
    """Return ``number`` statements that tests reach, each broken in one way of those that it can be."""
    places = []
    for file, lines in sorted(reached["lines"].items()):
        nodes = statements((tree / file).read_text(encoding="utf-8"))
        places += [(file, line) for line in sorted(nodes) if lines.get(str(line)) and mutations(nodes[line])]
    drawn = []
    for file, line in rng.sample(places, number):
        node = statements((tree / file).read_text(encoding="utf-8"))[line]
        mutation, other = rng.choice(mutations(node))
        drawn.append(Broken(file, line, head(node), head(other), mutation))
    return drawn


def found_again(broken: Broken, tree: Path) -> Broken | None:
    """Return the same statement where it stands now: the nearest with this text in its file. None if it is gone."""
    path = tree / broken.file
    nodes = statements(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = [line for line, node in nodes.items() if head(node) == broken.was]
    if not same:
        print(f"gone: {broken.file}: {broken.was}")
        return None
    return Broken(**asdict(broken) | {"line": min(same, key=lambda line: abs(line - broken.line))})


def statements(source: str) -> dict[int, ast.stmt]:
    """Return the statements within functions, by first line: no definitions, docstrings, imports or log lines."""
    found = {}
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.stmt) and not isinstance(node, SKIPPED) and not only_says(node):
                    found[node.lineno] = node
    return found


SKIPPED = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Pass, ast.Try, ast.Raise, ast.Assert)


def only_says(node: ast.stmt) -> bool:
    """Return whether the statement is a text, or a call that logs, prints or warns."""
    if not isinstance(node, ast.Expr):
        return False
    call = node.value
    said = ("log", "print", "warnings")
    return isinstance(call, ast.Constant) or (isinstance(call, ast.Call) and ast.unparse(call.func).startswith(said))


def head(node: ast.stmt) -> str:
    """Return the statement as text in one line; of one that holds others, its head."""
    return ast.unparse(node).partition("\n")[0]


def mutations(node: ast.stmt) -> list[tuple[str, ast.stmt]]:
    """Return every way in which this statement can be broken, and what then stands in its place."""
    found: list[tuple[str, ast.stmt]] = []
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Delete):
        found.append(("deleted", ast.Pass()))
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        found.append(("returns None", ast.Return(ast.Constant(None))))
    if isinstance(node, ast.If | ast.While):
        other = copy.deepcopy(node)
        other.test = ast.UnaryOp(ast.Not(), other.test)
        found.append(("negated", other))
    for number, part in enumerate(own(node)):
        other = copy.deepcopy(node)
        changed = exchanged(own(other)[number])
        if changed and head(other) != head(node):
            found.append((f"{changed} in {ast.unparse(part)}"[:100], other))
    return found


def own(node: ast.AST) -> list[ast.AST]:
    """Return the statement and its expressions, but not the statements within it, in a fixed order."""
    parts = [node]
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.JoinedStr | ast.excepthandler | ast.match_case):
            parts += own(child)
    return parts


def exchanged(part: ast.AST) -> str:
    """Exchange in place what the expression does, and return what was exchanged: nothing if there is none."""
    if isinstance(part, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(part.op) in OTHER:
        part.op = OTHER[type(part.op)]()
        return "other operator"
    if isinstance(part, ast.Compare) and type(part.ops[0]) in OTHER:
        part.ops[0] = OTHER[type(part.ops[0])]()
        return "other comparison"
    if isinstance(part, ast.Constant) and isinstance(part.value, bool | int | float):
        part.value = not part.value if isinstance(part.value, bool) else 0 if part.value == 1 else part.value + 1
        return "other constant"
    if isinstance(part, ast.Call) and swappable(part):
        part.args[:2] = reversed(part.args[:2])
        return "arguments swapped"
    if isinstance(part, ast.IfExp):
        part.body, part.orelse = part.orelse, part.body
        return "branches swapped"
    return ""


def swappable(call: ast.Call) -> bool:
    """Return whether the first two arguments can be exchanged, and not so that every call fails."""
    plain = len(call.args) > 1 and not any(isinstance(argument, ast.Starred) for argument in call.args[:2])
    return plain and ast.unparse(call.func) != "isinstance"


def noticed_by(broken: Broken, reached: dict[str, Any], tree: Path) -> str | None:
    """Break the line in ``tree``, run the fastest tests that reach it, mend it; return the one that fails, if any."""
    path, seconds = tree / broken.file, reached["seconds"]
    source = path.read_text(encoding="utf-8")
    node = statements(source)[broken.line]
    other = next(o for mutation, o in mutations(node) if (mutation, head(o)) == (broken.mutation, broken.now))
    lines = source.splitlines(keepends=True)
    indent = " " * node.col_offset
    text = "".join(f"{indent}{line}\n" for line in ast.unparse(other).splitlines())
    changed = "".join([*lines[: node.lineno - 1], text, *lines[node.end_lineno :]])
    contexts = set(reached["lines"].get(broken.file, {}).get(str(broken.line), []))
    tests = sorted((t for t in seconds if {t, t.partition("::")[0]} & contexts), key=lambda t: (seconds[t], t))[:TESTS]
    try:
        while tests:
            path.write_text(changed, encoding="utf-8")
            failed = first_failure(tests, tree, 120 + 20 * sum(seconds[test] for test in tests))
            path.write_text(source, encoding="utf-8")
            if failed in (None, NO_END) or first_failure([failed], tree, 120 + 20 * seconds.get(failed, 0)) is None:
                return failed
            tests.remove(failed)  # fails without the broken line too
    finally:
        path.write_text(source, encoding="utf-8")
    return None


NO_END = "no end"


def first_failure(tests: list[str], tree: Path, seconds: float) -> str | None:
    """Return the first test, or file of tests, that fails; ``NO_END`` if they take longer than ``seconds``."""
    log = tree / "pytest.log"
    process = multiprocessing.get_context("fork").Process(target=run, args=(tests, tree, log))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        return NO_END
    if process.exitcode == 0:
        return None
    text = log.read_text(encoding="utf-8", errors="replace")
    said = [line.partition(" ")[2] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    named = [test for test in tests if any(line.startswith(test) for line in said)]
    return max(named, key=len) if named else said[0].partition(" - ")[0] if said else f"exit code {process.exitcode}"


def run(tests: list[str], tree: Path, log: Path) -> None:
    """Run tests of ``tree`` in this process, which has not imported anything of it yet, up to the first failure."""
    import pytest

    os.setpgid(0, 0)
    os.chdir(tree)
    os.environ |= environment(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(pytest.main(["-x", "-q", "--tb=no", "-rfE", "-p", "no:xdist", "-p", "no:cacheprovider", "-s", *tests]))


def warm(tree: Path) -> None:
    """Import what the project and its tests take from other packages: each run of tests is forked from this process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    for path in [path for name in (*PACKAGES, "tests") for path in (tree / name).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and not (tree / node.module.split(".")[0]).exists():
                with suppress(ImportError):
                    module = import_module(node.module)
                    for alias in node.names:
                        getattr(module, alias.name, None)


def environment(tree: Path) -> dict[str, str]:
    """Return the variables under which Python takes the modules of ``tree``, and leaves no compiled ones behind."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    main()
