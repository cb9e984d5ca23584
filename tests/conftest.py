"""One core to each process of tests, one thread, no network, a cache folder of the tests' own."""

import os
import threading

# of one core each: a second thread of numpy's would only wait for the first, at the cost of most of the time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from .reliability import Outcomes

PINS = hasattr(os, "sched_setaffinity")  # macOS has none
CORES = os.sched_getaffinity(0) if PINS else set(range(os.cpu_count() or 1))
"""What the machine has for all processes of tests together."""


def take_core(number: int) -> None:
    """Stay on one core, of those that there are.

    A training takes a thread for each core it sees. As many threads as cores, in each of several processes, spend most
    of their time waiting for one another.
    """
    if PINS:
        os.sched_setaffinity(0, {sorted(CORES)[number % len(CORES)]})


if worker := os.environ.get("PYTEST_XDIST_WORKER", ""):
    take_core(int(worker.removeprefix("gw")))


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="file for what the tests of docs/reliability.md did, as JSON")


SLOWEST_FIRST = (
    *("test_resume", "test_doctor", "test_processes", "test_systems", "test_entry", "test_hub", "test_devices"),
    *("test_fuzz", "test_evaluate", "test_security", "test_signals", "test_alarms", "test_resume_check"),
    *("test_changed_underneath", "test_failures", "test_likelihood", "test_preflight", "test_kills"),
)
"""A slow file that is begun last would keep one process busy while all others are done."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable


def pytest_configure(config):
    if not hasattr(config, "workerinput") and not config.getoption("numprocesses", default=None):
        take_core(os.getpid())  # the only process of this run, but perhaps not of this machine
    if config.option.outcomes is not None and not hasattr(config, "workerinput"):  # once, not in every process
        config.pluginmanager.register(Outcomes(config.option.outcomes.resolve()))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    # the bars' lock is shared with forked processes: one that is killed, or that is forked while the bars' own thread
    # holds it, would let all others wait for ever
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what the tests compute out of the user's cache, and shared by all tests and processes of one run."""
    before, folder = os.environ.get("LDM_CACHE"), tmp_path_factory.getbasetemp()
    os.environ["LDM_CACHE"] = str((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache")
    yield
    if before is None:
        del os.environ["LDM_CACHE"]
    else:
        os.environ["LDM_CACHE"] = before


@pytest.fixture(scope="module", autouse=True)
def _own_precision():
    """Let each module choose its precision: accelerate keeps the first one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
