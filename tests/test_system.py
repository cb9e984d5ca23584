"""A system trains its stages one after another, each as its own script trains it alone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ldm.config import AutoencoderConfig, ClipConfig, StageConfig, SystemConfig
from ldm.config.file import config_kind, load_config
from ldm.errors import ConfigError
from ldm.system import SystemStage, examine_stages, run_stage, split_words, system_stages, train_stages
from ldm.training.resume_check import differences
from ldm.training.signals import Stopped

from .table import table
from .trainers import ROOT, wait_for

SCRIPTS = {AutoencoderConfig: "train_vae.py", ClipConfig: "train_clip.py", StageConfig: "train_text2img.py"}
TINY = {name: str(ROOT / f"configs/tiny/{name}.yaml") for name in ("vae", "clip", "text2img")}


def test_a_word_belongs_to_the_stage_that_it_names():
    words = [
        "--config",
        "s.yaml",
        "--vae.loop.max_train_steps",
        "4",
        "--vae.seed=3",
        "--doctor.gpu_tflops",
        "9",
        "--doctor",
    ]
    own, of_stages = split_words([*words, "--text2img.denoiser.norm_eps", "-1"])
    assert own == ["--config", "s.yaml", "--doctor.gpu_tflops", "9", "--doctor"]
    assert of_stages == {
        "vae": ["--loop.max_train_steps", "4", "--seed=3"],
        "text2img": ["--denoiser.norm_eps", "-1"],
    }


@table(("name", "kind"), [("vae", AutoencoderConfig), ("clip", ClipConfig), ("text2img", StageConfig)])
def test_a_stage_is_trained_by_the_script_of_its_config(name, kind):
    assert config_kind(TINY[name], list(SCRIPTS)) is kind


def test_a_path_into_another_stage_follows_that_stage(tmp_path):
    stages = {"first": TINY["vae"], "second": TINY["text2img"]}
    one, two = system_stages(SystemConfig("elsewhere", stages), SCRIPTS, {"first": ["--seed", "3"]})
    assert (one.name, one.script, one.folder) == ("first", "train_vae.py", Path("elsewhere/first"))
    assert one.words == ["--config", TINY["vae"], "--seed", "3", "--output_dir", "elsewhere/first"]
    assert (two.name, two.script) == ("second", "train_text2img.py")
    assert two.words[-4:] == ["--output_dir", "elsewhere/second", "--space.autoencoder", "elsewhere/first/model"]
    assert (one.needs, two.needs) == ([], [Path("elsewhere/first")])
    (tmp_path / "first" / "model").mkdir(parents=True)
    _, two = system_stages(SystemConfig("elsewhere", stages), SCRIPTS, {}, finished=tmp_path)
    assert two.words[-1] == str(tmp_path / "first" / "model"), "what is trained already is used"


def test_what_cannot_be_trained_in_this_order_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"space\.autoencoder is in out/tiny/vae, of a stage that is trained later"):
        system_stages(SystemConfig("x", {"b": TINY["text2img"], "a": TINY["vae"]}), SCRIPTS, {})
    with pytest.raises(ConfigError, match="vea: no such stage; choose from vae"):
        system_stages(SystemConfig("x", {"vae": TINY["vae"]}), SCRIPTS, {"vea": ["--seed", "3"]})
    (tmp_path / "no.yaml").write_text("output_dir: x\n")
    with pytest.raises(ConfigError, match=r"no\.yaml: a config of no kind; expected one that sets output_dir, deno"):
        system_stages(SystemConfig("x", {"no": str(tmp_path / "no.yaml")}), {StageConfig: "train_text2img.py"}, {})


@table(
    ("stages", "message"),
    [
        ("{}", "stages: got none; expected a config file for each stage"),
        (
            "{doctor: a.yaml}",
            "stages: got 'doctor'; expected the name of a folder, and none of doctor, output_dir, pipeline, stages",
        ),
        ("{../up: a.yaml}", "stages: got '../up'; expected the name of a folder"),
    ],
)
def test_stages_have_names_of_folders(stages, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(SystemConfig, ["--output_dir", "x", "--stages", stages])


def test_a_path_is_in_the_innermost_folder(tmp_path):
    for name, folder in {"outer": "out", "inner": "out/inner"}.items():
        tree = yaml.safe_load(Path(TINY["vae"]).read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"output_dir": folder}))
    stages = {name: str(tmp_path / f"{name}.yaml") for name in ("outer", "inner")} | {"last": TINY["text2img"]}
    words = {"last": ["--space.autoencoder", "out/inner/model"]}
    *_, last = system_stages(SystemConfig("s", stages), SCRIPTS, words)
    assert last.words[-2:] == ["--space.autoencoder", "s/inner/model"]


def script(folder, name, body):
    path = folder / f"{name}.py"
    path.write_text(f"import os, signal, sys, time, json, pathlib\nfolder = pathlib.Path({str(folder)!r})\n{body}")
    return SystemStage(name, str(path), ["--seed", "3"], folder / name)


def test_stages_run_in_their_order_until_one_fails(tmp_path):
    note = """
with (folder / "log").open("a") as file:
    file.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + chr(10))
"""
    stages = [script(tmp_path, name, note + end) for name, end in (("one", ""), ("two", "sys.exit(3)"), ("three", ""))]
    with pytest.raises(SystemExit) as ended:
        train_stages(stages)
    assert ended.value.code == 3
    assert (tmp_path / "log").read_text().splitlines() == ["one --seed 3", "two --seed 3"]
    assert run_stage(script(tmp_path, "killed", "os.kill(os.getpid(), 9)"), 1) == 137


@table("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_once_and_is_waited_for(number, tmp_path):
    body = """
def stop(number, frame):
    time.sleep(0.3)  # it saves
    with (folder / "got").open("a") as file:
        file.write(f"{number} ")
    sys.exit(128 + number)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
time.sleep(60)
"""
    stage = script(tmp_path, "slow", body)

    def ask():
        wait_for(tmp_path / "ready")
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    with pytest.raises(Stopped) as stopped:
        run_stage(stage, 1)
    assert stopped.value.code == 128 + number
    assert (tmp_path / "got").read_text() == f"{int(number)} "


@pytest.mark.slow
def test_a_stage_does_not_outlive_a_system_that_is_killed(tmp_path):
    stage = script(tmp_path, "slow", "(folder / 'pid').write_text(str(os.getpid()))\ntime.sleep(60)\n")
    code = f"from ldm.system import *; run_stage(SystemStage('slow', {stage.script!r}, [], Path('x')), 1)"
    system = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(tmp_path / "pid", "")
    time.sleep(0.2)
    pid = int((tmp_path / "pid").read_text())
    system.kill()
    system.wait(30)
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_stage_of_several_processes_has_a_port_of_its_own(tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    body = "(folder / 'port').write_text(os.environ['MASTER_PORT'] + os.environ['TORCHELASTIC_USE_AGENT_STORE'])"
    assert run_stage(script(tmp_path, "stage", body), 2) == 0
    assert (tmp_path / "port").read_text() == "29502False"


def test_an_examination_trains_for_a_moment_what_later_stages_need_and_ends_with_one_table(tmp_path, capsys):
    body = """
out = folder / pathlib.Path(sys.argv[0]).stem
with (folder / "log").open("a") as file:
    file.write(" ".join(sys.argv[3:]) + "\\n")
if "--doctor" in sys.argv:
    (out / "doctor").mkdir(parents=True)
    cost = {"steps": 1000, "step_seconds": 3.6, "seconds": 3600, "memory_bytes": 2**30}
    report = {"findings": [{"name": "plan", "numbers": {}}, {"name": "cost", "numbers": cost}]}
    (out / "doctor" / "report.json").write_text(json.dumps(report))
    sys.exit(out.stem != "one")
"""
    stages = [script(tmp_path, name, body) for name in ("one", "two", "three")]
    stages[2] = replace(stages[2], needs=[tmp_path / "one"])
    config = SystemConfig("x", {}, doctor={"gpu_tflops": 9.0, "price_per_hour": None})
    with pytest.raises(SystemExit, match=r"^wrong: two$"):
        examine_stages(config, stages)
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "--doctor --doctor.gpu_tflops=9.0"
    assert log[1].startswith("--loop.max_train_steps 2 --optim.warmup_steps 1")
    assert log[2:] == ["--doctor --doctor.gpu_tflops=9.0"] * 2, "nobody needs the others"
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    of_each = ["1,000", "3.6", "1.00", "1.00"]
    names = ("one", "two", "three")
    assert table[1:] == [*([name, *of_each] for name in names), ["all", "3.00", "1.00"]]


@pytest.mark.slow
def test_a_system_that_is_killed_goes_on_and_its_stages_equal_those_trained_alone(tmp_path):
    few = ["--loop.max_train_steps", "8", "--loop.save_every_steps", "2", "--loop.log_every_steps", "1"]
    few += ["--loop.mixed_precision", "no"]
    words = [f"--{stage}.{few[i][2:]}={few[i + 1]}" for stage in ("vae", "text2img") for i in range(0, len(few), 2)]
    command = [sys.executable, "train_system.py", "--config", "configs/tiny/system.yaml", "--output_dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    system = subprocess.Popen([*command, str(tmp_path / "system"), *words], cwd=ROOT, env=environment)
    wait_for(tmp_path / "system" / "text2img" / "metrics.jsonl", '"step": 4', seconds=120)
    system.kill()
    system.wait()
    time.sleep(3)  # the stage ends with the system
    subprocess.run([*command, str(tmp_path / "system"), *words], cwd=ROOT, env=environment, check=True)
    for name, more in (("vae", []), ("text2img", ["--space.autoencoder", str(tmp_path / "vae" / "model")])):
        alone = [sys.executable, f"train_{name}.py", "--config", TINY[name], "--output_dir", str(tmp_path / name)]
        subprocess.run([*alone, *few, *more], cwd=ROOT, env=environment, check=True)
        found = [row for row in differences(tmp_path / name, tmp_path / "system" / name) if "metrics" not in row]
        assert found == []
    assert yaml.safe_load((tmp_path / "system" / "text2img" / "config.yaml").read_text())
    assert json.loads((tmp_path / "system" / "text2img" / "model" / "model_index.json").read_text())
