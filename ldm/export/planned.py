"""Stages that are not trained yet: what their configs say of how they fit into one pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from os.path import normpath
from typing import Any

from ldm.config import StageConfig
from ldm.errors import ConfigError
from ldm.export.kinds import KINDS, MODEL, PipelineKind
from ldm.export.systems import SET, SystemKind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedStage:
    """A stage by its config, and the pipeline that it will be saved as."""

    name: str
    config: StageConfig
    kind: PipelineKind

    def value(self, path: str) -> Any:
        """Return the value that a `Value` names, None if only the trained stage has it."""
        component, dot, key = path.rpartition(".")
        if dot:
            return self.config.denoiser.get(key) if self.kind.components[component] == f"{MODEL}denoiser" else None
        try:
            return attrgetter(self.kind.settings[path.removeprefix("_")].removeprefix(MODEL))(self.config)
        except AttributeError:
            return None

    @property
    def readers(self) -> Iterator[tuple[str, str]]:
        """Yield the field and the place of each pretrained encoder that it is trained with."""
        for path in ("space.image_encoder", "conditioners.image.pretrained", "conditioners.text.pretrained"):
            part, _, key = path.rpartition(".")
            place = getattr(attrgetter(part)(self.config), key, None)
            if place is not None:
                yield path, place


def refuse_misfits(system: SystemKind, configs: Mapping[str, StageConfig]) -> None:
    """Raise ConfigError, with the names of two stages, if these will not be joined; `configs` are by stage.

    Only what the configs say is known: not the sizes of a pretrained network. Lists of what is held out may have the
    same content, so that other ones are a warning; `ldm.export.join` compares the content.
    """
    stages = _by_class(system, configs)
    for noun, one, other in system.equal:
        (first, first_path), (second, second_path) = ((stages[own], path) for own, path in (one, other))
        found, wanted = first.value(first_path), second.value(second_path)
        if None not in (found, wanted) and found != wanted:
            raise ConfigError(
                f"{first.name} and {second.name} do not fit: the {noun} is {found} in {first.name} and {wanted} in "
                f"{second.name}"
            )
    for own, wanted_values in system.fields.items():
        for path, wanted in wanted_values.items():
            found = attrgetter(path)(stages[own].config)
            if (found is None) if wanted is SET else (found != wanted):
                raise ConfigError(
                    f"{stages[own].name} does not fit: {path} is {found}, and {system.stock or system.own} needs "
                    f"{'a value' if wanted is SET else wanted}"
                )
    looked = [(stage.name, path, place) for stage in stages.values() for path, place in stage.readers]
    for (one_name, one_path, one_place), (name, path, place) in pairwise(looked):
        if normpath(one_place) != normpath(place):
            raise ConfigError(
                f"{one_name} and {name} do not fit: they use two {system.reader}, {one_path} is {one_place} and {path} "
                f"is {place}; name one place in all"
            )
    texts = [(stage.name, stage.config.conditioners.text) for stage in stages.values()]
    reading = [(name, text) for name, text in texts if text is not None]
    for name, text in reading if len(reading) > 1 else ():
        if text.train or text.pretrained is None:
            raise ConfigError(
                f"{name} does not fit: it trains a text encoder of its own, and all stages must read with one; set "
                "conditioners.text.pretrained, and conditioners.text.train to false"
            )
    for (one_name, one_text), (name, text) in pairwise(reading):
        for key in ("max_length", "dtype"):
            if (found := getattr(one_text, key)) != (wanted := getattr(text, key)):
                raise ConfigError(
                    f"{one_name} and {name} do not fit: conditioners.text.{key} is {found} in {one_name} and {wanted} "
                    f"in {name}"
                )
    for before, after in pairwise(stages.values()):
        for key in ("source", "path", "split", "held_out_percent"):
            one, other = (getattr(stage.config.data, key) for stage in (before, after))
            if one != other:
                raise ConfigError(
                    f"{before.name} and {after.name} do not fit: data.{key} is {one} in {before.name} and {other} in "
                    f"{after.name}; train all stages on the same images"
                )
        if before.config.data.held_out != after.config.data.held_out:
            log.warning(
                "%s and %s name other files of held-out captions: if these do not hold out the same images, the "
                "trained stages cannot be joined",
                before.name,
                after.name,
            )


def _by_class(system: SystemKind, configs: Mapping[str, StageConfig]) -> dict[str, PlannedStage]:
    """Return the stages that the system needs, by the class that each will be saved as."""
    found: dict[str, PlannedStage] = {}
    for name, config in configs.items():
        kind = _kind(config)
        if kind is None or (own := kind.stock or kind.own) not in system.components:
            continue
        if (other := found.get(own)) is not None:
            raise ConfigError(f"{other.name} and {name} are both saved as {own}; expected one of them")
        found[own] = PlannedStage(name, config, kind)
    if missing := system.components.keys() - found.keys():
        raise ConfigError(
            f"pipeline: {system.own} needs a stage that is saved as {min(missing)}, and none of {', '.join(configs)} is"
        )
    return found


def _kind(config: StageConfig) -> PipelineKind | None:
    """Return the pipeline that a stage will be saved as, None if its config does not say."""
    conditions = {name for name, part in vars(config.conditioners).items() if part is not None}
    for kind in KINDS:
        denoiser = config.denoiser.get("_class_name", kind.denoiser)  # a pretrained one has its class in its folder
        if (kind.space, kind.denoiser, {*kind.conditions}) == (config.space.kind, denoiser, conditions):
            return kind
    return None
