"""JSON files that anybody may have written: an object, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 2**26


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ValueError, which names it, for everything else; OSError if no file."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size} bytes, more than {MAX_BYTES}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a {type(found).__name__}; expected an object")
    return found
