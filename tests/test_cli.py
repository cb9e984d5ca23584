"""The command line: its help, what its words mean, the paths in it, and errors in one line."""

import inspect
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.commands import cli
from ldm.commands.cli import COMMANDS, PATH_ARGUMENTS, read_arguments
from ldm.commands.sample import sample

from .table import table
from .tiny_pipeline import pipeline

ROOT = Path(__file__).parent.parent
TEXTS = {
    "negative_prompt",
    "repo_id",
    "pipeline",
    "prompts",
    "sigma_rel",
    "classes",
    "guidance_sweep",
    "steps_sweep",
    "clear",
}
"""Arguments that are texts and no paths."""
ODD_TEXTS = (
    *("null", "~", "1e3", "1", "0x10", "true", "no", "2020-01-01", "{a: 1}", "[x, y]", "#1 dad", "a: b", "- a", "!!x"),
    *("&a", "*a", "---", "...", "%", "@x", "$HOME", " ", "", "'", '"q"', "a\nb", "🦄👩🏽‍🚀", "猫"),
)


def function(name):
    return getattr(cli, name)


def test_help_is_there_at_once_and_names_every_command():
    heavy = "import sys; from ldm.commands.cli import main; main(['--help']); "
    heavy += "print({'torch', 'diffusers'} & {*sys.modules})"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "set()"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds of a processor"
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        assert f"  {name:{width}}  {command.help}\n" in done.stdout


@table("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_it_understands(name, capsys):
    example = COMMANDS[name].example
    program, subcommand, *words = shlex.split(example)
    assert (program, subcommand) == ("ldm", name)
    assert read_arguments(name, function(name), words)
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name].help in told
    assert example in told


@table(("words", "said"), [(["sampel"], "did you mean sample?"), ([], "name a command"), (["--x"], "no command")])
def test_a_command_that_is_none_is_answered_with_the_commands(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert said in told
    assert COMMANDS["average"].help in told


@table("text", ODD_TEXTS)
def test_a_text_is_taken_as_it_stands(text):
    words = ["--model", "m", f"--negative_prompt={text}", "--", text]
    found = read_arguments("sample", sample, words)
    assert (found["prompts"], found["negative_prompt"]) == ([text], text)
    if text not in ("null", "~", "$HOME"):
        assert read_arguments("sample", sample, ["--model", "m", f"--image={text}", "--", "a"])["image"] == text


def test_paths_of_every_command_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    parameters = {
        argument: one for name in COMMANDS for argument, one in inspect.signature(function(name)).parameters.items()
    }
    texts = {argument for argument, one in parameters.items() if "str" in str(one.annotation)}
    assert texts - {*PATH_ARGUMENTS} == TEXTS & texts, "a text is a path or it is not"
    found = read_arguments("sample", sample, ["--model=~/a", "--out=$RUNS/b", "--image=~", "--", "~", "$RUNS"])
    assert (found["model"], found["out"], found["image"]) == ("/home/me/a", "/runs/b", "/home/me")
    assert found["prompts"] == ["~", "$RUNS"]
    found = read_arguments("validate", function("validate"), ["~/x", '--held_out={"test": "${RUNS}/t.txt"}'])
    assert (found["data"], found["held_out"]) == ("/home/me/x", {"test": "/runs/t.txt"})


WRONG = {
    "sample --model MODEL --out FILE a": "out: FILE cannot be made a folder: File exists",
    "sample --model MODEL --out FILE/x a": "out: FILE/x cannot be made a folder: Not a directory",
    "sample --model nowhere/at/all a": "nowhere/at/all: no folder of a pipeline",
    "sample --model $NOWHERE/x a": "model: got '$NOWHERE/x'; the environment variable NOWHERE is not set",
    "sample --model MODEL --out out/$HF_TOKEN a": "out: $HF_TOKEN may be a secret, which a path would reveal",
    "sample --model ~nobody-here/x a": "model: got '~nobody-here/x'; there is no such user",
    "sample --model MODEL --image no.png a": "image: no.png: [Errno 2] No such file or directory",
    "evaluate MODEL --data DATA --captions no.txt": "data.path: no metadata.jsonl",
    "evaluate MODEL --data openmoji --captions no.txt": "data.held_out.test: no file no.txt",
    "evaluate MODEL --data DATA --background whyte": "data.background: got 'whyte'; expected a colour",
    "evaluate MODEL": "data: name the images to measure on, --data",
    "evaluate MODEL --data nowhere/at/all": "data.path, data.split: ",
    "average DATA --sigma_rel 0.1": "DATA/model holds no model",
    "average DATA --sigma_rel 0.1 --captions x": "captions and options of the data serve to choose a length; name",
    "push DATA me/model": "DATA is not the folder of a model",
    "validate nowhere/at/all": "data.path, data.split: ",
    "validate DATA --split train --limit 0": "data.limit: got 0; expected a number from 1 to",
    "validate DATA": "data.path: no metadata.jsonl",
}
"""Command lines, and how what is said of them begins."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(folder)
    return folder


@table("line", WRONG)
def test_what_is_wrong_is_said_in_a_line(line, model, tmp_path):
    names = {"MODEL": model, "FILE": tmp_path / "file", "DATA": tmp_path / "data"}
    names["FILE"].touch()
    names["DATA"].mkdir()

    def placed(text):
        for name, place in names.items():
            text = text.replace(name, str(place))
        return text

    with pytest.raises(SystemExit) as stopped:
        cli.main([placed(word) for word in line.split()])
    assert str(stopped.value.code).startswith(placed(WRONG[line])), stopped.value.code
