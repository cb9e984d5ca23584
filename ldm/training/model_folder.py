"""The folder that a training leaves for others to load, and its way to the Hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.card import write_card
from ldm.config import AutoencoderConfig, StageConfig
from ldm.data.batches import PositionDataset
from ldm.hub import HubError, check, push
from ldm.training.loop import Loop
from ldm.training.record import provenance
from ldm.training.run import Run

log = logging.getLogger(__name__)


def check_push(config: StageConfig | AutoencoderConfig, run: Run) -> None:
    """Raise before anything else is done if the model could not be pushed to where `config` says.

    Raises:
        ValueError: settings of a push, but no repository; or a number of steps that is not positive.
        HubError: see `ldm.hub.check`.

    """
    if config.push_to_hub is None and (config.push_private or config.push_every_steps is not None):
        raise ValueError("push_to_hub: name the repository that push_private and push_every_steps are about")
    if config.push_every_steps is not None and config.push_every_steps < 1:
        raise ValueError(f"push_every_steps: got {config.push_every_steps}; expected at least 1, or null")
    if config.push_to_hub is not None and run.is_main:
        check(config.push_to_hub, config.push_private)


class ModelFolder:
    """``OUTPUT_DIR/model``: the averaged weights, what is known of their training, a card; on the Hub if asked for."""

    def __init__(
        self,
        config: StageConfig | AutoencoderConfig,
        run: Run,
        loop: Loop[Any],
        train: PositionDataset,
        save: Callable[[Path], object],
    ):
        """`save` writes the weights as they stand into a folder, and changes nothing that is trained."""
        self.config, self.run, self.loop, self.train, self.save = config, run, loop, train, save
        self.folder = run.folder / "model"

    def push_meanwhile(self, global_step: int) -> None:
        """Write the model as it stands and push it; a push that fails is a warning, and training goes on."""
        if self.config.push_to_hub is None or self.loop.done or not self.run.is_main:
            return  # when all is done, `finish` pushes
        self._write()
        try:
            log.info("step %d: %s", global_step, push(self.folder, self.config.push_to_hub, self.config.push_private))
        except HubError as error:
            log.warning("step %d: %s", global_step, error)

    def finish(self) -> None:
        """Write the finished model and push it; raises HubError if that fails, with everything written."""
        if not self.run.is_main:
            return
        self._write()
        if self.config.push_to_hub is not None:
            log.info("pushed to %s", push(self.folder, self.config.push_to_hub, self.config.push_private))

    def _write(self) -> None:
        self.save(self.folder)
        record = provenance(self.loop.progress, self.train)
        record.save(self.folder)
        write_card(self.folder, self.run.folder, self.config, record)
