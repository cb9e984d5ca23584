"""The house rules that can be read off the source: imports, names, and what the README says of the files."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from .reliability import ROWS, rows_of

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("pipelines/*.py"), *ROOT.glob("train_*.py")])
SAME_PART = {"ldm.config_conditioners": "ldm.config", "ldm.config_doctor": "ldm.config"}
PARTS = ("ldm.conditioners", "ldm.data", "ldm.models", "ldm.training", "ldm.evaluation", "ldm.doctor")
MAY_IMPORT = {  # part -> parts of ldm it may import, besides itself
    "ldm.config": set(),
    "ldm.places": set(),
    "ldm.config_check": {"ldm.config"},
    "ldm.config_file": {"ldm.config", "ldm.config_check", "ldm.places"},
    "ldm.schedule": {"ldm.config"},
    "ldm.variational": {"ldm.schedule"},
    "ldm.density": {"ldm.config"},
    "ldm.objective": {"ldm.config", "ldm.density", "ldm.schedule", "ldm.variational"},
    "ldm.reconstruction": {"ldm.config"},
    "ldm.provenance": set(),
    "ldm.card": {"ldm.config", "ldm.config_file", "ldm.places", "ldm.provenance"},
    "ldm.hub": {"ldm.card", "ldm.places", "ldm.provenance"},
    "ldm.models": {"ldm.config", "ldm.config_check", "ldm.places", "ldm.schedule"},
    "ldm.data": {"ldm.config", "ldm.config_check", "ldm.places"},
    "ldm.spaces": {"ldm.config", "ldm.config_check", "ldm.models", "ldm.variational"},
    "ldm.conditioning": set(),
    "ldm.conditioners": {"ldm.config", "ldm.schedule", "ldm.conditioning", "ldm.models"},
    "ldm.stage": {
        "ldm.config",
        "ldm.config_check",
        "ldm.spaces",
        "ldm.conditioning",
        "ldm.conditioners",
        "ldm.objective",
        "ldm.models",
    },
    "ldm.evaluation": {"ldm.card", "ldm.config", "ldm.models", "ldm.schedule", "ldm.variational"},
    "ldm.evaluate": {"ldm.evaluation", "ldm.measurement"},
    "ldm.measurement": {
        "ldm.config",
        "ldm.data",
        "ldm.evaluation",
        "ldm.models",
        "ldm.places",
        "ldm.provenance",
        "ldm.training",
    },
    "ldm.average": {"ldm.evaluate", "ldm.measurement", "ldm.training"},
    "ldm.doctor": {
        "ldm.config",
        "ldm.config_check",
        "ldm.data",
        "ldm.evaluation",
        "ldm.models",
        "ldm.objective",
        "ldm.places",
        "ldm.schedule",
        "ldm.spaces",
        "ldm.stage",
        "ldm.training",
    },
    "ldm.validate": {"ldm.config", "ldm.data", "ldm.evaluation", "ldm.models", "ldm.places", "ldm.provenance"},
    "ldm.training": {
        "ldm.config",
        "ldm.config_check",
        "ldm.config_file",
        "ldm.data",
        "ldm.schedule",
        "ldm.objective",
        "ldm.reconstruction",
        "ldm.spaces",
        "ldm.conditioning",
        "ldm.conditioners",
        "ldm.stage",
        "ldm.evaluation",
        "ldm.provenance",
        "ldm.card",
        "ldm.hub",
        "ldm.models",
        "ldm.places",
    },
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def part(module):
    """The part of the house a module belongs to: ldm.data.cache -> ldm.data, ldm.stage -> ldm.stage."""
    folder = next((folder for folder in PARTS if module == folder or module.startswith(folder + ".")), module)
    return SAME_PART.get(folder, folder)


def imports(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            yield base if node.module or node.level > 1 else package
            yield from (f"{base}.{alias.name}" for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    module = name_of(path)
    if module.startswith("pipelines"):
        assert not any(name.split(".")[0] == "ldm" for name in imports(path)), "pipelines travel without ldm"
    elif module.startswith("ldm.") and module != "ldm.cli":
        own = part(module)
        assert own in MAY_IMPORT, f"say in MAY_IMPORT what {own} may import"
        used = {part(name) for name in imports(path) if name.startswith("ldm.")}
        used = {name for name in used if name in MAY_IMPORT}
        assert used - {own} <= MAY_IMPORT[own]
        assert not any(name.split(".")[0] in ("pipelines", "train_text2img", "train_vae") for name in imports(path))


def test_s01_nothing_is_unpickled():
    for path in [*MODULES, *ROOT.glob("benchmarks/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "features.py":  # the EfficientNet weights are a .pth: known to the byte, tensors only
            text = text.replace('torch.load(path, map_location="cpu", weights_only=True)', "")
        assert not re.search(r"pickle\b|(?<!safetensors\.)torch\.(load|save)\b|load_state\(|save_state\(", text), path
        assert not re.search(r"\b(joblib|dill|shelve|marshal|unsafe_load|full_load|UnsafeLoader)\b", text), path
        assert not re.search(r"os\.(system|popen|exec|spawn)", text), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_s01_what_is_loaded_is_safetensors_and_runs_no_code(path):
    allowed = {"AutoConfig": "trust_remote_code", "AutoTokenizer": "trust_remote_code"}
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in {"eval", "exec", "compile", "__import__"}
        assert "shell" not in words
        assert "allow_pickle" not in words
        if name == "yaml.load":
            assert words["Loader"] == "_Loader"
            assert "class _Loader(yaml.SafeLoader)" in path.read_text(encoding="utf-8")
        if name.endswith(".from_pretrained"):
            owner = name.removesuffix(".from_pretrained")
            if owner in allowed:
                assert words.get("trust_remote_code") == "False" or "options" in words.values()
            else:
                assert words["use_safetensors"] == "True"
        if words.get("trust_remote_code") == "True":
            raise AssertionError(name)


def test_no_file_is_a_drawer():
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "misc"}


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_map_of_the_readme_names_every_module_and_nothing_else():
    block = re.search(r"## The files.*?```(?:text)?\n(.*?)```", readme(), re.DOTALL).group(1)
    named = {line.split()[0] for line in block.splitlines() if line and not line.startswith(" ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {name for name in named if name.endswith("/")}
    for name in named:
        assert (ROOT / name).exists(), f"README names {name}"
    for file in tracked.stdout.split():
        if file.endswith(".py") and not file.endswith("__init__.py"):
            assert file in named or any(file.startswith(folder) for folder in folders), f"README leaves {file} out"


def test_the_commands_of_the_readme_exist():
    commands = re.findall(r"^(?:\.venv/bin/)?(?:accelerate launch )?(\S+\.py|ldm \w+|make \w+)", readme(), re.MULTILINE)
    assert {"make demo", "make test"} <= set(commands)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    cli = (ROOT / "ldm/cli.py").read_text()
    for command in commands:
        kind, _, word = command.partition(" ")
        if kind == "make":
            assert word in targets
        elif kind == "ldm":
            assert f'add_subcommand("{word}"' in cli
        else:
            assert (ROOT / command).exists()
    for config in re.findall(r"configs/[\w/.-]+\.(?:yaml|txt)", readme()):
        assert (ROOT / config).exists(), config


def test_the_page_on_reliability_names_every_test_of_every_row():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    written = set(re.findall(r"`(test_\w+::test_\w+)`", page))
    tests = set()
    for file in ROOT.glob("tests/test_*.py"):
        names = re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        tests |= {f"{file.stem}::{name}" for name in names if rows_of(name)}
    assert written == tests, "make reliability writes it anew"
    assert {row for test in tests for row in rows_of(test.partition("::")[2])} == set(ROWS), "a row without a test"
    assert not re.search(r"\d+ failed|no test", page)
