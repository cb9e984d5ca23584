"""The folder that a training leaves for others to load, one with another average, and the way to the Hub."""

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
from ldm.data.batches import PositionDataset
from ldm.errors import HubError
from ldm.export.card import CARD, CardText, tell_average, write_card
from ldm.export.hub import check, push
from ldm.export.kinds import kinds_named
from ldm.files import read_object
from ldm.models.provenance import read_provenance, save_trained_images
from ldm.training.loop import Loop
from ldm.training.posthoc import reconstruct
from ldm.training.record import all_trained_images, provenance
from ldm.training.run import Run
from ldm.training.snapshots import read_snapshots

log = logging.getLogger(__name__)


def check_push(config: RunConfig, run: Run) -> None:
    """Raise before anything else is done if the model could not be pushed to where `config` says.

    Raises:
        ValueError: settings of a push, but no repository; or a number of steps that is not positive.
        HubError: see `ldm.export.hub.check`.

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
        config: RunConfig,
        run: Run,
        loop: Loop[Any],
        train: PositionDataset,
        save: Callable[[Path], object],
        card: CardText,
        networks: Sequence[str],
        parts: Sequence[str],
    ):
        """Take what `ldm.recipes.recipe.Recipe` says of a kind of training; nothing is written yet."""
        self.card, self.networks, self.parts = card, networks, parts
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
        """Write the finished model and push it; raises HubError if that fails, with everything written.

        A folder that an earlier start has finished stays as it is, whatever this one was told.
        """
        if not self.run.is_main:
            return
        if self._is_finished():
            log.info("%s is finished and stays as it is; delete it to have it written again", self.folder)
        else:
            self._write()
        if self.config.push_to_hub is not None:
            log.info("pushed to %s", push(self.folder, self.config.push_to_hub, self.config.push_private))

    def _is_finished(self) -> bool:
        """Return whether nothing was trained since the folder was written, its card last."""
        step, record = self.loop.progress.global_step, read_provenance(self.folder)
        done = record is not None and record.global_step == step == self.loop.start_step
        return done and (self.folder / CARD).is_file()

    def _write(self) -> None:
        with self.run.stop.held():  # weights, record and card are of one step
            (self.folder / CARD).unlink(missing_ok=True)  # written last: a folder with a card is whole
            self.save(self.folder)
            record = provenance(self.loop.progress, self.train, self.networks, self.parts)
            record.save(self.folder)
            save_trained_images(self.folder, all_trained_images(self.loop.record.trained_images, self.parts))
            write_card(self.folder, self.run.folder, self.config, self.card, record)


def averaged_model(run_folder: Path, sigma_rel: float, to: Path) -> Path:
    """Return the new folder `to`: ``run_folder/model`` with the average of length `sigma_rel` in its place.

    At the last step with snapshots, of those that the model has seen. All but the trained weights, ``training.json``
    and the card stays as it is. `to` is there when it is whole, or not at all.

    Raises:
        ValueError: `to` exists, there is no model or it is of another network; as `reconstruct` and `read_snapshots`.

    """
    model = run_folder / "model"
    if to.exists():
        raise ValueError(f"{to} is there already; delete it or name another folder")
    if (record := read_provenance(model)) is None:
        raise ValueError(f"{model} holds no model: name the output_dir of a finished train_text2img.py")
    snapshots = [one for one in read_snapshots(run_folder) if one.global_step <= record.global_step]
    if not snapshots:
        raise ValueError(f"{model} is of step {record.global_step}, before the first snapshot; finish the training")
    weights = reconstruct(snapshots, sigma_rel)
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
        tell_average(temporary, to.name, sigma_rel)
        os.replace(temporary, to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something was raised
    return to


def _trained_components(model: Path) -> dict[str, str]:
    """Return what the names of the weights of each trained component of a pipeline's folder begin with in training."""
    stock = read_object(model / "model_index.json")["_class_name"]
    return {name: prefix for kind in kinds_named(stock) for name, prefix in kind.trained.items()}


def _replace_weights(folder: Path, weights: Mapping[str, Tensor], frozen: Collection[str]) -> None:
    """Put `weights` in the place of those of the same names in the folder's files; those that are `frozen` stay.

    ValueError unless they fit.
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
