"""Train a system: stage after stage, joined into one pipeline.

accelerate launch train_system.py --config configs/dalle2/openmoji/system.yaml
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ldm.config import AutoencoderConfig, ClipConfig, StageConfig, SystemConfig
from ldm.config.file import exit_on_config_error, load_config
from ldm.system import check_system, examine_stages, join_stages, split_words, system_stages, train_stages
from ldm.terminal import write_lines
from ldm.training.signals import exit_on_interrupt
from pipelines import PIPELINES

HERE = Path(__file__).parent
SCRIPTS = {
    AutoencoderConfig: str(HERE / "train_vae.py"),
    ClipConfig: str(HERE / "train_clip.py"),
    StageConfig: str(HERE / "train_text2img.py"),
}


@exit_on_interrupt()
@exit_on_config_error()
def main() -> None:
    """Train every stage that is not trained yet, and join them; or examine all of them."""
    write_lines()
    own, of_stages = split_words(sys.argv[1:])
    config = load_config(SystemConfig, own)
    stages = system_stages(config, SCRIPTS, of_stages)
    check_system(config, stages)
    if config.doctor:
        trial = replace(config, output_dir=str(Path(config.output_dir, "doctor")))
        return examine_stages(trial, system_stages(trial, SCRIPTS, of_stages, finished=Path(config.output_dir)))
    train_stages(stages)
    join_stages(config, stages, PIPELINES)


if __name__ == "__main__":
    main()
