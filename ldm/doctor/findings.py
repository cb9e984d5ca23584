"""The findings of an examination, as text and as JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """The result of one check; `text` has the numbers and, if it is not ok, the remedy."""

    name: str
    ok: bool
    text: str
    warnings: tuple[str, ...] = ()
    """Settings that are allowed but seldom meant."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Some of the numbers in `text`, for programs."""

    def lines(self) -> list[str]:
        """Return the finding as lines of text."""
        return [
            f"{'ok' if self.ok else 'wrong'}  {self.name}: {self.text}",
            *(f"       warning: {warning}" for warning in self.warnings),
        ]


def report(findings: Iterator[Finding], folder: Path, sheets: str) -> None:
    """Print each finding as it comes; write ``report.txt`` and ``report.json``; exit with code 1 if one is wrong.

    What the examination itself left in `folder` is deleted: checkpoints, ``metrics.jsonl``, and the folder `sheets`.
    """
    began, found, lines = time.perf_counter(), [], []
    for finding in findings:
        found.append(finding)
        lines += finding.lines()
        print("\n".join(finding.lines()), flush=True)
    wrong = [finding.name for finding in found if not finding.ok]
    lines.append(f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong")
    print(lines[-1])
    for leftover in ("checkpoints", sheets):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    (folder / "report.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    seconds = round(time.perf_counter() - began, 1)
    content = {"ok": not wrong, "seconds": seconds, "findings": [asdict(finding) for finding in found]}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(1)
