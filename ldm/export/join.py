"""The models of finished stages, joined into one pipeline's folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from ldm.config.places import on_hub, pinned
from ldm.errors import ConfigError
from ldm.export.card import CARD, MEASURED_HEADING, TEMPLATES, with_name
from ldm.export.hub import MODEL_FILES
from ldm.export.systems import SYSTEMS, SystemKind, Value
from ldm.files import read_object
from ldm.models.clip import save_preprocessor
from ldm.models.foreign import LIBRARIES, refuse_strange_components
from ldm.models.provenance import FILE as RECORD
from ldm.models.provenance import (
    TRAINED_IMAGES,
    Provenance,
    read_provenance,
    read_trained_images,
    save_trained_images,
    versions,
)

INDEX = "model_index.json"
JOINED = "joined.json"
"""A hash of each stage, in the folder that was joined from them."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageFolder:
    """The model folder of a finished stage."""

    name: str
    """The stage's name, for messages."""
    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of ``model_index.json``."""
        return read_object(self.folder / INDEX)

    @property
    def saved_as(self) -> str:
        """The name of our class that it is saved as; that of the stock class if there is one."""
        kind = self.index.get("_class_name")
        return str(kind[1] if isinstance(kind, list) and len(kind) == 2 else kind)

    def value(self, path: str) -> Any:
        """Return a value of a component's config, ``COMPONENT.KEY``, or of ``model_index.json``."""
        component, dot, key = path.rpartition(".")
        return read_object(self.folder / component / "config.json").get(key) if dot else self.index.get(key)

    def files(self, component: str) -> dict[str, Path]:
        """Return the files of a component that are no code, by name."""
        found = sorted(path for path in (self.folder / component).iterdir() if path.is_file())
        return {path.name: path for path in found if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)}

    def computes(self, component: str) -> str:
        """Return a hash of what decides what a component computes: weights, vocabularies, lengths."""
        return _hash((name, _deciding(path)) for name, path in self.files(component).items())

    @cached_property
    def everything(self) -> str:
        """A hash of all that it gives to a joined folder."""
        named = [*self.index.items()]
        components = [
            name
            for name, value in named
            if isinstance(value, list) and value[:1] != [None] and not name.startswith("_")
        ]
        paths = [path for component in components for path in self.files(component).values()]
        paths += [self.folder / name for name in (INDEX, CARD, RECORD, TRAINED_IMAGES)]
        return _hash((path.relative_to(self.folder).as_posix(), path.read_bytes()) for path in paths if path.is_file())

    @cached_property
    def record(self) -> Provenance:
        """The record of its training."""
        record = read_provenance(self.folder)
        if record is None:
            raise ConfigError(f"{self.name}: {self.folder} has no record of a training; expected a trained stage")
        return record


def _hash(contents: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, content in contents:
        digest.update(f"{name}/{len(content)}/".encode() + content)
    return digest.hexdigest()


def _deciding(path: Path) -> bytes:
    """Return the part of a component's file that decides what it computes."""
    if path.name == "tokenizer.json":  # it keeps how the last call padded and cut
        tree = {name: value for name, value in read_object(path).items() if name not in ("padding", "truncation")}
        return json.dumps(tree, sort_keys=True).encode()
    if path.name == "tokenizer_config.json":
        return str(read_object(path).get("model_max_length")).encode()
    return b"" if path.name.endswith("config.json") else path.read_bytes()  # configs name versions of libraries


def join(kind: str, stages: Mapping[str, str], to: Path, pipelines: Mapping[str, Any]) -> Path:
    """Write the folder `to`, a pipeline of the class `kind` with the models of finished stages, and return it.

    stages: a folder, or a name on the Hub, for each stage, by its name. Those that the pipeline has no use for, such as
    a CLIP, are left out. pipelines: our classes by name. `to` appears only when it is complete; one that was joined
    from the same stages stays as it is, one that was joined from others is replaced.

    Raises:
        ConfigError: `kind` is unknown, `to` is another folder, a stage is missing, given twice or not whole, or two
            stages do not fit together.
        ValueError: as `refuse_strange_components`.

    """
    system = system_kind(kind)
    if to.exists() and not (to / JOINED).is_file() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} is there already and was not joined; delete it or name another folder")
    found = {name: StageFolder(name, _folder(place)) for name, place in stages.items()}
    chosen = _by_class(system, found)
    for stage in chosen.values():
        _refuse_half(stage, system.components[stage.saved_as])
    refuse_misfits(system, chosen)
    source = _source(chosen, pipelines[kind])
    if _joined_from(to) == source:
        log.info("%s is joined already and stays as it is; delete it to have it written again", to)
        return to
    temporary, old = (to.with_name(f".{what}-{to.name}") for what in ("tmp", "old"))
    try:
        for folder in (temporary, old):  # of a join that was killed
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(system, chosen, temporary, to.name, pipelines[kind])
        (temporary / JOINED).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
        if to.exists():
            os.replace(to, old)
        os.replace(temporary, to)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something was raised
    return to


def system_kind(kind: str) -> SystemKind:
    """Return the system that is joined into the class `kind`; ConfigError if there is none."""
    if kind not in SYSTEMS:
        raise ConfigError(f"pipeline: got {kind}; choose from {', '.join(SYSTEMS)}")
    return SYSTEMS[kind]


def _refuse_half(stage: StageFolder, components: Iterable[str]) -> None:
    """Raise ConfigError if a stage's folder is not whole, ValueError if it names strange components."""
    refuse_strange_components(stage.folder)
    for name in components:
        given = stage.index.get(name)
        if not isinstance(given, list) or given[0] not in LIBRARIES or not (stage.folder / name).is_dir():
            raise ConfigError(f"{stage.name}: {stage.folder} has no {name} of {' or '.join(LIBRARIES)}")
    if not (stage.folder / CARD).is_file():
        raise ConfigError(f"{stage.name}: {stage.folder} has no {CARD}, which is written last: it is not whole")


def _source(stages: Mapping[str, StageFolder], pipeline: Any) -> dict[str, str]:
    """Return a hash of all that each stage gives, and of the pipeline's source, by name."""
    own = _hash([("pipeline.py", pipeline._source.encode())])
    return {"pipeline": own, **{stage.name: stage.everything for stage in stages.values()}}


def _joined_from(folder: Path) -> dict[str, Any] | None:
    """Return what a joined folder was made from; None if there is none, or not a whole one."""
    with suppress(OSError, ValueError):
        return read_object(folder / JOINED) if (folder / CARD).is_file() else None
    return None


def _folder(place: str) -> Path:
    """Return the folder of a model, downloaded if it is on the Hub."""
    if (Path(place) / INDEX).is_file():
        return Path(place)
    if not on_hub(place):
        return Path(place)  # a stage of another kind, or none: `_by_class` says so
    name, revision = pinned(place)
    patterns = [pattern for one in MODEL_FILES for pattern in (one, f"*/{one}")]
    return Path(snapshot_download(name, allow_patterns=patterns, revision=revision.get("revision")))


def _by_class(system: SystemKind, found: Mapping[str, StageFolder]) -> dict[str, StageFolder]:
    """Return the stages that the system needs, by the class that each is saved as."""
    chosen: dict[str, StageFolder] = {}
    for stage in found.values():
        if not (stage.folder / INDEX).is_file() or stage.saved_as not in system.components:
            continue
        if (other := chosen.get(stage.saved_as)) is not None:
            raise ConfigError(f"{stage.name} and {other.name} are both saved as {stage.saved_as}; expected one of them")
        chosen[stage.saved_as] = stage
    if missing := system.components.keys() - chosen.keys():
        raise ConfigError(
            f"{system.own} needs a stage that is saved as {min(missing)}, and none of {', '.join(found) or 'them'} is: "
            "train it, or name its folder"
        )
    return {kind: chosen[kind] for kind in system.components}  # what is written does not depend on the order given


def refuse_misfits(system: SystemKind, stages: Mapping[str, StageFolder]) -> None:
    """Raise ConfigError, with the names of two stages, for what does not fit together; `stages` are by class."""

    def said(where: Value) -> tuple[str, Any]:
        stage = stages[where[0]]
        return stage.name, stage.value(where[1])

    for noun, *pair in system.equal:
        (one, first), (other, second) = map(said, pair)
        if first != second:
            raise ConfigError(f"{one} and {other} do not fit: the {noun} is {first} in {one} and {second} in {other}")
    for kind, own, wanted in system.wanted_classes():
        if (found := stages[kind].index[own][1]) != wanted:
            raise ConfigError(
                f"{stages[kind].name}: its {own} is a {found}; {system.stock} needs {wanted} (sampler.kind)"
            )
    owners: dict[str, tuple[StageFolder, str]] = {}
    for kind, names in system.components.items():
        for own, joined in names.items():
            other_stage, other_own = owners.setdefault(joined, (stages[kind], own))
            if stages[kind].computes(own) != other_stage.computes(other_own):
                raise ConfigError(
                    f"{other_stage.name} and {stages[kind].name} do not fit: they were trained with different "
                    f"components {joined}"
                )
    first_stage, *rest = stages.values()
    seen = {stage.name: {one for one in stage.record.networks if one.startswith("CLIP ")} for stage in stages.values()}
    looked = [(name, clips) for name, clips in seen.items() if clips]
    for name, clips in looked[1:]:
        if clips != looked[0][1]:
            raise ConfigError(f"{looked[0][0]} and {name} do not fit: they were trained on embeddings of two CLIPs")
    for stage in rest:
        if stage.record.held_out_hash != first_stage.record.held_out_hash:
            raise ConfigError(
                f"{first_stage.name} and {stage.name} do not fit: other images were held out in each, so that nothing "
                "could be measured; train both with the same data.held_out"
            )


def _write(system: SystemKind, stages: Mapping[str, StageFolder], folder: Path, name: str, pipeline: Any) -> None:
    index: dict[str, Any] = {"_class_name": system.stock or ["pipeline", system.own]}
    index["_diffusers_version"] = versions()["diffusers"]
    for kind, names in system.components.items():
        for own, joined in names.items():
            index[joined] = stages[kind].index[own]
            (folder / joined).mkdir(exist_ok=True)
            for file, path in stages[kind].files(own).items():
                shutil.copyfile(path, folder / joined / file)
    for name, encoder in system.image_processors.items():
        index[name] = ["transformers", "CLIPImageProcessor"]
        (folder / name).mkdir()
        size = read_object(folder / encoder / "config.json")["image_size"]
        save_preprocessor(folder / name, size)
    prefix = "_" if system.stock else ""
    index |= {f"{prefix}{key}": stages[kind].value(path) for key, (kind, path) in system.settings.items()}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "pipeline.py").write_text(pipeline._source, encoding="utf-8")
    _record(stages).save(folder)
    keys = [read_trained_images(stage.folder) for stage in stages.values()]
    known = [one for one in keys if one is not None]
    if len(known) == len(keys):  # else only the hash of what was held out tells
        save_trained_images(folder, torch.unique(torch.cat(known)))
    _write_card(system, stages, folder, name)  # last: a folder with a card is whole


def _record(stages: Mapping[str, StageFolder]) -> Provenance:
    """Return the record of all stages as one: steps and seconds added, data read as by the first that reads text."""
    records = [stage.record for stage in stages.values()]
    reading = [stage.record for stage in stages.values() if "tokenizer" in stage.index]
    seconds = sum(one.train_seconds for one in records)
    images = sum(one.images_per_second * one.train_seconds for one in records)
    return replace(
        records[-1],
        data_options=(reading or records)[0].data_options,
        train_pictures=max(one.train_pictures for one in records),
        global_step=sum(one.global_step for one in records),
        train_seconds=round(seconds, 1),
        images_per_second=round(images / max(seconds, 1e-9), 1),
        networks=sorted({network for one in records for network in one.networks}),
        versions=versions(),
    )


def _write_card(system: SystemKind, stages: Mapping[str, StageFolder], folder: Path, name: str) -> None:
    cards = {stage.name: ModelCard.load(stage.folder / CARD) for stage in stages.values()}
    told = []
    for stage in stages.values():
        title, _, rest = cards[stage.name].text.strip().removeprefix("# ").partition("\n")
        told.append(
            {
                "name": stage.name,
                "title": title,
                "about": rest.strip().partition("\n")[0],
                "measured": _section(rest, MEASURED_HEADING),
                "data": _section(rest, "\n## Data\n"),
                "record": stage.record,
            }
        )
    body = TEMPLATES.get_template("joined_card.md.jinja").render(
        own=system.own, stages=told, minutes=sum(stage.record.train_seconds for stage in stages.values()) / 60
    )
    licences = {card.data.license for card in cards.values()}
    card = ModelCardData(
        license=licences.pop() if len(licences) == 1 else "other",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", system.own],
        datasets=sorted({name for card in cards.values() for name in card.data.datasets or []}) or None,
    )
    ModelCard(f"---\n{card.to_yaml()}\n---\n\n{with_name(body, name)}").save(folder / CARD)


def _section(card: str, heading: str) -> str:
    """Return the text of a card between a heading of the second level and the next one."""
    return card.partition(heading)[2].partition("\n## ")[0].strip()
