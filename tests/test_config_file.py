from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm.config import AutoencoderConfig, ConditionersConfig, StageConfig, TextConfig
from ldm.config_file import ConfigError, config_differences, exit_on_config_error, load_config, save_config

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
    mode: Literal["fast", "slow", 3] = "fast"

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ValueError(f"rate {self.rate} is above 1")


@dataclass(frozen=True)
class Outer:
    """What is outside."""

    name: str
    """What it is called,
    on two lines."""
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    every: int | float | None = None
    pair: tuple[int, Literal["a", "b"]] = (1, "a")
    tags: dict[str, int] = field(default_factory=dict)
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
    config = load(StageConfig, STAGE, tmp_path)
    assert isinstance(config, StageConfig)
    assert config.denoiser["eps"] == 1e-5
    assert config.denoiser["block_out_channels"] == [32, 64]
    assert config.optim.learning_rate == 1e-4
    assert config.optim.betas == (0.9, 0.99)
    assert config.conditioners.text == TextConfig(dropout=0.2, encoder={"hidden_size": 64})
    assert config.data.image_size == 64


def test_autoencoder_config_is_read(tmp_path):
    config = load(AutoencoderConfig, "{output_dir: x, autoencoder: {latent_channels: 4}}", tmp_path)
    assert config == AutoencoderConfig(output_dir="x", autoencoder={"latent_channels": 4})


def test_an_integer_is_a_float_where_a_float_is_wanted(tmp_path):
    rate = load(Outer, "{name: x, inner: {rate: 1}}", tmp_path).inner.rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("010", "010"),
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("1e5", 1e5),
        ("1_000", 1000),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("", None),
        ('"1"', "1"),
        ("{class_path: calendar.Calendar}", {"class_path": "calendar.Calendar"}),
    ],
)
def test_scalars_mean_what_they_look_like(text, value, tmp_path):
    read = load(Outer, f"name: x\nfree:\n  key: {text}", tmp_path).free["key"]
    assert read == value
    assert type(read) is type(value)


def test_merge_keys_share_values(tmp_path):
    config = load(Outer, "{name: x, inner: &i {rate: 0.1}, maybe: {<<: *i, mode: slow}}", tmp_path)
    assert config.maybe == Inner(rate=0.1, mode="slow")


def test_without_a_file_the_overrides_are_the_config():
    assert load_config(Outer, ["--name", "x", "--pair=[2, b]"]) == Outer("x", pair=(2, "b"))


def test_the_last_file_counts(tmp_path):
    (tmp_path / "other.yaml").write_text("name: other")
    assert load(Outer, "name: x", tmp_path, "--config", str(tmp_path / "other.yaml")).name == "other"


def test_the_command_line_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--name", "from argv"])
    assert load_config(Outer).name == "from argv"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--inner.rate", "1e-3"], {"inner": Inner(rate=1e-3, mode="slow")}),
        (["--inner.rate=0.25", "--inner.rate", "0.75"], {"inner": Inner(rate=0.75, mode="slow")}),
        (["--inner.names", "[a, no]"], {"inner": Inner(names=("a", "no"), mode="slow")}),
        (["--inner.mode", "3"], {"inner": Inner(mode=3)}),
        (["--inner", "{rate: 0.1}"], {"inner": Inner(rate=0.1)}),
        (["--inner", "{rate: 0.1}", "--inner.mode", "slow"], {"inner": Inner(rate=0.1, mode="slow")}),
        (["--maybe.rate", "0.1"], {"maybe": Inner(rate=0.1)}),
        (["--name", "2024"], {"name": "2024"}),
        (["--name", "a: b # c"], {"name": "a: b # c"}),
        (["--name="], {"name": ""}),
        (["--note", "null"], {"note": None}),
        (["--note", "7"], {"note": "7"}),
        (["--every", "-3"], {"every": -3}),
        (["--every", "2.5"], {"every": 2.5}),
        (["--on", "true"], {"on": True}),
        (["--tags.b", "2"], {"tags": {"a": 1, "b": 2}}),
        (["--free.depth", "1"], {"free": {"depth": 1, "eps": 0.1}}),
        (["--free.new.deep", "1e-4"], {"free": {"depth": 4, "eps": 0.1, "new": {"deep": 1e-4}}}),
        (["--free.eps", "silu"], {"free": {"depth": 4, "eps": "silu"}}),
        (["--free.eps", '"2"'], {"free": {"depth": 4, "eps": "2"}}),
        (["--free", "{a: 1}"], {"free": {"a": 1}}),
    ],
)
def test_overrides_change_one_leaf_or_replace_a_whole(overrides, expected, tmp_path):
    base = {
        "name": "x",
        "inner": Inner(mode="slow"),
        "note": "n",
        "tags": {"a": 1},
        "free": {"depth": 4, "eps": 0.1},
    }
    text = "{name: x, inner: {mode: slow}, note: n, tags: {a: 1}, free: {depth: 4, eps: 0.1}}"
    config = load(Outer, text, tmp_path, *overrides)
    assert config == Outer(**(base | expected))
    assert type(config.name) is str


def test_overrides_of_a_real_stage(tmp_path):
    overrides = ["--denoiser.layers_per_block", "1", "--conditioners.text.dropout", "0", "--output_dir", "y"]
    config = load(StageConfig, STAGE, tmp_path, *overrides)
    assert config.denoiser["layers_per_block"] == 1
    assert config.denoiser["_class_name"] == "UNet2DConditionModel"
    assert config.conditioners.text == TextConfig(dropout=0.0, encoder={"hidden_size": 64})
    assert config.output_dir == "y"
    assert load(StageConfig, STAGE, tmp_path, "--conditioners.text", "null").conditioners.text is None


# ---- what is refused, word for word ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "objective: {prediciton_type: epsilon}",
            "objective.prediciton_type: no such field; did you mean 'prediction_type'?",
        ),
        ("learning_rate: 1", "learning_rate: no such field; did you mean 'optim.learning_rate'?"),
        ("dropout: 1", "dropout: no such field; did you mean 'conditioners.text.dropout'?"),
        (
            "conditioners: {dropout: 1}",
            "conditioners.dropout: no such field; did you mean 'conditioners.text.dropout'?",
        ),
        ("space: {zzz: 1}", "space.zzz: no such field; choose from kind, autoencoder"),
        ("space: {1: 1}", "space.1: no such field; choose from kind, autoencoder"),
        ("optim: {learning_rate: fast}", "optim.learning_rate: got 'fast' (str); expected float"),
        ("optim: {learning_rate: true}", "optim.learning_rate: got True (bool); expected float"),
        ("optim: {betas: [0.1]}", "optim.betas: got a list of 1; expected tuple[float, float]"),
        ("optim: {betas: [1, 2, 3]}", "optim.betas: got a list of 3; expected tuple[float, float]"),
        ("optim: {betas: [0.1, x]}", "optim.betas[1]: got 'x' (str); expected float"),
        ("optim: 3", "optim: got 3 (int); expected OptimConfig"),
        ("optim: null", "optim: got null; expected OptimConfig"),
        ("seed: true", "seed: got True (bool); expected int"),
        ("seed: 3.0", "seed: got 3.0 (float); expected int"),
        ('seed: "3"', "seed: got '3' (str); expected int"),
        ("seed: {token: hunter2}", "seed: got a dict of 1; expected int"),
        ("data: {split: 3}", "data.split: got 3 (int); expected str"),
        ("data: {limit: all}", "data.limit: got 'all' (str); expected int"),
        ("data: {flip: 1}", "data.flip: got 1 (int); expected bool"),
        ("data: {languages: en}", "data.languages: got 'en' (str); expected tuple[str, ...]"),
        ("data: {held_out: {test: 1}}", "data.held_out.test: got 1 (int); expected str"),
        ("data: {held_out: {1: x}}", "data.held_out.1: got the key 1 (int); expected text"),
        ("conditioners: {text: {dropout: no}}", "conditioners.text.dropout: got 'no' (str); expected float"),
        (
            "objective: {path: lineer}",
            "objective.path: got 'lineer' (str); choose from linear, scaled_linear, cosine, flow; "
            "did you mean 'linear'?",
        ),
        ("space: {kind: 3}", "space.kind: got 3 (int); choose from pixel, latent"),
        (
            "loop: {trackers: [wandb, tensorbord]}",
            "loop.trackers[1]: got 'tensorbord' (str); choose from tensorboard, wandb, trackio; "
            "did you mean 'tensorboard'?",
        ),
    ],
)
def test_errors_say_path_value_and_what_is_allowed(text, message, tmp_path):
    assert problems(StageConfig, f"output_dir: x\ndenoiser: {{}}\n{text}", tmp_path) == [message]


def test_a_choice_is_exact_about_its_type(tmp_path):
    assert problems(Outer, "{name: x, inner: {mode: 3.0}}", tmp_path) == [
        "inner.mode: got 3.0 (float); choose from fast, slow, 3"
    ]


def test_alternatives_are_all_named(tmp_path):
    assert problems(Outer, "{name: x, every: [1]}", tmp_path) == ["every: got a list of 1; expected int | float | null"]


def test_every_problem_has_its_line(tmp_path):
    text = "objective: {path: lineer}\noptim: {learning_rate: fast}\nsede: 1"
    lines = problems(StageConfig, text, tmp_path, "--data.limit", "many")
    starts = [
        "sede: ",
        "output_dir: required",
        "denoiser: required",
        "data.limit: ",
        "objective.path: ",
        "optim.lea",
    ]
    assert [line for line, start in zip(lines, starts, strict=True) if not line.startswith(start)] == []


def test_the_check_of_a_part_is_a_problem_with_its_path(tmp_path):
    assert problems(Outer, "{name: x, maybe: {rate: 2}}", tmp_path) == ["maybe: rate 2.0 is above 1"]
    with pytest.raises(ConfigError, match=r"^rate 3\.0 is above 1$"):
        load_config(Inner, ["--rate", "3"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.learnin_rate", "1"], "optim.learnin_rate: no such field; did you mean 'learning_rate'?"),
        (["--seed", "1.5"], "seed: got 1.5 (float); expected int"),
        (["--data.limit", "all"], "data.limit: got 'all' (str); expected int"),
        (
            ["--objective.path", "flwo"],
            "; choose from linear, scaled_linear, cosine, flow; did you mean 'flow'?",
        ),
        (["--optim.betas", "[0.1"], "optim.betas: got '[0.1' (str); expected tuple[float, float]"),
        (["--data.flip"], "data.flip: no value given; write --data.flip VALUE"),
        (["--data.flip", "--seed", "1"], "data.flip: no value given; write --data.flip VALUE"),
        (["--seed.x", "1"], "seed: got a dict of 1; expected int"),
        (
            ["--denoiser.layers_per_block.down", "1"],
            ".layers_per_block.down: 'layers_per_block' holds 2 (int), not a mapping; give the whole of it",
        ),
    ],
)
def test_errors_in_overrides_name_their_path(overrides, message, tmp_path):
    (line,) = problems(StageConfig, STAGE, tmp_path, *overrides)
    assert line.endswith(message)


@pytest.mark.parametrize("text", ["hub_token: hunter2", "data: {token: {a: hunter2}}", "seed: {t: hunter2}"])
def test_values_that_may_be_secrets_are_not_echoed(text, tmp_path):
    assert "hunter2" not in "\n".join(problems(StageConfig, f"{STAGE}\n{text}", tmp_path))


@pytest.mark.parametrize("words", [["--hub_token", "hunter2"], ["--hub_token=hunter2"], ["-t", "hunter2"]])
def test_overrides_that_may_be_secrets_are_not_echoed(words, tmp_path):
    assert "hunter2" not in "\n".join(problems(StageConfig, STAGE, tmp_path, *words))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"output_dir: x\nseed: [1,\ntoken: hunter2\n",
            "but got '<stream end>' (while parsing a flow sequence of line 2)",
        ),
        (b"token: hunter2\n\tseed: 1\n", "c.yaml, line 2: not valid YAML: found character"),
        (b"output_dir: x\nseed: 1\nseed: 2\n", "line 3: not valid YAML: key 'seed' twice"),
        (
            b"output_dir: !!python/object:os.system {}",
            "line 1: not valid YAML: could not determine a constructor",
        ),
        (b"\xff\xfe\xfa", "not valid YAML in UTF-8"),
        (b"a: \x00", "not valid YAML in UTF-8"),
        (b"- 1\n- 2\n", "got a list of 2; expected a mapping of fields"),
        (b"", "output_dir: required\ndenoiser: required"),
    ],
)
def test_a_file_that_is_no_config(content, message, tmp_path):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(StageConfig, ["--config", str(tmp_path / "c.yaml")])
    assert message in str(caught.value)
    assert "hunter2" not in str(caught.value)


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
    output = capsys.readouterr()
    assert output.err == "nam: no such field; did you mean 'name'?\nname: required\n"
    assert output.out == ""
    assert main(["--name", "x"]) == Outer("x")


def test_a_process_prints_no_traceback():
    script = (
        "from ldm.config import StageConfig\nfrom ldm.config_file import exit_on_config_error, load_config\n"
        "with exit_on_config_error():\n    load_config(StageConfig)"
    )
    command = [sys.executable, "-c", script, "--output_dir", "x"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, env=os.environ)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "denoiser: required\n")


def leaves(kind: type, prefix: str = "") -> list[str]:
    """Return the path of every field below a dataclass, by the dataclasses alone."""
    paths = []
    for name, annotation in get_type_hints(kind).items():
        inner = [arm for arm in (annotation, *get_args(annotation)) if is_dataclass(arm)]
        paths += leaves(inner[0], f"{prefix}{name}.") if inner else [prefix + name]
    return paths


@pytest.mark.parametrize("kind", [StageConfig, AutoencoderConfig])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_field(kind, flag, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(kind, ["--config", "nowhere.yaml", flag])
    assert caught.value.code == 0
    words = capsys.readouterr().out.split()
    assert [path for path in leaves(kind) if f"--{path}" not in words] == []


def test_help_has_docs_types_and_defaults(capsys):
    with pytest.raises(SystemExit):
        load_config(Outer, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--name VALUE What it is called, on two lines. (str; required)" in text
    assert "--inner.rate VALUE Share, 100% at most. (float; default: 0.5)" in text
    assert "--maybe.names VALUE (tuple[str, ...]; default: [])" in text
    assert "What is inside." in text
    assert "--inner VALUE" not in text


# ---- saving and comparing ----


def test_saved_configs_read_back_equal(tmp_path):
    config = load(StageConfig, STAGE, tmp_path, "--data.languages", "[no, en]", "--optim.eps", "1e-20")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(StageConfig, ["--config", str(tmp_path / "saved.yaml")]) == config
    assert "languages:\n  - 'no'\n  - en" in (tmp_path / "saved.yaml").read_text()
    assert set(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == {f.name for f in fields(StageConfig)}


@pytest.mark.parametrize("text", ["Möwe 🦆", "a\x85b", "\u2028", "\r\n", "\ufeff", " a ", "1e-4", "no", "<<", "~", "#"])
def test_any_text_round_trips(text, tmp_path):
    save_config(Outer(text, free={text: text}), tmp_path / "c.yaml")
    assert load_config(Outer, ["--config", str(tmp_path / "c.yaml")]) == Outer(text, free={text: text})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3))
INNERS = st.builds(Inner, st.floats(max_value=1), st.lists(st.text()).map(tuple), st.sampled_from(["fast", "slow", 3]))
OUTERS = st.builds(
    Outer,
    name=st.text() | st.sampled_from(["1e-4", "no", "null", "~", "<<", "=", "1_0", "0x1", "12:30", ".inf", "a: #b"]),
    inner=INNERS,
    maybe=st.none() | INNERS,
    every=st.none() | st.integers() | st.floats(allow_nan=False),
    pair=st.tuples(st.integers(), st.sampled_from(["a", "b"])),
    tags=st.dictionaries(st.text(), st.integers(), max_size=3),
    free=st.dictionaries(st.text(), VALUES, max_size=3),
    note=st.none() | st.text(),
    on=st.booleans(),
)
FEW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@FEW
@given(config=OUTERS)
def test_any_config_round_trips(config, tmp_path):
    save_config(config, tmp_path / "c.yaml")
    loaded = load_config(Outer, ["--config", str(tmp_path / "c.yaml")])
    assert loaded == config
    assert repr(loaded) == repr(config)  # 1, 1.0 and True differ
    assert config_differences(loaded, config) == []


def test_differences_are_leaves_with_both_values(tmp_path):
    old = load(StageConfig, STAGE, tmp_path)
    overrides = ["--optim.learning_rate", "3e-4", "--denoiser.layers_per_block", "1", "--denoiser.new", "a"]
    new = load(StageConfig, STAGE, tmp_path, *overrides, "--data.languages", "[de]")
    assert config_differences(old, new) == [
        "denoiser.layers_per_block: 2 -> 1",
        "denoiser.new: not set -> 'a'",
        "data.languages: ['en'] -> ['de']",
        "optim.learning_rate: 0.0001 -> 0.0003",
    ]
    assert config_differences(new, old)[1] == "denoiser.new: 'a' -> not set"
    assert config_differences(Outer("x"), Outer("x", note="n")) == ["note: None -> 'n'"]
    assert config_differences(old, old) == []


# ---- any leaf, wrong ----

LEAVES = leaves(StageConfig)
WRONG = {"text": "zzz", "int": 3, "float": 1.5, "bool": True, "null": None, "list": [{}], "mapping": {"q": 1}}
TAKES = {str: {"text"}, int: {"int"}, float: {"int", "float"}, bool: {"bool"}, NoneType: {"null"}}


def taken(annotation: Any) -> set[str]:
    """Return the names in WRONG that are right for an annotation."""
    if get_origin(annotation) in (Literal, tuple):
        return set()
    if get_origin(annotation) is dict:
        return {"mapping"}
    return TAKES.get(annotation) or set().union(*(taken(arm) for arm in get_args(annotation)))


def annotation_of(path: str) -> Any:
    kind: Any = StageConfig
    for name in path.split("."):
        kind = next((arm for arm in get_args(kind) if is_dataclass(arm)), kind)
        kind = get_type_hints(kind)[name]
    return kind


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A file with every field of a stage."""
    file = tmp_path_factory.mktemp("full") / "full.yaml"
    save_config(StageConfig("x", {"a": 1}, conditioners=ConditionersConfig(TextConfig())), file)
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
    assert message.startswith((f"{path}: got ", f"{path}[0]: got "))
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
