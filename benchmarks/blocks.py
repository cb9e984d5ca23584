"""What a pixel U-Net is best made of, at equal training time: python -m benchmarks.blocks --seconds 120.

Each variant of configs/improved_ddpm/openmoji/32px.yaml, with a fixed variance, trains for so many seconds from the
same seed on the same pictures; the one after "base" repeats it with another seed, for the noise of all of them.
Measured: the held-out loss, the squared error of the noise at five levels with fixed noise. The table is printed as
Markdown, the numbers are written to docs/blocks.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.models.network import build_network
from ldm.provenance import hardware

ROOT = Path(__file__).parent.parent
CONFIG = "configs/improved_ddpm/openmoji/32px.yaml"
FIXED = (
    *("--objective.variational_weight", "null", "--loop.trackers", "[]", "--validation.num_inference_steps", "2"),
    *("--optim.warmup_steps", "30", "--optim.ema_decay", "0.99"),  # minutes are a few hundred steps
)
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
}  # fmt: skip


def mirrored(down: list[str]) -> list[str]:
    """Return the up blocks that belong to these down blocks."""
    return [block.replace("Downsample", "Upsample").replace("DownBlock", "UpBlock") for block in reversed(down)]


def denoiser(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the denoiser of a variant, as the config has it."""
    keys = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["denoiser"] | BASE | changes
    return keys | {"up_block_types": mirrored(keys["down_block_types"])}


def measured(network: dict[str, Any], seconds: float, seed: int) -> dict[str, float]:
    """Return what a training of so many seconds came to."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", CONFIG, "--output_dir", folder, "--seed", str(seed), "--denoiser", json.dumps(network)]
        words += ["--loop.max_train_seconds", f"{seconds:g}", *FIXED]
        subprocess.run([sys.executable, "train_text2img.py", *words], cwd=ROOT, check=True)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        training = json.loads((Path(folder) / "model" / "training.json").read_text())
    loss = next(row["validation/loss"] for row in reversed(rows) if "validation/loss" in row)
    parameters = sum(p.numel() for p in build_network(network, "denoiser").parameters())
    return {
        "millions": round(parameters / 1e6, 2),
        "steps": training["global_step"],
        "images_per_second": round(training["images_per_second"], 1),
        "held_out_loss": round(loss, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", default="docs/blocks.json")
    known = parser.parse_args()
    found = {}
    for name, changes in VARIANTS.items():
        found[name] = measured(denoiser(changes), known.seconds, seed=1 if "another seed" in name else 0)
        print(json.dumps({name: found[name]}), flush=True)
        result = {"seconds": known.seconds, "hardware": hardware(), "variants": found}
        Path(known.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("| variant | parameters, M | steps | images/s | held-out loss |\n|---|---|---|---|---|")
    for name, row in found.items():
        print("| " + " | ".join(map(str, (name, *row.values()))) + " |")


if __name__ == "__main__":
    main()
