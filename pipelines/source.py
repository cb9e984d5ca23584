"""What a pipeline writes beside its weights: its own source, and configs that name no folder of this machine."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

SIBLING = re.compile(r"^from \.(\w+) import (?:\([^)]*\)|.*)\n", re.MULTILINE)


def single_file(path: Path) -> str:
    """Return the source at `path` with each of its sibling modules put where it is first imported.

    One file, because diffusers, loading a pipeline from a local folder, finds the modules that it imports but not
    those that they import, and keeps them by their bare names, so that two folders in one process get one version.
    A file without sibling imports comes back as it is: what was loaded from a folder can be saved again.

    The modules must agree on their top-level names and use none by its module's name, and no module may have a
    ``from __future__ import``, which stands only at the top of a file.
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


def without_path(config: str, **changes: str) -> str:
    """Return the JSON text `config`, changed, and without the name of the folder that it was loaded from."""
    values = {**json.loads(config), **changes}
    values.pop("_name_or_path", None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


# diffusers runs the pipeline.py of every folder in one module, in which it wants to find one pipeline, no earlier one
for _earlier in [name for name, value in globals().items() if hasattr(value, "_stock")]:
    del globals()[_earlier]


class Portable:
    """A pipeline whose folder is that of a stock class, with the pipeline's own source in it. A base that comes first.

    ``from_pretrained(folder)`` of `DiffusionPipeline` gives the stock class, ``from_pretrained(folder,
    custom_pipeline=folder, trust_remote_code=True)`` this one.
    """

    _stock: ClassVar[str]
    """Name of the stock class."""
    _source: ClassVar[str]
    """Read with the class: diffusers runs a pipeline from a cache file that the next one it loads overwrites."""

    def save_config(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write model_index.json, the last file of `save_pretrained`, with this pipeline's source as pipeline.py.

        From the components' config.json goes `_name_or_path`, the folder that they were once loaded from.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(self._source, encoding="utf-8")
        for file in folder.glob("*/config.json"):
            file.write_text(without_path(file.read_text(encoding="utf-8")), encoding="utf-8")
        super().save_config(folder, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return model_index.json's text, which names the stock class."""
        return without_path(super().to_json_string(), _class_name=self._stock)  # type: ignore[misc]
