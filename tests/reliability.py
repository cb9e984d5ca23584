"""What can go wrong: the promises, and which tests hold them.

A test belongs to the rows that its name begins with: ``test_r01_...``, ``test_r02_r17_...``, ``test_s03_...``. Each run
with ``--outcomes FILE`` leaves what its tests did; ``python -m tests.reliability FILES`` makes one page of them, and
``python -m tests.reliability`` the page of promises alone, which is docs/reliability.md.
"""

import json
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

ROWS = {
    "r01": "Killed while saving: the newest checkpoint verifies, at most one save interval is lost",
    "r02": "The old checkpoint is deleted only when the new one is in place and on the disk",
    "r03": "A file of a checkpoint that is cut, changed, emptied or deleted is named; the checkpoint before it is used",
    "r04": "Killed and resumed equals uninterrupted, to the bit: weights, averages, optimiser, losses, samples",
    "r05": "Every image exactly once an epoch, also over kills and other numbers of processes",
    "r06": "Averaged weights are saved, resumed and exported, and never swapped into the trained ones",
    "r07": "No state of a random generator is needed; a part that is missing is an error",
    "r08": "A loss or gradient that is not finite changes nothing; many in a row stop the run and name the images",
    "r09": "float16: weights are float32; an overflow skips the step, schedule and averages with it",
    "r10": "Accumulated gradients: the same number of steps, the same losses",
    "r11": "Images that cannot be read are all listed before the first step, or left out and counted",
    "r12": "Rows without file and files without row are listed before the first step",
    "r13": "An image of too many pixels is refused by its header, at no cost of memory",
    "r14": "Every colour mode, transparency, 16 bits and orientation become the pixels that they mean",
    "r15": "Captions that are null, empty, lists or overlong neither crash nor pass unseen",
    "r16": "Images of any size and shape become the trained size",
    "r17": "A full disk: bytes needed and free are said, the old checkpoint stays, nothing half is left",
    "r18": "A loader process that dies, hangs or fails ends the run in time, with the images it was at",
    "r19": "A process that raises, dies, exits or stops ends the whole run in time, resumable",
    "r20": "Processes and micro-batches share a step without gap or overlap; what cannot be shared is refused",
    "r21": "SIGTERM and SIGUSR1: a checkpoint of the step reached, exit code 143 or 138, no orphan",
    "r22": "Resumed with another config or other images: refused with both values, unless allowed",
    "r23": "One run in one folder",
    "r24": "Checkpoints of released versions are resumed",
    "r25": "A resume notices whatever changed underneath: captions, images, networks, precision",
    "r26": "Splits, columns and files are read as the ecosystem reads them; a guess is said",
    "r27": "Ctrl-C: a checkpoint of the step reached, one line, exit code 130; a second one exits at once",
    "s01": "Nothing is unpickled: safetensors and JSON only",
    "s02": "No code of a model folder or of the Hub runs unless it is trusted; revisions can be pinned",
    "s03": "No token, host, user or folder in anything that is written or sent",
    "s04": "Model cards and saved configs name no folder of this machine",
    "s05": "No path leads out of the folder of the data, of the model or of the run",
    "s06": "A push that fails midway loses nothing and is finished by ldm push",
    "s08": "Nothing connects to anywhere unasked; known vulnerabilities can be looked up (make audit)",
}


def rows_of(name: str) -> list[str]:
    """Return the rows that a test's name begins with."""
    found = re.match(r"test((?:_[rs]\d\d)+)(?:_|$)", name)
    return found[1].strip("_").split("_") if found else []


class Outcomes:
    """Pytest plugin: writes the outcomes of the tests that belong to rows to a file, row by row."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            module, _, name = report.nodeid.partition("::")
            name = name.partition("[")[0]
            for row in rows_of(name):
                self.rows[row][f"`{Path(module).stem}::{name}`"].append(report.outcome)

    def pytest_sessionfinish(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")


def title(row: str) -> str:
    return f"{row[0].upper()}{int(row[1:])}"


def promises() -> str:
    """Return docs/reliability.md."""
    lines = [
        "# What can go wrong, and what happens then",
        "",
        "Each promise is held by the tests that are named after its row: `test_r04_...` holds R4, `test_s03_...` S3.",
        "`make reliability` runs them all, and writes this table with the tests and what they did to",
        "`build/reliability.md`.",
        "Longer runs of the same, by script: [kills.json](kills.json), [fuzz.json](fuzz.json).",
        "",
        "| | promise |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {title(row)} | {promise} |" for row, promise in ROWS.items()), ""])


def page(files: list[Path]) -> str:
    """Return the same table with the tests of each row, and what they did in the runs that left ``files``."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        for row, tests in json.loads(file.read_text(encoding="utf-8")).items():
            for test, outcomes in tests.items():
                found[row][test] += outcomes
    lines = [
        "# What can go wrong, and what happens then",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}.",
        "",
        "| | promise | tests | result |",
        "|---|---|---|---|",
    ]
    for row, promise in ROWS.items():
        cases = [outcome for outcomes in found[row].values() for outcome in outcomes]
        counts = {outcome: cases.count(outcome) for outcome in ("passed", "failed", "skipped") if outcome in cases}
        result = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test"
        lines.append(f"| {title(row)} | {promise} | {'<br>'.join(sorted(found[row]))} | {result} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(page([Path(file) for file in sys.argv[1:]]) if sys.argv[1:] else promises(), end="")
