"""The ``ldm`` command line, for model folders and data.

The module of a subcommand is imported only when it is called, so that ``ldm --help`` answers at once.
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ldm.config.places import expanded
from ldm.terminal import write_lines
from ldm.training.signals import exit_on_interrupt


@dataclass(frozen=True)
class Command:
    """A subcommand: it calls the function of its name in `module`, and has the arguments of that function."""

    module: str
    help: str
    example: str
    positional: dict[str, str]
    """Positional arguments, with their help."""
    after: Callable[[Any], object] = lambda result: None
    """Receives the result of the function."""


A_PIPELINE = "folder or Hub name of a pipeline, user/name or user/name@revision"
COMMANDS = {
    "validate": Command(
        "ldm.commands.validate",
        "Check every image and caption of a data set; exit code 1 if a training would stop.",
        "ldm validate my_images --out out/my/validation",
        {"data": "a folder of images, Parquet, a data set, openmoji or openmoji_clips"},
        lambda report: sys.exit(1) if report.stops else None,
    ),
    "sample": Command(
        "ldm.commands.sample",
        "Sample images from prompts.",
        'ldm sample --model out/demo/model --guidance_scale 1.25 "woman astronaut medium-dark skin tone"',
        {"prompts": "prompts, one image each"},
    ),
    "evaluate": Command(
        "ldm.commands.evaluate",
        "Measure a model on held-out images, and write a report.",
        "ldm evaluate out/my/text2img/model --data my_images --out out/my/evaluation",
        {"model": A_PIPELINE},
    ),
    "evaluate_clip": Command(
        "ldm.commands.evaluate_clip",
        "Measure a CLIP on held-out images and captions, and write a report.",
        "ldm evaluate_clip out/openmoji/clip/model --out out/openmoji/clip/evaluation",
        {"model": "folder or Hub name of a CLIP, user/name or user/name@revision"},
    ),
    "average": Command(
        "ldm.commands.average",
        "Make averages of other lengths of a finished training's weights.",
        "ldm average out/my/text2img --sigma_rel 0.02,0.05,0.1",
        {"run": "folder of a training with snapshot_every_steps, its output_dir"},
    ),
    "join": Command(
        "ldm.commands.join",
        "Join the models of finished stages into the folder of one pipeline.",
        "ldm join UnCLIPPipeline out/my/prior/model out/my/decoder/model out/my/upsampler/model --to out/my/model",
        {"pipeline": "name of the pipeline's class", "stages": "folder or Hub name of each stage's model"},
        print,
    ),
    "push": Command(
        "ldm.export.hub",
        "Push a model folder to the Hugging Face Hub.",
        "ldm push out/my/text2img/model me/my-model",
        {
            "folder": "folder of a pipeline or an autoencoder, such as a training's OUTPUT_DIR/model",
            "repo_id": "repository, user/name",
        },
        print,
    ),
    "cache": Command(
        "ldm.commands.cache",
        "List or delete the cache, which is computed again when needed.",
        "ldm cache --clear latents",
        {},
    ),
}
PATH_ARGUMENTS = (
    *("model", "data", "out", "captions", "validation_captions", "held_out", "factors", "network", "clip", "image"),
    *("mask_image", "last_image", "video", "run", "to", "tokenizer", "folder", "stages"),
)
"""Arguments that are paths, in which ``~`` and ``$NAME`` are replaced."""


def overview() -> str:
    """Return the text of ``ldm --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            *("usage: ldm COMMAND ...", "", "Commands for model folders and data.", "", "commands:", *lines, ""),
            "ldm COMMAND --help lists the options of a command.",
        ]
    )


def __getattr__(name: str) -> Any:
    """Return the function of a subcommand, as ``ldm.commands.cli.sample``; its module is imported now."""
    if name in COMMANDS:
        return getattr(import_module(COMMANDS[name].module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def read_arguments(name: str, function: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a subcommand's function, parsed from `words`; SystemExit for --help and for errors."""
    from jsonargparse import ArgumentParser

    import ldm.config.file  # noqa: F401 (it registers the parser mode "words")

    command = COMMANDS[name]
    epilog = f"Example: {command.example}"
    parser = ArgumentParser(prog=f"ldm {name}", description=command.help, epilog=epilog, parser_mode="words")
    for argument, about in command.positional.items():
        parser.add_argument(argument, help=about, nargs="+" if argument in ("prompts", "stages") else None)
    parser.add_function_arguments(function, skip={*command.positional}, as_positional=False)
    given: dict[str, Any] = parser.parse_args(words).as_dict()
    return {key: _places(value, key) if key in PATH_ARGUMENTS else value for key, value in given.items()}


def _places(value: Any, name: str) -> Any:
    return [expanded(one, name) for one in value] if isinstance(value, list) else expanded(value, name)


@exit_on_interrupt()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name not in COMMANDS:
        meant = difflib.get_close_matches(name, COMMANDS, n=1)
        wrong = f"ldm: no command {name!r}" if name else "ldm: name a command"
        print(f"{overview()}\n\n{wrong}{f'; did you mean {meant[0]}?' if meant else ''}", file=sys.stderr)
        sys.exit(2)
    write_lines()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are shown, whatever their script
    function = __getattr__(name)
    from ldm.errors import HubError

    try:
        COMMANDS[name].after(function(**read_arguments(name, function, words)))
    except (HubError, ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
