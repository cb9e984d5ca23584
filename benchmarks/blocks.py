"""Blocks of a pixel U-Net compared at equal training time: python -m benchmarks.blocks

The variants change configs/improved_ddpm/openmoji/32px.yaml, with a fixed variance. First the steps of all variants are
timed, in turn. This gives each variant the number of steps that it can take in `--seconds` on this machine. Then each
trains for that many steps, with the same seed and images, so that other load on the machine does not matter. The
variant after "base" repeats it with another seed, to show the spread. Measured is the held-out loss: the squared error
of the noise at five noise levels, with fixed noise. The table is printed as Markdown, and the numbers are written to
docs/blocks.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import StableCascadeUNet
from diffusers.models.unets.unet_stable_cascade import SDCascadeAttnBlock, SDCascadeResBlock
from torch import Tensor, nn

from ldm.config import StageConfig
from ldm.config.file import load_config
from ldm.data.batches import Batch, CaptionedImages, PositionDataset, fixed_batch
from ldm.data.loader import training_batches
from ldm.data.preflight import checked_source
from ldm.evaluation.gain import LEVELS
from ldm.machine import hardware
from ldm.models.network import build_network, prepare_denoiser
from ldm.objectives.denoising import Objective
from ldm.spaces import build_space
from ldm.stage import ConditionedDenoiser, Stage
from ldm.training.loop import Loop
from ldm.training.run import Run, opened
from ldm.training.steps import DiffusionStep

ROOT = Path(__file__).parent.parent
CONFIG = "configs/improved_ddpm/openmoji/32px.yaml"
FIXED = (
    *("--objective.variational_weight", "null", "--loop.trackers", "[]", "--denoiser.out_channels", "3"),
    *("--optim.warmup_steps", "30", "--optim.ema_decay", "0.99"),  # minutes are a few hundred steps
    *("--loop.max_train_seconds", "null", "--loop.max_train_steps", "1000"),
)
ROUNDS = 2
TIMED_STEPS = 36
HELD_OUT = 200
PLAIN, ATTENTION = "DownBlock2D", "AttnDownBlock2D"
BASE: dict[str, Any] = {
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "attention_head_dim": None,
    "down_block_types": [PLAIN, PLAIN, ATTENTION, PLAIN],
}
ADAGN = {"resnet_time_scale_shift": "scale_shift"}
HEADS = {"attention_head_dim": 32}
EVERYWHERE = {"down_block_types": [PLAIN, ATTENTION, ATTENTION, ATTENTION]}
RESNET = "ResnetDownsampleBlock2D"
BIGGAN = {
    "down_block_types": [RESNET, RESNET, ATTENTION, RESNET],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "base, another seed": {},
    "AdaGN": ADAGN,
    "BigGAN blocks for down and up": BIGGAN,
    "attention at 16, 8 and 4 px, not 8 alone": EVERYWHERE,
    "heads of 32 channels, not one": HEADS,
    "deeper: 2 blocks a level, three quarters as wide": {"layers_per_block": 2, "block_out_channels": [32, 48, 96, 96]},
    "wider: 1.5 times": {"block_out_channels": [48, 96, 192, 192]},
    "GELU, not SiLU": {"act_fn": "gelu"},
    "ADM: AdaGN, BigGAN blocks, heads, attention at 8 and 4": {
        **ADAGN, **HEADS, **BIGGAN, "down_block_types": [RESNET, RESNET, ATTENTION, ATTENTION],
    },
    "ConvNeXt blocks, attention at 8 px": {"_class_name": "ConvNeXtUNet"},
}  # fmt: skip


class ConvNeXtUNet(nn.Module):
    """`StableCascadeUNet`, whose blocks are ConvNeXt's (Liu et al. 2022), conditioned on the timestep alone."""

    def __init__(self, channels: tuple[int, ...] = (48, 96, 192, 192)):
        super().__init__()
        plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
        self.unet = StableCascadeUNet(
            in_channels=3,
            out_channels=3,
            block_out_channels=channels,
            conditioning_dim=32,
            clip_text_pooled_in_channels=1,
            clip_seq=1,
            num_attention_heads=(-1, -1, channels[2] // 32, -1),
            down_num_layers_per_block=(2, 2, 2, 2),
            up_num_layers_per_block=(2, 2, 2, 2),
            down_blocks_repeat_mappers=(1, 1, 1, 1),
            up_blocks_repeat_mappers=(1, 1, 1, 1),
            block_types_per_layer=(plain, plain, (*plain, "SDCascadeAttnBlock"), plain),
            dropout=(0.0, 0.0, 0.0, 0.0),
            timestep_conditioning_type=(),
        )
        tails = [block.channelwise[-1] for block in self.unet.modules() if isinstance(block, SDCascadeResBlock)]
        tails += [block.attention.to_out[0] for block in self.unet.modules() if isinstance(block, SDCascadeAttnBlock)]
        for tail in (self.unet.clf[1], *tails):  # as `ldm.models.network.zero_tails` does in the others
            nn.init.zeros_(tail.weight)
            nn.init.zeros_(tail.bias)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the output for `sample`, (B, 3, H, W), at timesteps in [0, 1000), as a tuple of one."""
        nothing = sample.new_zeros(len(sample), 1, 1)
        output: Tensor = self.unet(sample, timestep.float() / 1000, nothing, return_dict=False)[0]
        return (output,)


def mirrored(down: list[str]) -> list[str]:
    """Return the types of the up blocks that match these down blocks."""
    return [block.replace("Downsample", "Upsample").replace("DownBlock", "UpBlock") for block in reversed(down)]


def denoiser(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the denoiser section of a variant's config."""
    keys = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["denoiser"] | BASE | changes
    return keys | {"up_block_types": mirrored(keys["down_block_types"])}


def build(keys: dict[str, Any]) -> nn.Module:
    """Return the network that `keys` describe, untrained."""
    if keys["_class_name"] == "ConvNeXtUNet":
        return ConvNeXtUNet()
    network = build_network(keys, "denoiser")
    prepare_denoiser(network, fresh=True)
    return network


class Bench:
    """The config and the images that all variants share."""

    def __init__(self) -> None:
        self.config: StageConfig = load_config(StageConfig, ["--config", CONFIG, "--output_dir", "unused", *FIXED])
        self.images = CaptionedImages(checked_source(self.config.data), self.config.data)

    def train(self, keys: dict[str, Any], steps: int, seed: int) -> tuple[DiffusionStep, list[float]]:
        """Return a variant trained for `steps`, and the seconds of each step."""
        loop_config = replace(self.config.loop, max_train_steps=steps, save_every_steps=10**6)
        seconds: list[float] = []

        def timed(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
            for batch in batches:
                given = time.perf_counter()
                yield batch
                seconds.append(time.perf_counter() - given)

        with tempfile.TemporaryDirectory() as folder, opened(Run(folder, seed, loop_config)) as run:
            torch.manual_seed(seed)
            space = build_space(self.config.space, None)
            model = ConditionedDenoiser(build(keys), {})
            stage = Stage(space, model, Objective(self.config.objective, space.grid_step))
            step = DiffusionStep(stage, run, self.config.optim.ema_decay)
            train = PositionDataset(self.images, "train", seed)
            loop: Loop[Batch] = Loop(step, self.config.optim, loop_config, run, epoch_steps=1)
            loop.fit(lambda start_step, **share: timed(training_batches(train, start_step, **share)))
        return step, seconds

    def step_seconds(self, keys: dict[str, Any]) -> float:
        """Return the median seconds of a step, without the first ten."""
        return statistics.median(self.train(keys, TIMED_STEPS, seed=0)[1][10:])

    def held_out_loss(self, step: DiffusionStep) -> float:
        """Return the loss on validation images, with the averaged weights and fixed noise."""
        batch = fixed_batch(PositionDataset(self.images, "validation", 0), HELD_OUT)
        return float(step.held_out_losses(batch, LEVELS).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--timed", help="an earlier result of this machine, to take the times of a step from")
    parser.add_argument("--out", default="docs/blocks.json")
    known = parser.parse_args()
    bench, networks = Bench(), {name: denoiser(changes) for name, changes in VARIANTS.items()}
    timed: dict[str, list[float]] = {name: [] for name in networks}
    if known.timed is not None:
        timed = json.loads(Path(known.timed).read_text(encoding="utf-8"))["timed"]
    for name in [*networks] * (ROUNDS if known.timed is None else 0):
        timed[name].append(bench.step_seconds(networks[name]))
    found = {}
    for name, keys in networks.items():
        seconds = statistics.median(timed["base"] if name.startswith("base") else timed[name])
        step, _ = bench.train(keys, steps := round(known.seconds / seconds), seed=1 if "another seed" in name else 0)
        found[name] = {
            "millions": round(sum(p.numel() for p in step.stage.model.parameters()) / 1e6, 2),
            "steps": steps,
            "milliseconds a step": round(1000 * seconds),
            "held_out_loss": round(bench.held_out_loss(step), 5),
        }
        print(json.dumps({name: found[name]}), flush=True)
        result = {"seconds": known.seconds, "hardware": hardware(), "timed": timed, "variants": found}
        Path(known.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| variant | parameters, M | steps | ms a step | held-out loss |\n|---|---|---|---|---|")
    for name, row in found.items():
        print("| " + " | ".join(map(str, (name, *row.values()))) + " |")


if __name__ == "__main__":
    main()
