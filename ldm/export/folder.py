"""The model folder that a training writes, pushes to the Hub, and that can be written with another average."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config import RunConfig
from ldm.errors import HubError
from ldm.export.card import CARD, CardText, rewrite_for_average, write_card
from ldm.export.hub import check, push
from ldm.export.kinds import kinds_named
from ldm.files import read_object
from ldm.models.provenance import read_provenance, save_trained_images
from ldm.models.quiet import quietly
from ldm.training.loop import Loop
from ldm.training.posthoc import averaged_weights
from ldm.training.record import all_trained_images, provenance
from ldm.training.run import Run
from ldm.training.snapshots import read_snapshots

log = logging.getLogger(__name__)


def check_push(config: RunConfig, run: Run) -> None:
    """Check, before the training, that the model can be pushed to the repository in `config`.

    Raises:
        HubError: see `ldm.export.hub.check`.

    """
    if config.push_to_hub is not None and run.is_main:
        check(config.push_to_hub, config.push_private)


class ModelFolder:
    """``OUTPUT_DIR/model``: averaged weights, record of the training, card; pushed to the Hub if the config says so."""

    def __init__(
        self,
        config: RunConfig,
        run: Run,
        loop: Loop[Any],
        save: Callable[[Path], object],
        card: CardText,
        networks: Sequence[str],
        parts: Sequence[str],
    ):
        """Keep the arguments, most of them parts of an `ldm.recipes.recipe.Recipe`; nothing is written yet."""
        self.card, self.networks, self.parts = card, networks, parts
        self.config, self.run, self.loop, self.save = config, run, loop, save
        self.folder = run.folder / "model"

    def push_meanwhile(self, global_step: int) -> None:
        """Write the current model and push it, during training; a push that fails is only logged as a warning."""
        if self.config.push_to_hub is None or self.loop.done or not self.run.is_main:
            return  # `finish` pushes the finished model
        self._write()
        try:
            log.info("step %d: %s", global_step, push(self.folder, self.config.push_to_hub, self.config.push_private))
        except HubError as error:
            log.warning("step %d: %s", global_step, error)

    def finish(self) -> None:
        """Write the finished model and push it; HubError if the push fails, after everything is written.

        A folder that an earlier start of the run has finished stays unchanged, even if settings differ now.
        """
        if not self.run.is_main:
            return
        if self._is_finished():
            log.info("%s is finished and stays as it is; delete it to have it written again", self.folder)
        else:
            self._write()
            log.info("the model is in %s", self.folder)
        if self.config.push_to_hub is not None:
            log.info("pushed to %s", push(self.folder, self.config.push_to_hub, self.config.push_private))

    def _is_finished(self) -> bool:
        """Return whether the folder is whole and nothing was trained since; its card is written last."""
        step, record = self.loop.progress.global_step, read_provenance(self.folder)
        done = record is not None and record.global_step == step == self.loop.start_step
        return done and (self.folder / CARD).is_file()

    def _write(self) -> None:
        with self.run.stop.held():  # weights, record and card are of one step
            (self.folder / CARD).unlink(missing_ok=True)  # written last: a folder with a card is whole
            with quietly():
                self.save(self.folder)
            record = provenance(self.loop.progress, self.loop.record, self.config.data, self.networks, self.parts)
            record.save(self.folder)
            save_trained_images(self.folder, all_trained_images(self.loop.record.trained_images, self.parts))
            write_card(self.folder, self.run.folder, self.config, self.card, record)


def averaged_model(run_folder: Path, sigma_rel: float, to: Path) -> Path:
    """Write the folder `to`, a copy of ``run_folder/model`` with the average of length `sigma_rel`; return it.

    The average is at the last step with snapshots that is not after the model's. Only the trained weights,
    ``training.json`` and the card differ from the model. `to` appears only when it is complete.

    Raises:
        ValueError: `to` exists, there is no model, or it is of another network; see `averaged_weights` and
            `read_snapshots`.

    """
    model = run_folder / "model"
    if to.exists():
        raise ValueError(f"{to} is there already; delete it or name another folder")
    if (record := read_provenance(model)) is None:
        raise ValueError(f"{model} holds no model: name the output_dir of a finished train_text2img.py")
    snapshots = [one for one in read_snapshots(run_folder) if one.global_step <= record.global_step]
    if not snapshots:
        raise ValueError(f"{model} is of step {record.global_step}, before the first snapshot; finish the training")
    weights = averaged_weights(snapshots, sigma_rel)
    temporary = to.with_name(f".tmp-{to.name}-{os.getpid()}")
    try:
        shutil.copytree(model, temporary)
        for component, prefix in _trained_components(model).items():
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            if own:  # a frozen text encoder has none
                frozen = {name.removeprefix(prefix) for name in snapshots[-1].frozen}
                _replace_weights(temporary / component, own, frozen)
        step = max(one.global_step for one in snapshots)
        replace(record, global_step=step, sigma_rel=sigma_rel).save(temporary)
        rewrite_for_average(temporary, to.name, sigma_rel)
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something was raised
    return to


def _trained_components(model: Path) -> dict[str, str]:
    """Return the trained components of a pipeline's folder, each with the prefix of its weights in the training."""
    stock = read_object(model / "model_index.json")["_class_name"]
    return {name: prefix for kind in kinds_named(stock) for name, prefix in kind.trained.items()}


def _replace_weights(folder: Path, weights: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    """Replace the weights in the folder's files by those of the same names in `weights`; `frozen` ones stay.

    Raises ValueError if a name or a shape does not fit.
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name in frozen:
                continue
            if name not in weights or weights[name].shape != tensor.shape:
                raise ValueError(
                    f"{folder.name}: the snapshots hold no {name} of shape {tuple(tensor.shape)}: they are of another "
                    "network than the model; name the output_dir that both were written into"
                )
            tensors[name] = weights[name].to(tensor.dtype).contiguous()
        save_file(tensors, path, about)
