"""``ldm cache``: list or delete the cache, which holds what later runs would compute again."""

from __future__ import annotations

import time
from datetime import timedelta

from tqdm import tqdm

from ldm.data import cache_folder


def cache(clear: str | None = None) -> None:
    """List the kinds of cached results with entries, size and age; or delete them. They are computed again when needed.

    Args:
        clear: The kind to delete, as listed, or "all". The folder is LDM_CACHE, else ~/.cache/ldm; other files in it
            are not touched, and links are not followed.

    """
    kinds = cache_folder.kinds()
    names = [kind.name for kind in kinds]
    if clear is not None and clear != "all" and clear not in names:
        raise ValueError(f"clear: got {clear!r}; expected one of {', '.join([*names, 'all'])}")
    print(cache_folder.cache_folder())
    print(f"{'kind':16}{'entries':>8}{'size':>10}  last written")
    for kind in kinds:
        size = tqdm.format_sizeof(kind.size, "B")
        print(f"{kind.name:16}{kind.entries:8}{size:>10}  {timedelta(seconds=int(time.time() - kind.written))} ago")
    for name in names if clear == "all" else [clear] if clear is not None else []:
        cache_folder.clear(name)
        print(f"deleted {name}")
