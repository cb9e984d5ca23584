"""The files that a pipeline saves beside its weights: its own source, and configs without paths of this machine."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

SIBLING = re.compile(r"^from \.(\w+) import (?:\([^)]*\)|.*)\n", re.MULTILINE)


def single_file(path: Path) -> str:
    """Return the source at `path` as one file: each sibling module replaces the first statement that imports it.

    One file has two reasons. When diffusers loads a pipeline from a local folder, it finds the modules that it imports,
    but not those that these import. And it caches them by their bare names, so that two folders in one process share
    one version. A file without sibling imports is not changed, so that a loaded pipeline can be saved again.

    Top-level names must be unique among the modules, and be used without the name of their module. No module may have a
    ``from __future__ import``, which is allowed only at the top of a file.
    """
    placed: set[str] = set()

    def place(match: re.Match[str]) -> str:
        name = match[1]
        if name in placed:
            return ""
        placed.add(name)
        return f"\n\n# {name}.py\n\n{expand(path.with_name(f'{name}.py'))}"

    def expand(file: Path) -> str:
        return SIBLING.sub(place, file.read_text(encoding="utf-8"))

    return expand(path)


def without_path(config: str, **changes: Any) -> str:
    """Return the JSON text `config` with `changes`, and without the folder that it was loaded from."""
    values = {**json.loads(config), **changes}
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _module(path: str) -> str:
    return path.rpartition(".")[2]


# diffusers runs the pipeline.py of every folder in one module and expects one pipeline in it: delete earlier ones
for _earlier in [name for name, value in globals().items() if hasattr(value, "_stock")]:
    del globals()[_earlier]


class Portable:
    """A base class, to be named first, of pipelines that save the folder of a stock class and their own source in it.

    ``from_pretrained(folder)`` of `DiffusionPipeline` then loads the stock class, if there is one, and
    ``from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)`` the pipeline itself.
    """

    _stock: ClassVar[str | None]
    """Name of the stock class; None: no stock class samples such a model, and loading it needs its own source."""
    _own_settings: ClassVar[tuple[str, ...]] = ()
    """Values of the config that the stock class does not know: saved with "_" before the name, it passes them over."""
    _source: ClassVar[str]
    """Source of pipeline.py. It is read when the class is defined: diffusers runs a pipeline from a cache file, and the
    next pipeline that it loads overwrites that file."""

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write model_index.json, the last file of `save_pretrained`, and this pipeline's source as pipeline.py.

        `_name_or_path`, the folder that a component was loaded from, is removed from each component's config.json. A
        component of a class of our own, which has a `_source`, gets that source beside its weights.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(self._source, encoding="utf-8")
        for file in folder.glob("*/config.json"):
            file.write_text(without_path(file.read_text(encoding="utf-8")), encoding="utf-8")
        for name, component in self.components.items():  # type: ignore[attr-defined]
            if (source := getattr(component, "_source", None)) is not None:
                (folder / name / f"{_module(type(component).__module__)}.py").write_text(source, encoding="utf-8")
        super().save_config(folder, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return the text of model_index.json, with the name of the stock class, else of pipeline.py and our class."""
        values = json.loads(super().to_json_string())  # type: ignore[misc]
        own = {f"_{name}": values.pop(name) for name in self._own_settings}
        for name, component in self.components.items():  # type: ignore[attr-defined]
            if hasattr(component, "_source"):  # its module is named as diffusers looks for it
                values[name] = [_module(values[name][0]), values[name][1]]
        for value in values.values():  # CLIPImageProcessorPil is what CLIPImageProcessor is without torchvision
            if (
                isinstance(value, list)
                and value[:1] == ["transformers"]
                and str(value[1]).endswith("ImageProcessorPil")
            ):
                value[1] = value[1].removesuffix("Pil")
        return without_path(json.dumps(values), _class_name=self._stock or ["pipeline", type(self).__name__], **own)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return what diffusers makes of the config in a folder; values of our own lose the "_" before their names."""
        own = {f"_{name}": name for name in cls._own_settings}
        named = {own.get(name, name): value for name, value in config_dict.items()}
        return super().extract_init_dict(named, **kwargs)  # type: ignore[misc]
