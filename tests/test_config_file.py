from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.config import (
    AutoencoderConfig,
    ClipConfig,
    DataConfig,
    DoctorConfig,
    OptimConfig,
    StageConfig,
    SystemConfig,
    TemporalConfig,
)
from ldm.config.check import FILES, field_hints
from ldm.config.conditioners import ConditionersConfig, FramesConfig, ImageConfig, LabelConfig, LowResConfig, TextConfig
from ldm.config.file import config_kind, exit_on_config_error, load_config, save_config, tree_differences
from ldm.config.places import expanded, portable
from ldm.errors import ConfigError

from .table import table

CONFIGS = Path(__file__).parents[1] / "configs"
STAGE = """
output_dir: runs/emoji
denoiser: {_class_name: UNet2DConditionModel, layers_per_block: 2, block_out_channels: [32, 64], eps: 1e-5}
conditioners:
  text: {dropout: 0.2, encoder: {hidden_size: 64}}
optim: {learning_rate: 1e-4, betas: [0.9, 0.99]}
"""


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    rate: float = 0.5
    """Share, 100% at most."""
    names: tuple[str, ...] = ()
    mode: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True)
class Outer:
    """What is outside."""

    name: str
    """What it is called,
    on two lines."""
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    every: float | None = None
    pair: tuple[int, Literal["a", "b"]] = (1, "a")
    tags: dict[str, str] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    on: bool = False


def load(kind: type, text: str, folder: Path, *overrides: str) -> Any:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(kind, ["--config", str(file), *overrides])


def problems(kind: type, text: str, folder: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(kind, text, folder, *overrides)
    assert isinstance(caught.value, ValueError)
    return str(caught.value).split("\n")


# ---- what is read ----


def test_yaml_becomes_the_dataclasses(tmp_path):
    assert load(StageConfig, STAGE, tmp_path) == StageConfig(
        output_dir="runs/emoji",
        denoiser={
            "_class_name": "UNet2DConditionModel",
            "layers_per_block": 2,
            "block_out_channels": [32, 64],
            "eps": 1e-5,
        },
        conditioners=ConditionersConfig(TextConfig(dropout=0.2, encoder={"hidden_size": 64})),
        optim=OptimConfig(learning_rate=1e-4, betas=(0.9, 0.99)),
    )


def our_own(file: str | Path) -> Any:
    kinds = [AutoencoderConfig, ClipConfig, StageConfig, SystemConfig]
    return load_config(config_kind(str(file), kinds), ["--config", str(file)])


@table("name", sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml")))
def test_our_own_configs_are_read(name):
    written = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    config = our_own(CONFIGS / name)
    assert config.output_dir == written["output_dir"]
    if isinstance(config, SystemConfig):
        assert config.stages == written["stages"]
        return
    assert config.data.held_out == written["data"].get("held_out", {})
    assert config.optim.learning_rate == float(written["optim"]["learning_rate"])


def test_the_first_places_of_the_configs_of_stable_diffusion_still_hold_them():
    first, now = CONFIGS / "openmoji", CONFIGS / "stable_diffusion/openmoji"
    names = {file.name for file in first.glob("*.yaml") if file.is_symlink()}
    assert {"text2img.yaml", "text2img_1h.yaml", "vae.yaml"} <= names
    assert all(our_own(first / name) == our_own(now / name) for name in names)


def test_scalars_mean_what_they_look_like(tmp_path):
    looks = {
        "no": "no",
        "on": "on",
        "2024-01-01": "2024-01-01",
        "1e-4": 1e-4,
        "-2.5E+3": -2500.0,
        ".5": 0.5,
        "-7": -7,
        "true": True,
        "null": None,
        "": None,
        '"2"': "2",
        '"null"': "null",
    }
    text = "name: 'x'\nfree:\n" + "".join(f"  k{i}: {look}\n" for i, look in enumerate(looks))
    read = load(Outer, text, tmp_path).free
    assert [repr(value) for value in read.values()] == [repr(value) for value in looks.values()]
    config = load(StageConfig, f"{STAGE}\nloop: {{mixed_precision: no}}\nseed: 3", tmp_path)
    assert config.loop.mixed_precision == "no"
    rate = load(Outer, "{name: x, inner: {rate: 1}}", tmp_path).inner.rate
    assert (rate, type(rate)) == (1.0, float)


def test_a_class_path_is_a_value_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n\nclass Trap: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    free = {"class_path": "trap.Trap", "deep": {"class_path": "trap.Trap", "init_args": {}}}
    save_config(Outer("x", free=free), tmp_path / "c.yaml")
    config = load_config(Outer, ["--config", str(tmp_path / "c.yaml"), "--free.new", "{class_path: trap.Trap}"])
    assert config.free == free | {"new": {"class_path": "trap.Trap"}}
    assert problems(Outer, "{name: x, free: '{a: {class_path: trap.Trap}}'}", tmp_path)[0].startswith("free: got '{a:")
    assert "trap" not in sys.modules


def test_the_command_line_is_the_default_and_needs_no_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "from argv", "--pair=[2, b]"])
    assert load_config(Outer) == Outer("from argv", pair=(2, "b"))


@table(
    ("overrides", "expected"),
    [
        (["--inner.rate=0.25", "--inner.rate", "1e-3"], {"inner": Inner(rate=1e-3, mode="slow")}),
        (["--inner.names", "[a, no]"], {"inner": Inner(names=("a", "no"), mode="slow")}),
        (["--inner", "{rate: 0.1}", "--inner.mode", "slow"], {"inner": Inner(rate=0.1, mode="slow")}),
        (["--maybe.rate", "0.1"], {"maybe": Inner(rate=0.1)}),
        (["--maybe", "{}"], {"maybe": Inner()}),
        (["--maybe.rate", "0.1", "--maybe", "null"], {}),
        (["--on", "--maybe"], {"on": True, "maybe": Inner()}),
        (["--maybe", "true", "--on=false"], {"maybe": Inner(), "on": False}),
        (["--maybe", "--maybe.rate", "0.1"], {"maybe": Inner(rate=0.1)}),
        (["--maybe.rate", "0.1", "--maybe", "--name", "y"], {"maybe": Inner(rate=0.1), "name": "y"}),
        (["--maybe.rate", "0.1", "--maybe", "false"], {}),
        (["--name", "2024"], {"name": "2024"}),
        (["--name", "a: b # c"], {"name": "a: b # c"}),
        (["--name="], {"name": ""}),
        (["--note", "null", "--every=-1e3", "--on", "true"], {"note": None, "every": -1000.0, "on": True}),
        (["--note", "7", "--name", "null"], {"note": "7", "name": "null"}),
        (["--note", "#1"], {"note": "#1"}),
        (["--tags.b", "y"], {"tags": {"a": "x", "b": "y"}}),
        (["--free.depth", "1"], {"free": {"depth": 1, "eps": 0.1}}),
        (["--free.new.deep", "1e-4"], {"free": {"depth": 4, "eps": 0.1, "new": {"deep": 1e-4}}}),
        (["--free.eps", '"2"', "--free.depth", "silu"], {"free": {"depth": "silu", "eps": "2"}}),
        (["--free", "{a: 1}"], {"free": {"a": 1}}),
    ],
)
def test_overrides_change_one_leaf_or_replace_a_whole(overrides, expected, tmp_path):
    base = {"name": "x", "inner": Inner(mode="slow"), "note": "n", "tags": {"a": "x"}, "free": {"depth": 4, "eps": 0.1}}
    text = "{name: x, inner: {mode: slow}, note: n, tags: {a: x}, free: {depth: 4, eps: 0.1}}"
    assert load(Outer, text, tmp_path, *overrides) == Outer(**(base | expected))


def test_an_override_leaves_an_alias_alone(tmp_path):
    config = load(Outer, "{name: x, tags: &t {a: x}, free: {<<: *t, deep: *t}}", tmp_path, "--free.deep.a", "y")
    assert (config.tags, config.free) == ({"a": "x"}, {"a": "x", "deep": {"a": "y"}})


def test_overrides_of_a_real_stage(tmp_path):
    overrides = ["--denoiser.layers_per_block", "1", "--conditioners.text.dropout", "0", "--output_dir", "y"]
    config = load(StageConfig, STAGE, tmp_path, *overrides, "--conditioners.text.encoder.layers", "3")
    assert config.denoiser["layers_per_block"] == 1
    assert config.denoiser["_class_name"] == "UNet2DConditionModel"
    assert config.conditioners.text == TextConfig(dropout=0.0, encoder={"hidden_size": 64, "layers": 3})
    assert config.output_dir == "y"


# ---- what is refused, word for word ----


@table(
    ("text", "message"),
    [
        (
            "objective: {prediciton_type: epsilon}",
            "objective.prediciton_type: no such field; did you mean 'prediction_type'?",
        ),
        ("learning_rate: 1", "learning_rate: no such field; did you mean 'optim.learning_rate'?"),
        (
            "conditioners: {dropout: 1}",
            "conditioners.dropout: no such field; did you mean 'conditioners.text.dropout'?",
        ),
        ("space: {1: 1}", "space.1: no such field; choose from kind, image_size, autoencoder, image_encoder"),
        ("optim: {learning_rate: fast}", "optim.learning_rate: got 'fast' (str); expected float"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas: got a list of 3; expected tuple[float, float]"),
        ("optim: 3", "optim: got 3 (int); expected OptimConfig"),
        ("optim: null", "optim: got None; expected OptimConfig"),
        ("seed: true", "seed: got True (bool); expected int"),
        ("seed: 3.0", "seed: got 3.0 (float); expected int"),
        ("seed: null", "seed: got None; expected int"),
        ("data: {held_out: {test: 1}}", "data.held_out: got a dict of 1; expected dict[str, str]"),
        ("conditioners: {text: {dropout: no}}", "conditioners.text.dropout: got 'no' (str); expected float"),
        (
            "objective: {path: lineer}",
            "objective.path: got 'lineer'; choose from linear, scaled_linear, cosine, flow; did you mean 'linear'?",
        ),
    ],
)
def test_errors_say_path_value_and_what_is_allowed(text, message, tmp_path):
    assert problems(StageConfig, f"output_dir: x\ndenoiser: {{}}\n{text}", tmp_path) == [message]


@table(
    ("overrides", "message"),
    [
        (["--optim.learnin_rate", "1"], "optim.learnin_rate: no such field; did you mean 'learning_rate'?"),
        (["--seed", "1.5"], "seed: got '1.5' (str); expected int"),
        (["--seed", "null"], "seed: got None; expected int"),
        (["--seed.x", "1"], "seed: got a dict of 1; expected int"),
        (["--optim.betas", "[0.1"], "optim.betas: got '[0.1' (str); expected tuple[float, float]"),
        (["--denoiser.a", "[0.1"], "denoiser.a, line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        (["--data.limit", "--seed", "1"], "data.limit: no value given; write --data.limit=VALUE"),
        (["--data", "--seed", "1"], "data: no value given; write --data=VALUE"),
        (["--optim", "true"], "optim: got True (bool); expected OptimConfig"),
    ],
)
def test_errors_in_overrides_name_their_path(overrides, message, tmp_path):
    assert problems(StageConfig, STAGE, tmp_path, *overrides) == [message]


def test_every_problem_has_its_line(tmp_path):
    text = "{objective: {path: lineer}, optim: {learning_rate: fast, eps: x}, sede: 1, output_dir: 3}"
    lines = problems(StageConfig, text, tmp_path, "--data.limit", "many")
    assert sorted(line.partition(":")[0] for line in lines) == [
        "data.limit",
        "denoiser",
        "objective.path",
        "optim.eps",
        "optim.learning_rate",
        "output_dir",
        "sede",
    ]
    assert "denoiser: required" in lines


@table(
    ("text", "words"),
    [
        ("hub_token: hunter2", []),
        ("data: {token: {a: hunter2}}", []),
        ("seed: {t: hunter2}", []),
        ("seed: [1,\ntoken: hunter2\n", []),
        ("", ["--hub_token", "hunter2"]),
        ("", ["--hub_token=hunter2"]),
        ("", ["-t", "hunter2"]),
    ],
)
def test_values_that_may_be_secrets_are_not_echoed(text, words, tmp_path):
    assert "hunter2" not in "\n".join(problems(StageConfig, f"{STAGE}\n{text}", tmp_path, *words))


@table(
    ("content", "message"),
    [
        (b"token: hunter2\n\tseed: 1\n", "c.yaml, line 2: not valid YAML: found character"),
        (b"output_dir: !!python/object:os.system {}", "line 1: not valid YAML: could not determine a constructor"),
        (b"\xff\xfe\xfa", "c.yaml: not text in UTF-8"),
        (b"a: \x00", "c.yaml: not valid YAML"),
        (b"- 1\n- 2\n", "c.yaml: got a list of 2; expected dict"),
        (b"", "output_dir: required\ndenoiser: required"),
    ],
)
def test_a_file_that_is_no_config(content, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(StageConfig, ["--config", str(tmp_path / "c.yaml")])
    assert message in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"^--config nowhere\.yaml: No such file or directory$"):
        load_config(StageConfig, ["--config", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(StageConfig, [f"--config={tmp_path}"])


# ---- exit code and help, as an entry script has them ----


@exit_on_config_error()
def main(argv: list[str]) -> Outer:
    return load_config(Outer, argv)


def test_an_error_exits_with_2_and_prints_only_the_message(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--nam", "x"])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "nam: no such field; did you mean 'name'?\nname: required\n")
    assert main(["--name", "x"]) == Outer("x")


def test_a_process_prints_no_traceback():
    script = (
        "from ldm.config import StageConfig\nfrom ldm.config.file import exit_on_config_error, load_config\n"
        "with exit_on_config_error():\n    load_config(StageConfig)"
    )
    command = [sys.executable, "-c", script, "--output_dir", "x"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "denoiser: required\n")


def leaves(kind: type, prefix: str = "") -> list[str]:
    """Return the path of every field below a dataclass, by the dataclasses alone."""
    paths = []
    for name, annotation in field_hints(kind).items():
        inner = [arm for arm in (annotation, *get_args(annotation)) if is_dataclass(arm)]
        paths += leaves(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return paths


@table("kind", [StageConfig, AutoencoderConfig])
def test_help_lists_every_field(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(kind, ["--config", "nowhere.yaml", "--help"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.split()
    assert [path for path in leaves(kind) if f"--{path}" not in words] == []


def test_help_has_docs_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        load_config(Outer, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--name NAME What it is called, on two lines. (required, type: str)" in text
    assert "--inner.rate RATE Share, 100% at most. (type: float, default: 0.5)" in text
    assert "--maybe.names [ITEM,...] (type: tuple[str, ...], default: ())" in text
    assert "What is inside." in text


# ---- saving and comparing ----


def test_saved_configs_read_back_equal(tmp_path):
    config = load(StageConfig, STAGE, tmp_path, "--data.languages", "[no, en]", "--optim.eps", "1e-20")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(StageConfig, ["--config", str(tmp_path / "saved.yaml")]) == config
    assert "languages:\n  - 'no'\n  - en" in (tmp_path / "saved.yaml").read_text()
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == {f.name for f in fields(StageConfig)}


PLACES = [path for path in leaves(StageConfig) if path.split(".")[-1] in FILES and path != "objective.path"]


def test_every_path_of_a_config_is_expanded_and_none_of_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/zaphod")
    monkeypatch.setenv("DISK", "/mnt/disk")
    every = ConditionersConfig(TextConfig(), image=ImageConfig("x"))
    whole = asdict(StageConfig("x", {"pretrained": "$DISK/~/pretrained"}, conditioners=every))
    for path in PLACES:
        *parents, name = path.split(".")
        part = reduce(dict.__getitem__, parents, whole)
        part[name] = {"test": "~/t.txt", "validation": "${DISK}/v.txt"} if name == "held_out" else f"$DISK/~/{name}"
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(whole))))
    read = asdict(load_config(StageConfig, [f"--config={file}", "--space.autoencoder=~/vae"]))
    assert read["space"]["autoencoder"] == "/home/zaphod/vae"
    assert read["data"]["held_out"] == {"test": "/home/zaphod/t.txt", "validation": "/mnt/disk/v.txt"}
    assert read["denoiser"]["pretrained"] == "/mnt/disk/~/pretrained", "~ is a home at the beginning alone"
    assert "$" not in str(read)
    save_config(load_config(StageConfig, ["--config", str(file)]), tmp_path / "saved.yaml")
    saved = (tmp_path / "saved.yaml").read_text()
    assert not [word for word in ("zaphod", "/mnt", "$") if word in saved]


@table(
    ("words", "message"),
    [
        (["--output_dir", "$NOWHERE/x"], "output_dir: got '$NOWHERE/x'; the environment variable NOWHERE is not set"),
        (["--output_dir", "${}"], "output_dir: got '${}'; the environment variable  is not set"),
        (["--data.path", "~nobody-here/x"], "data.path: got '~nobody-here/x'; there is no such user; for a folder of"),
        (["--data.held_out.test", "$NOWHERE"], "data.held_out.test: got '$NOWHERE'; the environment variable"),
        (["--denoiser.pretrained", "$NOWHERE"], "denoiser.pretrained: got '$NOWHERE'; the environment variable"),
        (["--output_dir", "out/${HF_TOKEN}"], "output_dir: ${HF_TOKEN} may be a secret, which a path would reveal"),
        (["--config", "$NOWHERE/x.yaml"], "--config: got '$NOWHERE/x.yaml'; the environment variable NOWHERE"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_named(words, message, tmp_path):
    assert problems(StageConfig, STAGE, tmp_path, *words)[0].startswith(message)


def test_what_a_variable_says_is_a_path_and_nobody_on_the_hub_is_asked_for_it(monkeypatch):
    monkeypatch.setenv("OWNER", "somebody")
    for text, path in {
        "$OWNER/x": "./somebody/x",
        "/a/$OWNER": "/a/somebody",
        "me/model@v1": "me/model@v1",
        "https://x/$OWNER": "https://x/$OWNER",
        "US$ 5": "US$ 5",
        "./~x": "./~x",
    }.items():
        assert expanded(text, "data.path") == path


ODD = ["1e-4", "no", "null", "~", "<<", "=", "#1", "0x1", "12:30", "a: #b", "a\x85b", "\u2028", "\ufeff", " a "]
TEXT = (st.text() | st.sampled_from(ODD)).filter(lambda text: portable(text) == text)  # an absolute path is cut
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3))
INNERS = st.builds(
    Inner, st.floats(allow_nan=False), st.lists(TEXT, max_size=3).map(tuple), st.sampled_from(["fast", "slow"])
)
OUTERS = st.builds(
    Outer,
    name=TEXT,
    inner=INNERS,
    maybe=st.none() | INNERS,
    every=st.none() | st.floats(allow_nan=False),
    pair=st.tuples(st.integers(), st.sampled_from(["a", "b"])),
    tags=st.dictionaries(TEXT, TEXT, max_size=3),
    free=st.dictionaries(TEXT, VALUES, max_size=3),
    note=st.none() | TEXT,
    on=st.booleans(),
)
FEW = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(config=OUTERS)
def test_any_config_round_trips(config, tmp_path):
    save_config(config, tmp_path / "c.yaml")
    loaded = load_config(Outer, ["--config", str(tmp_path / "c.yaml")])
    assert loaded == config
    assert repr(loaded) == repr(config)  # 1, 1.0 and True differ


def test_differences_are_leaves_with_both_values(tmp_path):
    old = load(StageConfig, STAGE, tmp_path)
    overrides = ["--optim.learning_rate", "3e-4", "--denoiser.layers_per_block", "1", "--denoiser.new", "a"]
    new = load(StageConfig, STAGE, tmp_path, *overrides, "--data.languages", "[de]")
    assert list(tree_differences(asdict(old), asdict(new))) == [
        "data.languages: ('en',) -> ('de',)",
        "optim.learning_rate: 0.0001 -> 0.0003",
        "denoiser.layers_per_block: 2 -> 1",
        "denoiser.new: not set -> 'a'",
    ]
    assert "denoiser.new: 'a' -> not set" in tree_differences(asdict(new), asdict(old))
    assert list(tree_differences({"note": None}, {"note": "n"})) == ["note: None -> 'n'"]


# ---- any leaf, wrong ----

LEAVES = leaves(StageConfig)
WRONG = {"text": "zzz", "int": 3, "float": 1.5, "bool": True, "null": None, "list": [{}], "mapping": {"q": 1}}
TAKES = {str: {"text"}, int: {"int"}, float: {"int", "float"}, bool: {"bool"}, NoneType: {"null"}}


def taken(annotation: Any) -> set[str]:
    """Return the names in WRONG that are right for an annotation."""
    if get_origin(annotation) in (Literal, tuple):
        return set()
    if get_origin(annotation) is dict:
        return {"mapping"} if Any in get_args(annotation) else set()
    return TAKES.get(annotation) or set().union(*(taken(arm) for arm in get_args(annotation)))


def annotation_of(path: str) -> Any:
    kind: Any = StageConfig
    for name in path.split("."):
        kind = next((arm for arm in get_args(kind) if is_dataclass(arm)), kind)
        kind = field_hints(kind)[name]
    return kind


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A file with every field of a stage."""
    file = tmp_path_factory.mktemp("full") / "full.yaml"
    every = ConditionersConfig(TextConfig(), LabelConfig(3), ImageConfig("clip"), LowResConfig(8), FramesConfig(2))
    data = DataConfig("openmoji_clips")
    config = StageConfig("x", {"a": 1}, data=data, conditioners=every, doctor=DoctorConfig(), temporal=TemporalConfig())
    save_config(config, file)
    return file


def complaint_after(change: Callable[[dict[str, Any], str], None], path: str, full: Path) -> str:
    """Return the error after a change of the mapping that holds a leaf."""
    tree = yaml.safe_load(full.read_text())
    *parents, name = path.split(".")
    change(reduce(dict.__getitem__, parents, tree), name)
    file = full.with_name("changed.yaml")
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_config(StageConfig, ["--config", str(file)])
    return str(caught.value)


@FEW
@given(path=st.sampled_from(LEAVES), data=st.data())
def test_any_leaf_of_a_wrong_type_is_named(path, data, full):
    wrong = data.draw(st.sampled_from(sorted(WRONG.keys() - taken(annotation_of(path)))))
    message = complaint_after(lambda part, name: part.update({name: WRONG[wrong]}), path, full)
    assert message.startswith(f"{path}: got ")
    assert "\n" not in message


@FEW
@given(path=st.sampled_from(LEAVES), data=st.data())
def test_any_misspelt_key_is_named_with_its_right_spelling(path, data, full):
    *_, name = path.split(".")
    at = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:at] + "q" + name[at:]

    def misspell(part: dict[str, Any], name: str) -> None:
        part[misspelt] = part.pop(name)

    message = complaint_after(misspell, path, full)
    wrong = path.removesuffix(name) + misspelt
    assert f"{wrong}: no such field; did you mean {name!r}?" in message.split("\n")
