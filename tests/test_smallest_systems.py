"""The smallest systems, by their commands: trained, killed, joined, sampled, measured."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ldm.config.file import config_kind
from ldm.export.systems import SYSTEMS as SYSTEM_KINDS
from ldm.training.checkpoint import CheckpointStore

from .table import table
from .test_system import SCRIPTS
from .trainers import ROOT, ended, ledger, metrics, run, start_several

TEXT = {"conditioners.text.pretrained": "clip"}
IMAGE = {"conditioners.image.pretrained": "clip"}
PRIOR = {"space.image_encoder": "clip", **TEXT}
VIDEO = {"space.autoencoder": "decoder", "conditioners.text.pretrained": "image"}
SYSTEMS = {
    "dalle2": {"clip": {}, "prior": PRIOR, "decoder": IMAGE | TEXT, "upsampler": {}},
    "imagen": {"clip": {}, "base": TEXT, "super_resolution": TEXT},
    "kandinsky": {"clip": {}, "movq": {}, "prior": PRIOR, "decoder": IMAGE | {"space.autoencoder": "movq"}},
    "video_ldm": {
        "vae": {},
        "decoder": {"autoencoder.pretrained": "vae"},
        "image": {"space.autoencoder": "vae"},
        "video": VIDEO | {"denoiser.pretrained": "image"},
        "prediction": VIDEO | {"denoiser.pretrained": "video"},
    },
}
"""The stages of each system, with the fields that name the model of another stage."""
# of VideoLDM the last stage is the whole pipeline
PIPELINES = {"dalle2": "UnCLIPPipeline", "imagen": "ImagenPipeline", "kandinsky": "KandinskyPipeline"}
STAGES = [(name, stage) for name, stages in SYSTEMS.items() for stage in stages]
RESUMED = [
    *(("dalle2", stage) for stage in ("prior", "decoder", "upsampler")),
    ("imagen", "super_resolution"),
    ("kandinsky", "movq"),
    ("kandinsky", "prior"),
    ("video_ldm", "decoder"),
    ("video_ldm", "prediction"),
]
TWICE = [
    ("dalle2", "decoder", 6),
    ("imagen", "super_resolution", 6),
    ("kandinsky", "movq", 3),
    ("video_ldm", "decoder", 6),
    ("video_ldm", "prediction", 6),
]
"""Stages, and the steps that they are trained for: of two codes that are almost as near, rounding chooses."""
pytestmark = pytest.mark.slow


def started(*words):
    """Start a script or module of the project, in a session of its own."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environ, start_new_session=True, **pipe)


def command(*words):
    """Run a script or module of the project; return what it says."""
    process = started(*words)
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-6000:]
    return said


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """The folder of each smallest system, trained and joined, and the words that trained it."""
    found = {}
    for name in SYSTEMS:
        folder = tmp_path_factory.mktemp("smallest") / name
        words = ("train_system.py", "--config", f"configs/tiny/{name}/system.yaml", "--output_dir", str(folder))
        command(*words)
        found[name] = folder, words
    return found


def words_of(name, stage, smallest):
    """Return the script of a stage, and the words that train it with the models of the other stages."""
    file = yaml.safe_load((ROOT / f"configs/tiny/{name}/system.yaml").read_text())["stages"][stage]
    models = {path: smallest[name][0] / other / "model" for path, other in SYSTEMS[name][stage].items()}
    script = SCRIPTS[config_kind(str(ROOT / file), [*SCRIPTS])]
    return [script, "--config", file, *(f"--{path}={model}" for path, model in models.items())]


@table("name", PIPELINES)
def test_it_is_trained_joined_sampled_and_measured(name, smallest, tmp_path):
    folder, _ = smallest[name]
    model = folder / "model"
    kind = SYSTEM_KINDS[PIPELINES[name]]
    index = json.loads((model / "model_index.json").read_text())
    assert index["_class_name"] == (kind.stock or ["pipeline", PIPELINES[name]])
    for stage in SYSTEMS[name]:
        sheets = [*(folder / stage).glob("samples/*.png"), *(folder / stage).glob("reconstructions/*.png")]
        assert stage == "clip" or Image.open(max(sheets)).width > 60
        assert not (folder / stage / "alarms.jsonl").exists()
    shell = ("-m", "ldm.commands.cli")
    call = ("--model", str(model), "--trust_remote_code", "true", "--out", str(tmp_path / "images" / name))
    command(*shell, "sample", "red heart", *call, "--num_inference_steps", "2")
    assert len(list((tmp_path / "images" / name).glob("*.png"))) == 1
    few = ("--num_inference_steps", "2", "--trust_remote_code", "true", "--seed", "1", "--variety_prompts", "0")
    command(*shell, "evaluate", str(model), *few, "--out", str(tmp_path / "evaluation" / name))
    assert "Does it follow the caption?" in (tmp_path / "evaluation" / name / "report.md").read_text()
    places = [str(folder / stage / "model") for stage in SYSTEMS[name]]
    command(*shell, "join", PIPELINES[name], *places, "--to", str(tmp_path / name))
    assert (tmp_path / name / "pipeline.py").read_text() == (model / "pipeline.py").read_text()


def test_the_smallest_video_model_is_trained_and_sampled(smallest, tmp_path):
    folder, _ = smallest["video_ldm"]
    with Image.open(max((folder / "video").glob("samples/*.png"))) as sheet:
        assert sheet.height < 250, "strips of 128 x 32 pixels, and no squares of 128"
    assert not [*folder.glob("*/alarms.jsonl")]
    image, video = (load_file(find_weights(folder / stage / "model" / "unet")) for stage in ("image", "video"))
    assert all(torch.equal(image[name], video[name]) for name in image), "the image model is frozen"
    call = ("--model", str(folder / "video" / "model"), "--trust_remote_code", "true", "--out", str(tmp_path / "clips"))
    command("-m", "ldm.commands.cli", "sample", "soccer ball moving left", *call, "--num_inference_steps", "2")
    assert {path.suffix for path in (tmp_path / "clips").iterdir()} >= {".png", ".gif"}


def find_weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


@table(("name", "stage"), RESUMED)
def test_its_stages_resume_exactly(name, stage, smallest, tmp_path):
    script, *words = words_of(name, stage, smallest)
    words += ["--output_dir", str(tmp_path / name / stage)]
    assert "to the bit" in command(script, *words, "--resume_check", "true")


@table(("name", "stage"), STAGES)
def test_its_stages_equal_those_trained_alone(name, stage, smallest, tmp_path):
    command(*words_of(name, stage, smallest), "--output_dir", str(tmp_path / stage))
    assert assert_same_weights(smallest[name][0] / stage / "model", tmp_path / stage / "model") > 0


def test_its_doctor_ends_with_one_table(smallest):
    _, words = smallest["dalle2"]
    stages = [*SYSTEMS["dalle2"], "all"]
    lines = command(*words, "--doctor").partition("\nstage ")[2].splitlines()[1 : 1 + len(stages)]
    assert [line.split()[0] for line in lines] == stages


def killed_at(place, words):
    """Start a command, and kill it and its stage without warning as soon as there is `place`."""
    process = started(*words)
    try:
        end = time.monotonic() + 200
        while not place.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert place.exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def assert_same_weights(whole, again):
    """Compare every tensor of two model folders to the bit; return the number of files of weights."""
    ours = {path.relative_to(whole): path for path in whole.rglob("*.safetensors")}
    for name, path in ours.items():
        one, other = load_file(path), load_file(again / name)
        assert one.keys() == other.keys()
        assert all(bool((one[key] == other[key]).all()) for key in one), name
    return len(ours)


def test_a_joined_system_stays_as_it_is(smallest):
    assert "is joined already and stays as it is" in command(*smallest["imagen"][1])


def test_killed_in_a_stage_and_between_two_the_same_command_ends_with_the_same_weights(smallest, tmp_path):
    whole, words = smallest["dalle2"]
    folder = tmp_path / "dalle2"
    again = (*words[:-1], str(folder))
    killed_at(folder / "prior" / "checkpoints", again)
    killed_at(folder / "decoder" / "model" / "README.md", again)
    command(*again)
    assert assert_same_weights(whole / "model", folder / "model") > 4


@table(("name", "stage", "steps"), TWICE)
def test_two_processes_train_its_stages_as_one_does(name, stage, steps, smallest, tmp_path):
    folder = tmp_path / name / stage
    folder.mkdir(parents=True)
    script, *words = words_of(name, stage, smallest)
    words += ["--loop.mixed_precision", "no", "--optim.warmup_steps", 1]
    for field, value in {
        "max_train_steps": steps,
        "save_every_steps": steps,
        "validate_every_steps": steps,
        "log_every_steps": 1,
    }.items():
        words += [f"--loop.{field}", value]
    pair = start_several(2, script, (*words, "--output_dir", folder / "two"), folder / "log-two")
    assert [ended(process) for process in pair] == [0, 0]
    run(script, (*words, "--output_dir", folder / "one"), folder / "log-one")
    assert ledger(folder / "one") == ledger(folder / "two")
    for one, two in zip(metrics(folder / "one"), metrics(folder / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    stores = [CheckpointStore(folder / world / "checkpoints", 1) for world in ("one", "two")]
    one, two = (store.load(store.latest()).tensors for store in stores)
    assert ("memory" in one) == (stage == "movq")
    for key, tensor in one.get("memory", {}).items():
        assert torch.equal(tensor, two["memory"][key]), key
