"""The README and the pages of docs/: what they tell a reader to type is understood, what they link to is there."""

import re
import shlex
from pathlib import Path

from ldm.commands import cli
from ldm.config import AutoencoderConfig, ClipConfig, StageConfig, SystemConfig
from ldm.config.file import load_config
from ldm.system import check_system, split_words, system_stages

from .table import table
from .test_system import SCRIPTS as SYSTEM_SCRIPTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {
    "train_vae.py": AutoencoderConfig,
    "train_text2img.py": StageConfig,
    "train_clip.py": ClipConfig,
}
COMMANDS = dict.fromkeys(  # each once, in order
    line.partition("  #")[0].strip()
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
)


def anchors(page):
    """Return the names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@table("command", COMMANDS)
def test_every_command_is_understood(command):
    match shlex.split(command):
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["accelerate", "launch", "train_system.py", *words]:
            own, of_stages = split_words(words)
            config = load_config(SystemConfig, own)
            check_system(config, system_stages(config, SYSTEM_SCRIPTS, of_stages))
        case ["accelerate", "launch", script, *words]:
            load_config(SCRIPTS[script], words)
        case ["ldm", name, *words]:
            cli.read_arguments(name, getattr(cli, name), words)
        case _:
            assert command in ("source .venv/bin/activate", "hf auth login")


def test_the_first_screen_has_both_commands():
    assert list(COMMANDS)[:2] == ["make demo", "make test"]


@table("page", PAGES)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for config in re.findall(r"configs/[\w/.-]+\.(?:yaml|txt|json)", text):
        assert (ROOT / config).is_file(), config
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
