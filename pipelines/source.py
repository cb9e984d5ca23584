"""What a pipeline writes beside its weights: its own source, and configs that name no folder of this machine."""

import json
import re
from pathlib import Path

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
