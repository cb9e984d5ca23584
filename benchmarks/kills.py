"""Kill real trainings at random moments: python benchmarks/kills.py --kills 200; the result goes to docs/kills.json."""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import os  # noqa: E402

from tqdm import tqdm  # noqa: E402

from ldm.machine import hardware  # noqa: E402
from ldm.models.provenance import versions  # noqa: E402
from ldm.training.checkpoint import CheckpointStore  # noqa: E402
from tests import trainers  # noqa: E402


def last_logged(folder: Path) -> int:
    """Return the last logged step, 0 if there is none; an unfinished last line is left out."""
    try:
        whole = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return 0
    return int(json.loads(whole[-1])["step"]) if whole else 0


def kill_once(script: str, words: tuple[object, ...], folder: Path, draw: random.Random) -> dict[str, int]:
    """Resume a training, kill it within a quarter of a second after a new step, and return what is left of it.

    usable: there is a checkpoint; lost: logged steps after it; in_a_save: the kill came during a save.
    """
    before = last_logged(folder)
    process = trainers.start(script, (*words, "--output_dir", folder), folder.with_suffix(".log"))
    end = time.monotonic() + 120
    while last_logged(folder) <= before or not (folder / "checkpoints").exists():
        if time.monotonic() > end or process.exitcode is not None:
            raise RuntimeError(f"{script} does not go on: {folder.with_suffix('.log').read_text()[-2000:]}")
        time.sleep(0.005)
    time.sleep(draw.random() * 0.25)
    process.kill()
    process.join()
    logged = last_logged(folder)
    in_a_save = bool(list((folder / "checkpoints").glob(".tmp-*")))
    store = CheckpointStore(folder / "checkpoints", 1)  # removes what was left behind
    latest = store.latest()
    saved = CheckpointStore.load(latest).global_step if latest else -1
    return {"usable": saved >= 0, "lost": max(0, logged - saved), "in_a_save": in_a_save}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ.setdefault("LDM_CACHE", str(place / "cache"))
        endless = (*trainers.QUICK, "--loop.max_train_steps", 10**6, "--loop.validate_every_steps", 10**6)
        endless = (*endless, "--loop.keep_checkpoints", 1, "--data.limit", 24)
        vae = ("--config", "configs/tiny/vae.yaml", *endless)
        trainers.run(
            "train_vae.py", (*vae, "--loop.max_train_steps", 4, "--output_dir", place / "space"), place / "log"
        )
        stage = ("--config", "configs/tiny/text2img.yaml", *endless, "--space.autoencoder", place / "space" / "model")
        kinds = [("train_vae.py", vae, place / "vae"), ("train_text2img.py", stage, place / "stage")]
        for number in tqdm(range(options.kills), desc="kills", unit="kill"):
            found.append(kill_once(*kinds[number % 2], draw))
    result = {
        "kills": len(found),
        "without_a_usable_checkpoint": sum(not row["usable"] for row in found),
        "most_steps_lost": max(row["lost"] for row in found),
        "kills_that_hit_a_save": sum(row["in_a_save"] for row in found),
        "save_every_steps": 1,
        "keep_checkpoints": 1,
        "seed": options.seed,
        "commit": commit.stdout.strip(),
        "hardware": hardware(),
        "versions": versions(),
    }
    (ROOT / "docs" / "kills.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(result["without_a_usable_checkpoint"] > 0 or result["most_steps_lost"] > 1)


if __name__ == "__main__":
    main()
