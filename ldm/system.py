"""A system: stages that are trained one after another, each by its own script in a process of its own."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm.config import RunConfig, StageConfig, SystemConfig
from ldm.config.file import config_kind, load_config
from ldm.errors import ConfigError
from ldm.export.join import join, system_kind
from ldm.export.planned import refuse_misfits
from ldm.training.signals import PR_SET_PDEATHSIG, Stopped, StopSignals

log = logging.getLogger(__name__)
Scripts = Mapping[type[RunConfig], str]
"""The entry script of each kind of training, by the class of its config."""
DEFAULT_PORT = 29500
"""PyTorch's, where no launcher says another."""
TRIAL_STEPS = 2
"""Optimiser steps after which an examination uses a stage for the next ones."""


@dataclass(frozen=True)
class SystemStage:
    """A stage of a system, as its script trains it."""

    name: str
    script: str
    words: Sequence[str]
    """The command line of the script."""
    folder: Path
    config: RunConfig | None = None
    """Its config, with those words; None: another script's."""
    needs: Sequence[Path] = ()
    """The folders of other stages that it loads models from."""


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the words of a command line that are for the system, and those for each stage, without its name."""
    own: list[str] = []
    of_stages: dict[str, list[str]] = {}
    into = own
    system = {field.name for field in fields(SystemConfig)}
    for word in words:
        if word.startswith("--"):
            name, dot, rest = word.removeprefix("--").partition(".")
            into = of_stages.setdefault(name, []) if dot and name not in system else own
            word = word if into is own else f"--{rest}"
        into.append(word)
    return own, of_stages


def system_stages(
    config: SystemConfig, scripts: Scripts, words: Mapping[str, Sequence[str]], finished: Path | None = None
) -> list[SystemStage]:
    """Return the stages of a system in their order; `words` change their configs, by stage.

    finished: the folder of a system; its stages that have a model are loaded from there.

    Raises:
        ConfigError: a stage's config is wrong, or uses a stage that comes after it; `words` are for no stage.

    """
    if unknown := words.keys() - config.stages.keys():
        raise ConfigError(f"{min(unknown)}: no such stage; choose from {', '.join(config.stages)}")
    kinds = {name: config_kind(file, list(scripts)) for name, file in config.stages.items()}
    configs = {
        name: load_config(kinds[name], ["--config", file, *words.get(name, ())]) for name, file in config.stages.items()
    }
    folders = {name: Path(config.output_dir, name) for name in configs}
    loaded = dict(folders)
    if finished is not None:
        loaded |= {name: finished / name for name in folders if (finished / name / "model").is_dir()}
    stages = []
    for number, (name, own) in enumerate(configs.items()):
        moved = {str(Path(configs[other].output_dir)): loaded[other] for other in list(configs)[:number]}
        later = [str(Path(other.output_dir)) for other in list(configs.values())[number + 1 :]]
        changes, needs = ["--output_dir", str(folders[name])], []
        for path, place in _texts(asdict(own)):
            if late := _below(place, later):
                raise ConfigError(f"{config.stages[name]}: {path} is in {late}, of a stage that is trained later")
            if base := _below(place, moved):
                changes += [f"--{path}", str(moved[base] / Path(place).relative_to(base))]
                needs.append(moved[base])
        file = config.stages[name]
        words_of = ["--config", file, *words.get(name, ()), *changes]
        stages.append(SystemStage(name, scripts[kinds[name]], words_of, folders[name], own, needs))
    return stages


def _texts(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and value of every text in a tree."""
    for name, value in tree.items():
        at = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _texts(value, at)
        elif isinstance(value, str):
            yield at, value


def _below(place: str, folders: Iterable[str]) -> str | None:
    """Return the innermost of `folders` that `place` is in, None if there is none."""
    above = [folder for folder in folders if Path(folder) in Path(place).parents]
    return max(above, key=lambda folder: len(Path(folder).parts), default=None)


def train_stages(stages: Sequence[SystemStage]) -> None:
    """Train each stage that is not trained yet, in its own process; a stage goes on from where it stands.

    Raises:
        SystemExit: a stage ended with another exit code than 0, which is passed on.

    """
    for number, stage in enumerate(stages, 1):
        log.info("stage %d of %d: %s", number, len(stages), stage.name)
        if code := run_stage(stage, number):
            log.error("stage %s ended with exit code %d; the same command goes on from there", stage.name, code)
            sys.exit(code)


def join_stages(config: SystemConfig, stages: Sequence[SystemStage], pipelines: Mapping[str, Any]) -> None:
    """Join the models of the stages into ``OUTPUT_DIR/model``, by the first of several processes; see `join`.

    pipelines: our classes by name.
    """
    if config.pipeline is not None and os.environ.get("RANK", "0") == "0":
        models = {stage.name: str(stage.folder / "model") for stage in stages}
        log.info("the system is in %s", join(config.pipeline, models, Path(config.output_dir, "model"), pipelines))


def check_system(config: SystemConfig, stages: Sequence[SystemStage]) -> None:
    """Raise ConfigError, before anything is trained, if the stages will not make one pipeline."""
    if config.pipeline is not None:
        diffusion = {stage.name: stage.config for stage in stages if isinstance(stage.config, StageConfig)}
        refuse_misfits(system_kind(config.pipeline), diffusion)


def examine_stages(config: SystemConfig, stages: Sequence[SystemStage]) -> None:
    """Examine every stage, and print what all of them need in one table.

    A stage that others load is trained for `TRIAL_STEPS` after its examination, if it has not been trained. Of a stage
    that stands on such a trial only the cost counts.

    Raises:
        SystemExit: with code 1 if something is wrong in a stage.

    """
    trial = ["--loop.max_train_steps", str(TRIAL_STEPS), "--optim.warmup_steps", "1"]
    trial += ["--loop.max_train_epochs", "null", "--loop.max_train_seconds", "null"]
    doctor = [f"--doctor.{name}={value}" for name, value in asdict(config)["doctor"].items() if value is not None]
    rows, wrong, trials = [], [], set[Path]()
    needed = {folder for stage in stages for folder in stage.needs}
    for number, stage in enumerate(stages, 1):
        log.info("stage %d of %d: %s", number, len(stages), stage.name)
        on_trials = bool(trials.intersection(stage.needs))
        if on_trials:
            log.info("it loads stages that are not trained yet: only its cost counts")
        code = run_stage(stage, number, "--doctor", *doctor)
        rows.append((stage.name, _cost(stage.folder / "doctor" / "report.json")))
        if code and not (on_trials and rows[-1][1]):
            wrong.append(stage.name)
        if stage.folder in needed:
            trials.add(stage.folder)
            if run_stage(stage, number, *trial):
                sys.exit(f"stage {stage.name} cannot be trained, and others need it: see above")
    print("\n".join(_table(rows)))
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


def _cost(report: Path) -> Mapping[str, float]:
    """Return the numbers of the cost that an examination found, none if it came to none."""
    findings = json.loads(report.read_text(encoding="utf-8"))["findings"] if report.is_file() else []
    found: Mapping[str, float] = next((one["numbers"] for one in findings if one["name"] == "cost"), {})
    return found


def _table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return the lines of the table of what the stages need here."""
    head = ("stage", "steps", "seconds a step", "hours", "memory, GiB")
    cells = [head]
    for name, cost in rows:
        hours, memory = cost.get("seconds", math.nan) / 3600, cost.get("memory_bytes", math.nan) / 2**30
        steps = f"{cost['steps']:,.0f}" if "steps" in cost else "?"
        cells.append((name, steps, f"{cost.get('step_seconds', math.nan):.3g}", f"{hours:.2f}", f"{memory:.2f}"))
    hours = sum(cost.get("seconds", math.nan) for _, cost in rows) / 3600
    most = max(cost.get("memory_bytes", math.nan) for _, cost in rows) / 2**30
    cells.append(("all", "", "", f"{hours:.2f}", f"{most:.2f}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def run_stage(stage: SystemStage, number: int, *more: str) -> int:
    """Run the script of a stage and return its exit code; signals to stop are passed on to it.

    number: that of the stage, from 1: under a launcher of several processes, each stage needs a port of its own.
    """
    environment = dict(os.environ)
    if int(environment.get("WORLD_SIZE", "1")) > 1:  # the launcher's own store serves one process group
        environment["MASTER_PORT"] = str(int(environment.get("MASTER_PORT", DEFAULT_PORT)) + number)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    with StopSignals().handled():
        process = subprocess.Popen(  # noqa: S603 (our own scripts)
            [sys.executable, stage.script, *stage.words, *more],
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the stage once, from here
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        try:
            code = process.wait()
        except Stopped as stopped:
            process.send_signal(int(stopped.code or 0) - 128)
            process.wait()
            raise
    return 128 - code if code < 0 else code


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
