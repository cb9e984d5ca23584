"""Libraries say nothing of every part that is read or written; what a user can act on is heard."""

import logging

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ldm.models.quiet import SILENCED, quietly

from .table import table


@table("name", ["ldm", "diffusers.pipelines.some", "transformers.utils.some"])
def test_messages_without_a_remedy_are_silenced_meanwhile_and_others_are_not(name, monkeypatch):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    library = logging.getLogger(name.partition(".")[0] if "." in name else "")
    monkeypatch.setattr(library, "handlers", [handler])
    logger = logging.getLogger(name)
    with quietly():
        for part in SILENCED:
            logger.warning("before %s after", part)
        logger.warning("weights were not initialised")
    assert heard == ["weights were not initialised"]
    with quietly("| UNEXPECTED |"):
        logger.warning("text_model | UNEXPECTED |")
        logger.warning("text_model | UNEXPECTED |, vision_model | MISSING |")
    assert heard.pop() == "text_model | UNEXPECTED |, vision_model | MISSING |"
    logger.warning(SILENCED[0])
    assert heard[1:] == [SILENCED[0]]


def test_bars_of_parts_are_hidden_meanwhile():
    for logs in (diffusers_logging, transformers_logging):
        with quietly(), quietly():
            bar = logs.tqdm(range(3), desc="Loading weights")
            assert getattr(bar, "disable", True)
        bar = logs.tqdm(range(3), desc="Loading weights", delay=9)
        assert not bar.disable
        bar.close()
