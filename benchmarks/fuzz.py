"""Fuzzing with thousands of wrong configs, arguments, captions and data: python -m benchmarks.fuzz."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARES = {
    "config files": 0.1,
    "configs": 0.25,
    "trainings": 0.2,
    "pipeline arguments": 0.12,
    "captions": 0.05,
    "ldm sample": 0.04,
    "command lines": 0.04,
    "metadata": 0.08,
    "tables": 0.04,
    "image files": 0.08,
}
"""Share of the examples that each area gets."""
PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "jsonargparse", "pyyaml", "pillow", "hypothesis")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "examples", nargs="?", type=int, default=10_000, help="number of examples in all; at least 1 an area"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--out", default="docs/fuzz.json", help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "LDM_CACHE": f"{folder}/cache"}
        areas = fuzz(folder, arguments.examples, arguments.seed)
    found = {
        "examples": sum(area["examples"] for area in areas.values()),
        "failures": sum(area["failures"] for area in areas.values()),
        "seconds": round(sum(area["seconds"] for area in areas.values()), 1),
        "areas": areas,
        "seed": arguments.seed,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    Path(arguments.out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["failures"] else 0)


def fuzz(folder: str, examples: int, seed: int) -> dict[str, dict[str, float]]:
    """Return for each area the number of examples, the number of kinds of failure, and the seconds."""
    import torch

    from tests.fuzzing import Bench, area

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    bench, results = Bench(folder), {}
    for name, share in SHARES.items():
        began = time.perf_counter()
        count, error = fuzz_area(name, *area(name, bench), max(1, round(examples * share)), seed)
        failures = len(error.exceptions) if isinstance(error, ExceptionGroup) else int(error is not None)
        seconds = round(time.perf_counter() - began, 1)
        results[name] = {"examples": count, "failures": failures, "seconds": seconds}
        if error is not None:
            print(f"{name}: a contract is broken", file=sys.stderr)
            traceback.print_exception(error)  # hypothesis has put the falsifying example into its notes
    return results


def fuzz_area(
    name: str, strategy: Any, check: Callable[[Any], object], count: int, seed: int
) -> tuple[int, Exception | None]:
    """Return the number of examples, and the error that a check raised in its smallest example, if it did."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from tqdm.auto import tqdm

    with tqdm(total=count, desc=name, unit="example", mininterval=1, file=sys.stderr) as bar:

        @seeded(seed)
        @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def one(case: Any) -> None:
            bar.update()
            check(case)

        try:
            one()
        except Exception as error:  # any error is a finding
            return bar.n, error
    return bar.n, None


def commit() -> str:
    """Return the commit that was fuzzed, with "-dirty" if files have been changed since."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    return described.stdout.strip()


if __name__ == "__main__":
    main()
