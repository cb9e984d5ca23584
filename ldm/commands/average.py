"""``ldm average``: averages of other lengths for a finished training, and the choice of the best."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from ldm.commands.evaluate import named_captions, numbers
from ldm.config import DataOptions
from ldm.evaluation.evaluation import Evaluation
from ldm.export.folder import averaged_model

AVERAGES_FILE = "averages.json"


def average(
    run: str,
    sigma_rel: str,
    to: str | None = None,
    data: str | None = None,
    captions: str | None = None,
    validation_captions: str | None = None,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
    network: str = "efficientnet_lite0",
    **options: Unpack[DataOptions],
) -> list[Path]:
    """Write ``RUN/model-LENGTH`` for each length of the average, all or none, and return them; nothing is trained.

    With `data`, each of these models samples the validation captions, and ``RUN/averages.json`` says which has the best
    R@1. The data are read and held out as in the training, by its ``training.json``, unless `options` say otherwise.
    The held-out captions are not sampled here: evaluate the chosen model on them.

    Args:
        run: Folder of a training with snapshots, its output_dir.
        sigma_rel: Lengths, shares of the training, separated by commas, such as 0.02,0.05,0.1.
        to: Folder to write, for one length; none: RUN/model-LENGTH.
        data: The data, as in `evaluate`; none: nothing is measured.
        captions: File of the held-out captions: held_out.test.
        validation_captions: File of the captions to choose the length on: held_out.validation.
        seed: Seed of the first image; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance scale; 1 turns guidance off. Default: the pipeline's own, else 3, if it has guidance.
        network: Network of the features for KID, as in `evaluate`.
        options: Fields of data, as in a training's config.

    """
    named = named_captions(captions, validation_captions)
    if data is None and (named or options):
        raise ValueError("captions and options of the data serve to choose a length; name --data too")
    lengths = numbers("sigma_rel", sigma_rel)
    if to is not None and len(lengths) > 1:
        raise ValueError(f"to: got one folder for {len(lengths)} lengths; leave it out for RUN/model-LENGTH")
    model, first = Path(run) / "model", None
    if data is not None:  # what is wrong with the data is said before anything is written
        first = Evaluation(str(model), data, options, named, network)
        first.refuse_unchosen("lengths")
        call = first.call(num_inference_steps, guidance_scale)
    folders = _written(Path(run), {length: Path(to or f"{run}/model-{length}") for length in lengths})
    for folder in folders.values():
        print(folder)
    if first is not None:
        rows: list[dict[str, Any]] = []
        for length, folder in [(None, model), *folders.items()]:
            measuring = first if folder is model else Evaluation(str(folder), data, options, named, network)
            r_at_1, distance = measuring.headline(measuring.validation, seed, **call)
            rows.append({"sigma_rel": length, "model": folder.name, "r_at_1": asdict(r_at_1), "kid": asdict(distance)})
            print(f"{folder.name}: R@1 {r_at_1}, KID {distance}")
        best = max(rows, key=lambda row: row["r_at_1"]["value"])
        found = {"best": best["model"], "seed": seed, **call, "network": network, "lengths": rows}
        (Path(run) / AVERAGES_FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"the best on the validation captions: {Path(run) / best['model']}")
    return list(folders.values())


def _written(run: Path, folders: Mapping[float, Path]) -> Mapping[float, Path]:
    """Write the model of each length into its folder, all or none; return the folders."""
    written: list[Path] = []
    try:
        for length, folder in folders.items():
            written.append(averaged_model(run, length, folder))
    except BaseException:
        for folder in written:
            shutil.rmtree(folder)
        raise
    return folders
