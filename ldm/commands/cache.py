"""``ldm cache``: what is kept between runs and can be computed again, and how to be rid of it."""

from __future__ import annotations

import time
from datetime import timedelta

from tqdm import tqdm

from ldm.data import cache_folder


def cache(clear: str | None = None) -> None:
    """List what is kept between runs: kinds, entries, size and age; or delete it. It is computed again when needed.

    Args:
        clear: A kind that the list names, or "all": deleted. Its folder is LDM_CACHE, else ~/.cache/ldm; nothing else
            in it is touched, and links are not followed.

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
