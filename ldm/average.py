"""``ldm average``: averages of other lengths of a training that is over, and which of them is the best."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.evaluate import numbers
from ldm.measurement import Evaluation
from ldm.training.model_folder import averaged_model

FILE = "averages.json"


def average(
    run: str,
    sigma_rel: str,
    to: str | None = None,
    data: str | None = None,
    captions: str | None = None,
    validation_captions: str | None = None,
    seed: int = 0,
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
    network: str = "efficientnet_lite0",
) -> list[Path]:
    """Write ``RUN/model-LENGTH`` for each length of the average and return these folders; nothing is trained.

    With `data` and both files of captions, validation captions are drawn with each, and ``RUN/averages.json`` says
    which has the best R@1. The held-out captions are only named: evaluate them with the one that is chosen.

    Args:
        run: Folder of a training with snapshots, its output_dir.
        sigma_rel: Lengths, shares of the training, separated by commas, such as 0.02,0.05,0.1.
        to: Folder to write, for one length; none: RUN/model-LENGTH.
        data: What `evaluate` takes.
        captions: File of the held-out captions.
        validation_captions: File of the captions that are drawn to choose.
        seed: Seed of the first picture; the next ones count up.
        num_inference_steps: Denoising steps.
        guidance_scale: Guidance; 1 is none.
        network: What measures the KID, as in `evaluate`.

    """
    named = (data, captions, validation_captions)
    if any(named) and not all(named):
        raise ValueError("to choose a length, name all of --data, --captions and --validation_captions")
    lengths = numbers("sigma_rel", sigma_rel)
    if to is not None and len(lengths) > 1:
        raise ValueError(f"to: names one folder, for {len(lengths)} lengths; leave it out for RUN/model-LENGTH")
    folders = {length: averaged_model(Path(run), length, Path(to or f"{run}/model-{length}")) for length in lengths}
    for folder in folders.values():
        print(folder)
    if data and captions and validation_captions:
        call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        rows: list[dict[str, Any]] = []
        for length, folder in [(None, Path(run) / "model"), *folders.items()]:
            measuring = Evaluation(str(folder), data, captions, validation_captions, 0, network, False)
            measuring.refuse_untold("lengths")
            r_at_1, distance = measuring.headline(validation_captions, seed, **call)
            rows.append({"sigma_rel": length, "model": folder.name, "r_at_1": asdict(r_at_1), "kid": asdict(distance)})
            print(f"{folder.name}: R@1 {r_at_1}, KID {distance}")
        best = max(rows, key=lambda row: row["r_at_1"]["value"])
        found = {"best": best["model"], "seed": seed, **call, "network": network, "lengths": rows}
        (Path(run) / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"the best on the validation captions: {Path(run) / best['model']}")
    return list(folders.values())
