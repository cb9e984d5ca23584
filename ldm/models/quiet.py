"""Reading, writing and calling models without what diffusers and transformers say that nobody can act on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

SILENCED = (
    "requires torchvision (not installed)",  # nothing here does: the processors that need none are taken
    "Token indices sequence length is longer",  # of captions, which the pipelines then cut
    "The following part of your input was truncated",
    "tokens, of which the text encoder reads",
)
"""Text in messages of diffusers, transformers and our pipelines that is hidden."""


HALF_A_CLIP = ("| UNEXPECTED |",)
"""Text in the report on a folder with the weights of more networks than are loaded."""
MISSING = "| MISSING"
"""Text in a report on weights that a folder has not: it is never hidden."""


@contextmanager
def quietly(*also: str) -> Iterator[None]:
    """Show no bars of components, weights and shards meanwhile, and none of the messages that are `SILENCED`.

    also: more text in messages to hide. Bars of downloads, and all other warnings, are shown.
    """

    def is_of_use(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return MISSING in message or not any(part in message for part in (*SILENCED, *also))

    with ExitStack() as stack:
        for name in ("", "diffusers", "transformers"):  # our pipelines log to the root
            for handler in logging.getLogger(name).handlers:
                handler.addFilter(is_of_use)
                stack.callback(handler.removeFilter, is_of_use)
        stack.callback(transformers_logging.set_tqdm_hook, transformers_logging.set_tqdm_hook(_hidden))
        if diffusers_logging.is_progress_bar_enabled():
            diffusers_logging.disable_progress_bar()
            stack.callback(diffusers_logging.enable_progress_bar)
        yield


def _hidden(factory: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return factory(*arguments, **{**keywords, "disable": True})
