"""The precision that a run computes in: the config's, the checkpoint's, the launcher's or the machine's own."""

from __future__ import annotations

import logging
import os

from ldm.machine import native_precision

log = logging.getLogger(__name__)
LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""Always set by ``accelerate launch``; its default, "no", looks the same as ``--mixed_precision no``."""

NAMES = {"no": "float32"}
"""The usual name of a precision, where accelerate has a word of its own."""


def chosen_precision(wanted: str, recorded: str | None) -> str:
    """Return "no", "bf16" or "fp16" for ``loop.mixed_precision: wanted``.

    A precision that the config names counts. "auto" is what the checkpoint was trained in (`recorded`; a measurement
    would choose another one on a busy machine), else what ``accelerate launch`` asks for, else `native_precision`.
    What ``accelerate launch`` asks for in vain is a warning.
    """
    launched = os.environ.get(LAUNCHED, "no")
    asked = None if launched == "no" else launched
    if wanted != "auto":
        chosen, why = wanted, f"the config says loop.mixed_precision: {wanted}"
    elif recorded is not None:
        chosen, why = recorded, f"the checkpoint was trained in {NAMES.get(recorded, recorded)}"
    elif asked in ("bf16", "fp16"):
        log.info("loop.mixed_precision auto: %s, as accelerate launch asks for", asked)
        return asked
    else:
        chosen, why = native_precision(), "a run cannot compute in it"
    if asked not in (None, chosen):
        used = NAMES.get(chosen, chosen)
        log.warning("accelerate launch --mixed_precision %s is not followed: %s; %s is used", asked, why, used)
    return chosen
