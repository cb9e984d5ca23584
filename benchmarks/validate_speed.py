"""Time to validate 10,000 images, and to check them before a training: python -m benchmarks.validate_speed."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ldm.commands.validate import validate
from ldm.config import DataConfig
from ldm.data.preflight import quick_problems
from ldm.data.sources import build_source
from tests.image_folders import write_folder

IMAGES = 10_000


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, IMAGES, suffixes=("png", "jpg", "webp"))
        for attempt in ("first", "second"):
            began = time.perf_counter()
            config = DataConfig(source="imagefolder", path=name)
            problems = list(quick_problems(build_source(config), config))
            print(f"quick, {attempt}: {time.perf_counter() - began:.2f} s, {len(problems)} problems", file=sys.stderr)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        report = validate(name, out=f"{name}/out")
        seconds = time.perf_counter() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        kinds = dict(Counter(problem.kind for problem in report.problems))
        print(f"validate: {seconds:.1f} s, {IMAGES / seconds:.0f} images/s, {kinds}", file=sys.stderr)
        print(f"memory: {grown:.0f} MB more in this process, {worker:.0f} MB in a worker at most", file=sys.stderr)


if __name__ == "__main__":
    main()
