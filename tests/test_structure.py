"""The house rules that can be read off the source: imports, names, and what the README says of the files."""

import ast
import re
import subprocess
from pathlib import Path

from .reliability import ROWS, promises, rows_of

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("ldm/**/*.py"), *ROOT.glob("pipelines/*.py"), *ROOT.glob("train_*.py")])
MAY_IMPORT = {  # part of ldm -> parts that it may import, besides itself; nothing imports a part further down here
    "errors": set(),
    "files": set(),
    "terminal": set(),
    "machine": set(),
    "config": {"errors"},
    "objectives": {"config", "errors"},
    "data": {"config", "errors", "files", "terminal"},
    "models": {"config", "errors", "files", "machine", "objectives", "terminal"},
    "conditioners": {"config", "models", "objectives"},
    "spaces": {"config", "errors", "models", "objectives"},
    "stage": {"conditioners", "config", "errors", "models", "objectives", "spaces"},
    "evaluation": {"config", "data", "errors", "files", "machine", "models", "objectives", "terminal"},
    "training": {
        *("conditioners", "config", "data", "errors", "evaluation", "files", "machine", "models", "objectives"),
        *("spaces", "stage", "terminal"),
    },
    "export": {
        *("conditioners", "config", "data", "errors", "evaluation", "files", "models", "stage", "training"),
    },
    "doctor": {"config", "data", "evaluation", "export", "machine", "models", "objectives", "spaces", "training"},
    "recipes": {
        *("config", "data", "doctor", "errors", "evaluation", "export", "models", "spaces", "stage", "terminal"),
        "training",
    },
    "system": {"config", "errors", "export", "training"},
    "commands": {"config", "data", "errors", "evaluation", "export", "machine", "models", "terminal", "training"},
}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def part(module):
    """The part of the house a module belongs to: ldm.data.cache -> data, ldm.stage -> stage."""
    return module.split(".")[1]


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


def test_imports_point_one_way():
    order = list(MAY_IMPORT)
    assert all(order.index(other) < order.index(one) for one in order for other in MAY_IMPORT[one])
    for path in MODULES:
        module, names = name_of(path), list(imports(path))
        if module.startswith("pipelines"):
            assert not any(name.split(".")[0] == "ldm" for name in names), "pipelines travel without ldm"
        elif module.startswith("ldm."):
            own = part(module)
            used = {part(name) for name in names if name.startswith("ldm.")} & MAY_IMPORT.keys()
            assert used - {own} <= MAY_IMPORT[own], f"{module}: say in MAY_IMPORT what ldm.{own} may import"
            assert not any(name.split(".")[0] in ("pipelines", "train_text2img", "train_vae") for name in names)


def top_level_names(path):
    for node in tree(path).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_the_modules_of_a_pipeline_can_be_joined_to_one_file():
    names = [name for path in ROOT.glob("pipelines/*.py") for name in top_level_names(path)]
    assert "denoise" in names
    assert sorted(names) == sorted(set(names))


def test_s01_nothing_is_unpickled():
    for path in [*MODULES, *ROOT.glob("benchmarks/*.py")]:
        text = path.read_text(encoding="utf-8")
        if path.name == "features.py":  # the EfficientNet weights are a .pth: known to the byte, tensors only
            text = text.replace('torch.load(path, map_location="cpu", weights_only=True)', "")
        assert not re.search(r"pickle\b|(?<!safetensors\.)torch\.(load|save)\b|load_state\(|save_state\(", text), path
        assert not re.search(r"\b(joblib|dill|shelve|marshal|unsafe_load|full_load|UnsafeLoader)\b", text), path
        assert not re.search(r"os\.(system|popen|exec|spawn)", text), path


def test_s01_what_is_loaded_is_safetensors_and_runs_no_code():
    allowed = {"AutoConfig": "trust_remote_code", "AutoTokenizer": "trust_remote_code"}
    calls = ((path, node) for path in MODULES for node in ast.walk(tree(path)) if isinstance(node, ast.Call))
    for path, call in calls:
        name = ast.unparse(call.func)
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in {"eval", "exec", "compile", "__import__"}, path
        assert not {"shell", "allow_pickle"} & words.keys(), path
        if name == "yaml.load":
            assert words["Loader"] == "_Loader"
            assert "class _Loader(yaml.SafeLoader)" in path.read_text(encoding="utf-8")
        if name.endswith(".from_pretrained"):
            owner = name.removesuffix(".from_pretrained")
            if owner in allowed:
                assert words.get("trust_remote_code") == "False" or "options" in words.values(), path
            else:
                assert words["use_safetensors"] == "True", path
        assert words.get("trust_remote_code") != "True", path


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


def test_every_row_of_reliability_has_a_test_and_every_test_of_a_row_has_one():
    files = [file.read_text(encoding="utf-8") for file in ROOT.glob("tests/test_*.py")]
    names = [name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)]
    assert {row for name in names for row in rows_of(name)} == set(ROWS)


def test_the_page_on_reliability_has_the_promises():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert page == promises(), "python -m tests.reliability > docs/reliability.md"
