"""Bits per dimension of models of pixels, and the difference from the first: python -m benchmarks.bits MODEL OTHER ...

The images are those of OpenMoji that are held out by hash; `--held_out_percent` must be that of all the trainings.
MODEL is a pipeline folder; append ``:fixed_small`` or ``:fixed_large`` for another variance than the saved one. All
models get the same timesteps and noise, so that the difference has a smaller error than each number.
"""

import argparse
import json

import torch

from ldm.config import DataOptions
from ldm.evaluation.evaluation import Evaluation
from ldm.evaluation.images import pixel_values
from ldm.evaluation.likelihood import variational_bound
from ldm.evaluation.measure import mean_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--held_out_percent", type=float, default=5.0)
    parser.add_argument("--timesteps", type=int, default=50)
    known = parser.parse_args()
    options = DataOptions(held_out_percent=known.held_out_percent)
    totals = {}
    for name in known.models:
        folder, _, variance_type = name.partition(":")
        measuring = Evaluation(folder, "openmoji", options, {}, "efficientnet_lite0", True)
        if variance_type:
            measuring.pipeline.scheduler.register_to_config(variance_type=variance_type)
        true = pixel_values(measuring.gallery[[measuring.place[row] for row in measuring.rows]])
        totals[name] = variational_bound(measuring.pipeline, true, None, known.timesteps, seed=0).total
        less = mean_of(totals[name] - totals[known.models[0]])
        row = {"model": name, "bits": str(mean_of(totals[name])), "more than the first": str(less)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
