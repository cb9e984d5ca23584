"""What strangers' files may make this project do, and what may leave the machine: nothing that was not asked for."""

import builtins
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import config as datasets_config
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import HfApi
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import train_vae
from ldm.commands import cli
from ldm.commands.sample import slug
from ldm.config import DataConfig, StageConfig
from ldm.config.file import load_config, save_config
from ldm.config.places import on_hub, pinned, portable
from ldm.data import headers
from ldm.data.headers import ImageError
from ldm.data.preflight import checked_source
from ldm.data.rows import RowSource, TableRows
from ldm.data.sources import build_source
from ldm.models.clip import load_image_encoder
from ldm.models.network import build_network
from ldm.models.text_encoder import load_text_encoder
from ldm.training.checkpoint import CheckpointError, CheckpointStore
from ldm.training.manifest import read_manifest
from tests.fake_hub import TOKEN, FakeHub
from tests.image_folders import noise_image, write_folder, write_metadata
from tests.tiny_pipeline import FLOW, LENGTH, WIDTH, pipeline

from .table import table

ROOT = Path(__file__).parent.parent
STRANGER = "the stranger was here"
PICKLES = ("diffusion_pytorch_model.bin", "pytorch_model.bin", "optimizer.bin", "model.ckpt", "random_states_0.pkl")

REFUSED = (ValueError, SystemExit)
"""What a function raises, and a command: without a traceback."""


class Evil:
    """A pickle that creates the file `marker` when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def plant(folder, marker):
    """Put pickles of every usual name into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICKLES:
        if name.endswith(".pkl"):
            (folder / name).write_bytes(pickle.dumps(Evil(marker)))
        else:
            torch.save(Evil(marker), folder / name)


def plant_code(file, marker):
    """Write Python code that creates the file `marker` when it is imported."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")


@pytest.fixture
def marker(tmp_path):
    """A file that must not come to be, but where a test says so."""
    return tmp_path / STRANGER


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW)).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=8, **sizes)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder.parent / "vision")
    return folder


@pytest.fixture
def model(saved, tmp_path):
    """A pipeline folder, with an image encoder beside it."""
    return copied(saved, tmp_path)[0]


def copied(saved, to):
    """Return a copy of the pipeline folder, with an image encoder beside it, and a file that must not come to be."""
    shutil.copytree(saved.parent, to / "saved")
    return to / "saved" / "model", to / STRANGER


def sample(model, out, *more):
    words = ["--model", str(model), "--out", str(out), "--num_inference_steps", "2", *map(str, more)]
    cli.main(["sample", "a cat", *words])


def evaluate(model, out, *more):
    words = ["--data", "openmoji", "--captions", "configs/openmoji/heldout.txt", "--out", str(out), *map(str, more)]
    cli.main(["evaluate", str(model), *words])


LOADERS = {
    "space.autoencoder": ("vae", lambda model: build_network({"pretrained": str(model / "vae")}, "space.autoencoder")),
    "denoiser": ("unet", lambda model: build_network({"pretrained": str(model), "subfolder": "unet"}, "denoiser")),
    "text encoder": ("text_encoder", lambda model: load_text_encoder(str(model), LENGTH)),
    "image encoder": ("../vision", lambda model: load_image_encoder(str(model.parent / "vision"), "image")),
    "ldm sample": ("unet", lambda model: sample(model, model.parent)),
    "ldm sample, text encoder": ("text_encoder", lambda model: sample(model, model.parent)),
    "ldm evaluate": ("vae", lambda model: evaluate(model, model.parent)),
}


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


# ---- S1: pickles ----


def test_s01_the_pickles_of_these_tests_would_do_harm(tmp_path):
    plant(tmp_path / "a", tmp_path / "marker")
    for name in PICKLES:
        file = tmp_path / "a" / name
        if name.endswith(".pkl"):
            pickle.loads(file.read_bytes())  # noqa: S301
        else:
            torch.load(file, weights_only=False)
        assert (tmp_path / "marker").exists(), name
        (tmp_path / "marker").unlink()


@table("what", LOADERS)
def test_s01_where_safetensors_are_missing_it_is_said_and_no_pickle_is_loaded(what, saved, tmp_path):
    model, marker = copied(saved, tmp_path)
    part, load = LOADERS[what]
    plant(model / part, marker)
    weights(model / part).unlink()
    with pytest.raises((OSError, *REFUSED), match=r"no file named \S*\.safetensors"):
        load(model)
    assert not marker.exists()


@table("what", [name for name in LOADERS if name != "ldm evaluate"])
def test_s01_pickles_beside_safetensors_are_not_loaded(what, saved, tmp_path, capsys):
    model, marker = copied(saved, tmp_path)
    part, load = LOADERS[what]
    for folder in (model, model / part):
        plant(folder, marker)
    load(model)
    assert not marker.exists()


@table("what", LOADERS)
def test_s01_a_pickle_called_safetensors_is_not_loaded(what, saved, tmp_path):
    model, marker = copied(saved, tmp_path)
    part, load = LOADERS[what]
    torch.save(Evil(marker), weights(model / part))
    with pytest.raises((Exception, SystemExit), match=r"(?i)safetensors|header|load"):
        load(model)
    assert not marker.exists()


@table("shard", ["pytorch_model.bin", "../x.safetensors", "/etc/x.safetensors"])
@table("what", LOADERS)
def test_s01_an_index_of_weights_names_safetensors_of_its_folder_only(what, shard, saved, tmp_path):
    model, marker = copied(saved, tmp_path)
    part, load = LOADERS[what]
    plant(model / part, marker)
    file = weights(model / part)
    file.unlink()
    index = {"metadata": {"total_size": 4}, "weight_map": {"conv_in.weight": shard}}
    (model / part / f"{file.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(REFUSED, match="safetensors files beside it and nothing else"):
        load(model)
    assert not marker.exists()


def train(monkeypatch, *words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_vae.py", "--config", "configs/tiny/vae.yaml", *map(str, words)])
    try:
        train_vae.main()
    finally:
        torch.set_num_threads(1)


def tiny(images, steps):
    """Options of a training of a few steps on a folder of images."""
    words = ["--data.source", "imagefolder", "--data.path", str(images), "--data.held_out", "{}"]
    words += ["--data.held_out_percent", "20", "--loop.max_train_steps", str(steps), "--optim.warmup_steps", "0"]
    return [*words, "--loop.save_every_steps", "2", "--loop.validate_every_steps", "2", "--loop.log_every_steps", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images-of-someone"
    folder.mkdir()
    write_folder(folder, 24, suffixes=("png",))
    return folder


def test_s01_pickles_in_the_folder_of_a_training_are_not_loaded(images, marker, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for folder in (out, out / "checkpoints", out / "model", out / "checkpoints" / "step-1"):
        plant(folder, marker)
    shutil.move(out / "checkpoints" / "step-1", out / "checkpoints" / "checkpoint-1")  # as accelerate calls them
    quiet = ["--output_dir", out, "--loop.trackers", "[]"]
    train(monkeypatch, *tiny(images, 2), *quiet)
    plant(out / "checkpoints" / "step-2", marker)
    train(monkeypatch, *tiny(images, 4), *quiet)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2, 3, 4, 4]
    assert not marker.exists()


# ---- S2: code ----


def write_index(model, **changes):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | changes))


@table("command", [sample, evaluate])
@table("what", ["pipeline", "community pipeline", "component", "library beside it"])
def test_s02_a_pipeline_with_code_of_its_own_is_refused(what, command, saved, tmp_path, own_modules):
    model, marker = copied(saved, tmp_path)
    for file in ("pipeline.py", "custom.py", "unet/custom.py", "unet/diffusers.py"):
        if file != "unet/diffusers.py" or what == "library beside it":
            plant_code(model / file, marker)
    changes = {
        "pipeline": {"_class_name": ["custom", "Custom"]},
        "community pipeline": {"_class_name": ["lpw_stable_diffusion", "Custom"]},
        "component": {"unet": ["custom", "UNet2DConditionModel"]},
        "library beside it": {},
    }
    write_index(model, **changes[what])
    with pytest.raises(REFUSED, match=r"code of its own \(.*add --trust_remote_code true.*diffusers' own classes"):
        command(model, tmp_path)
    assert not marker.exists()


@table("trust", ["false", "true"])
@table("component", [["os", "system"], ["subprocess", "Popen"], ["builtins", "eval"], ["ldm", "cli"], ["custom", "A"]])
def test_s02_components_of_other_libraries_are_refused_trusted_or_not(component, trust, saved, tmp_path):
    model, _ = copied(saved, tmp_path)
    write_index(model, unet=component)
    with pytest.raises(REFUSED, match="neither of diffusers nor of transformers"):
        sample(model, tmp_path, "--trust_remote_code", trust)


@table(
    "changes",
    [
        {"../vae": ["diffusers", "AutoencoderKL"]},
        {"/etc": ["diffusers", "AutoencoderKL"]},
        {"unet": ["../diffusers", "UNet2DConditionModel"]},
        {"unet": ["diffusers.utils", "../x"]},
        {"unet": ["diffusers"]},
        {"unet": ["diffusers", None]},
    ],
)
def test_s05_components_that_are_no_folders_of_the_model_are_refused(changes, saved, tmp_path):
    model, _ = copied(saved, tmp_path)
    write_index(model, **changes)
    with pytest.raises(REFUSED, match="expected a folder, its library and its class"):
        sample(model, tmp_path)


def test_s02_code_is_run_when_it_is_trusted_and_only_then(model, marker, tmp_path, own_modules):
    text = (model / "pipeline.py").read_text()
    plant_code(model / "pipeline.py", marker)
    (model / "pipeline.py").write_text(text + (model / "pipeline.py").read_text())
    sample(model, tmp_path)
    assert not marker.exists()
    sample(model, tmp_path, "--trust_remote_code", "true")
    assert marker.exists()


@table("file", ["text_encoder/config.json", "tokenizer/tokenizer_config.json"])
def test_s02_a_text_encoder_with_code_of_its_own_is_refused_and_nobody_is_asked(file, saved, tmp_path, monkeypatch):
    model, marker = copied(saved, tmp_path)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked at the terminal"))
    own = {"AutoConfig": "custom.Custom", "AutoTokenizer": ["custom.Custom", None], "AutoModel": "custom.Custom"}
    for part in ("text_encoder", "tokenizer"):
        plant_code(model / part / "custom.py", marker)
    path = model / file
    config = json.loads(path.read_text()) | {"auto_map": own}
    config |= {"tokenizer_class": "Custom"} if "tokenizer" in file else {"model_type": "custom"}
    path.write_text(json.dumps(config))
    said = re.escape(f"conditioners.text.pretrained: {model} comes with code of its own, which is never run")
    with pytest.raises(ValueError, match=said):
        load_text_encoder(str(model), LENGTH)
    assert not marker.exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        hub.serve(monkeypatch, tmp_path)
        yield hub


def upload(folder, name):
    HfApi().create_repo(name, exist_ok=True)
    for file in folder.rglob("*"):
        if file.is_file():
            HfApi().upload_file(path_or_fileobj=file, path_in_repo=file.relative_to(folder).as_posix(), repo_id=name)


def downloads(hub):
    return [request for request in hub.requests if "/resolve/" in request]


def revisions(hub, name):
    """The revisions that were asked for, of files and of the repository."""
    assert f"GET /api/models/{name}" not in hub.requests, "it was asked for the newest"
    return set(re.findall(f"/{name}/(?:resolve|revision)/([^/\n]+)", "\n".join(hub.requests)))


@pytest.mark.parametrize("what", ["pipeline", "component"])
def test_s02_of_a_hub_model_with_code_nothing_but_the_index_is_fetched(what, hub, model, tmp_path, marker):
    changes = {"_class_name": ["custom", "Custom"]} if what == "pipeline" else {"unet": ["custom", "Custom"]}
    write_index(model, **changes)
    plant_code(model / "unet" / "custom.py", marker)
    upload(model, "me/evil")
    with pytest.raises(REFUSED, match="add --trust_remote_code true"):
        sample("me/evil", tmp_path)
    assert {request.split("/resolve/")[1] for request in downloads(hub)} == {"main/model_index.json"}
    assert not marker.exists()


def test_s02_a_hub_model_is_fetched_at_the_revision_that_is_asked_for(hub, model, tmp_path):
    upload(model / "vae", "me/vae")
    upload(model.parent / "vision", "me/vision")
    build_network({"pretrained": "me/vae@v1.2"}, "space.autoencoder")
    build_network({"pretrained": "me/vae", "revision": "v1.2"}, "space.autoencoder")
    load_image_encoder("me/vision@v1.2", "image")
    for part in ("text_encoder", "tokenizer"):
        upload(model / part, "me/text")
    load_text_encoder("me/text@v1.2", LENGTH)
    for name in ("me/vae", "me/vision", "me/text"):
        assert {"v1.2"} <= revisions(hub, name) <= {"v1.2", hub.repositories[name].sha}
    with pytest.raises(ValueError, match=r"denoiser\.revision: given twice"):
        build_network({"pretrained": "me/vae@a", "revision": "b"}, "denoiser")
    hub.requests.clear()
    upload(model, "me/model")
    sample("me/model@v1.2", tmp_path)
    commit = hub.repositories["me/model"].sha
    assert revisions(hub, "me/model") == {"v1.2", commit}
    assert "GET /api/models/me/model/revision/v1.2" not in hub.requests, "a branch may move after it was looked at"
    assert [request for request in downloads(hub) if "/v1.2/" in request][-1].endswith("model_index.json")


def test_s02_a_data_set_is_fetched_at_the_revision_that_is_asked_for(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options["revision"]))
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises((ConnectionError, ValueError)):
        build_source(DataConfig(source="dataset", path="me/birds@v1.2"))
    assert asked == [("me/birds", "v1.2")]


def test_s02_revisions_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "a@b").mkdir(parents=True)
    assert pinned("me/model@refs/pr/1") == ("me/model", {"revision": "refs/pr/1"})
    for name in ("me/model", "me/a@b", "/data/a@b", "../a@b", "out/a/b@c", "package:a/b@c"):
        assert pinned(name) == (name, {}), name
    with pytest.raises(ValueError, match="must follow the @"):
        pinned("me/model@")


# ---- S3 and S8: a training, a push and an image, watched ----

WATCHED = """
import json, os, platform, socket, sys
tried, phase = [], "import"

def local(host):
    return host in ("127.0.0.1", "localhost", "::1")

def watch(name, host_of):
    real = getattr(socket.socket if name in ("connect", "connect_ex", "sendto") else socket, name)
    def watched(*arguments, **named):
        host = host_of(arguments)
        tried.append([phase, name, str(host)])
        if not local(host):
            raise OSError("there is no network")
        return real(*arguments, **named)
    setattr(socket.socket if name in ("connect", "connect_ex", "sendto") else socket, name, watched)

for name in ("connect", "connect_ex"):
    watch(name, lambda a: a[1][0] if isinstance(a[1], tuple) else "localhost")
watch("sendto", lambda a: a[-1][0])
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    watch(name, lambda a: a[0])
socket.gethostname = socket.getfqdn = platform.node = lambda *_: "host-of-someone"
import train_vae, train_text2img
import ldm.commands.cli
from huggingface_hub import constants
torch = sys.modules["torch"]
for phase, words in json.loads(sys.argv[1]).items():
    main = {"train_vae": train_vae, "train_text2img": train_text2img}.get(phase, ldm.commands.cli).main
    sys.argv = ["ldm", *words]
    main()
json.dump({"tried": tried, "telemetry": not constants.HF_HUB_DISABLE_TELEMETRY}, open(os.environ["REPORT"], "w"))
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory, saved, images):
    """A user's session in a process of its own: an autoencoder, a stage that is pushed, an image."""
    machine = tmp_path_factory.mktemp("machine")
    home, work = machine / "home" / "zaphod-beeblebrox", machine / "working-folder"
    home.mkdir(parents=True)
    work.mkdir()
    (machine / "link").symlink_to(work)
    own = ["--config", str(ROOT / "configs/tiny/text2img.yaml"), "--space.autoencoder", str(work / "out/vae/model")]
    own += ["--conditioners.text.pretrained", str(saved), "--conditioners.text.encoder", "{}"]
    own += ["--conditioners.text.max_length", str(LENGTH), "--denoiser.cross_attention_dim", str(WIDTH)]
    own += ["--validation.num_inference_steps", "2", "--push_to_hub", "me/model", "--push_every_steps", "1"]
    both = [*tiny(images, 2), "--loop.trackers", json.dumps(installed_trackers())]
    prompt = "../../../" + str(machine / "a") + " cat" * 40
    session = {
        "train_vae": ["--config", str(ROOT / "configs/tiny/vae.yaml"), "--output_dir", str(work / "out/vae"), *both],
        "train_text2img": [*own, "--output_dir", str(machine / "link/out/stage"), *both],
        "sample": ["sample", prompt, "--model", str(work / "out/stage/model"), "--out", "out/images"],
    }
    session["sample"] += ["--num_inference_steps", "2"]
    with FakeHub() as hub:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DO_NOT_TRACK"))}
        environ |= {"HOME": str(home), "USER": home.name, "LOGNAME": home.name, "HF_HOME": str(home / "hf")}
        environ |= {"HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "WANDB_MODE": "offline"}
        environ |= {"LDM_CACHE": str(machine / "cache"), "REPORT": str(machine / "report.json")}
        environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, json.dumps(session)],
            cwd=work, env=environ, capture_output=True, timeout=280,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads((machine / "report.json").read_text())
    return {"machine": machine, "home": home, "work": work, "hub": hub, "done": done, **report}


def installed_trackers():
    from accelerate.tracking import get_available_trackers

    return [str(name) for name in get_available_trackers() if str(name) in ("tensorboard", "wandb", "trackio")]


def written(watched):
    """Every byte that was written or sent, by where it was found: names of files too, and texts of images."""
    found = {}
    for folder in (watched["work"], watched["machine"] / "cache"):
        for path in folder.rglob("*"):
            place = path.relative_to(watched["machine"]).as_posix()
            found[f"name of {place}"] = place.encode()
            if path.is_file():
                found[place] = path.read_bytes()
            if path.suffix == ".png":
                found[f"texts of {place}"] = json.dumps(Image.open(path).text).encode()
    for name, repository in watched["hub"].repositories.items():
        for number, (message, files) in enumerate(repository.commits):
            found |= {f"{name} {number} {file}": file.encode() + content for file, content in files.items()}
            found[f"{name} {number}"] = message.encode()
    found |= {f"object {name}": content for name, content in watched["hub"].objects.items()}
    found |= {f"request {number}": content for number, content in enumerate(watched["hub"].received)}
    return found


@pytest.mark.slow
def test_s03_no_byte_that_is_written_or_sent_tells_of_token_user_host_or_folders(watched):
    found = written(watched)
    assert {"working-folder/out/vae/config.yaml", "me/model 0 README.md"} <= found.keys()
    assert any("tfevents" in place and "localhost" in place for place in found)
    (drawn,) = [place for place in found if place.startswith("working-folder/out/images/")]
    secrets = [TOKEN, watched["home"].name, "host-of-someone", str(ROOT), str(watched["machine"]), "/tmp/"]  # noqa: S108
    secrets += [watched["work"].name, "/home/"]
    told = [
        (place, secret)
        for place, content in found.items()
        for secret in secrets
        if secret.encode() in content
        and not (place.startswith("name of ") and secret == watched["work"].name)
        and drawn not in place  # the prompt is the user's, and names a folder here
    ]
    assert told == []
    assert TOKEN.encode() not in found[drawn]


@pytest.mark.slow
def test_s03_the_token_is_not_on_the_screen(watched):
    assert TOKEN.encode() not in watched["done"].stdout + watched["done"].stderr


@pytest.mark.slow
def test_s05_what_is_drawn_and_trained_is_written_below_the_folders_that_were_asked_for(watched):
    machine = watched["machine"]
    assert {path.name for path in machine.iterdir()} == {
        "home", "working-folder", "link", "cache", "report.json",
    }  # fmt: skip
    assert {path.name for path in watched["work"].iterdir()} == {"out"}
    assert {path.name for path in (watched["work"] / "out").iterdir()} == {"vae", "stage", "images"}
    (drawn,) = (watched["work"] / "out" / "images").iterdir()
    assert len(drawn.stem.removesuffix("-0")) <= 80
    assert {path.name for path in watched["home"].iterdir()} <= {"hf", ".cache", ".config", ".triton"}


@pytest.mark.slow
def test_s08_a_run_makes_no_connection_but_its_push(watched):
    elsewhere = [attempt for attempt in watched["tried"] if attempt[2] not in ("127.0.0.1", "localhost", "::1")]
    assert elsewhere == []
    assert {phase for phase, *_ in watched["tried"]} <= {"train_text2img"}, "only a push needs a network"
    assert any(phase == "train_text2img" for phase, *_ in watched["tried"]), "the watch sees connections"


@pytest.mark.slow
def test_s08_nothing_is_reported_to_those_who_made_the_libraries(watched):
    assert not watched["telemetry"]
    known = (
        "/api/whoami",
        "/api/repos/create",
        "/api/models/me/model",
        "/api/validate-yaml",
        "/lfs/",
        "/me/model.git/",
    )
    assert [line for line in watched["hub"].requests if not line.split()[1].startswith(known)] == []


# ---- S4: paths ----


def test_s04_names_stay_and_paths_tell_nothing_of_the_machine(tmp_path, monkeypatch):
    home, work = tmp_path / "home" / "alice", tmp_path / "work"
    for folder in (home, work / "me" / "model", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "link")
    kept = ["stabilityai/sd-vae", "me/model", "me/model@refs/pr/1", "openmoji", "package:rinna/a/../b", "white", ""]
    kept += ["configs/openmoji/heldout.txt", "out/tiny/vae", "./out", "a/../b", ".", "CC BY 4.0 / MIT", "out\\vae"]
    kept += ["https://creativecommons.org/licenses/by/4.0/", "hf://datasets/me/birds/a.parquet", 3, None, 1.5, True]
    assert portable(kept) == kept
    paths = {
        f"{work}/out/vae": "out/vae",
        f"{tmp_path}/link/out/vae": "out/vae",
        f"{work}/../work/out": "out",
        f"file://{work}/out": "out",
        str(work): ".",
        f"{tmp_path}/elsewhere/vae": "vae",
        f"{work}elsewhere/vae": "vae",
        f"file://{tmp_path}/elsewhere/vae": "vae",
        "/home/alice/vae/": "vae",
        "~/birds/vae": "vae",
        "~bob/vae": "vae",
        "../alice/vae": "vae",
        "out/../../alice/vae": "vae",
        "..\\alice\\vae": "vae",
        "C:\\Users\\alice\\vae": "vae",
        "C:/Users/alice/vae": "vae",
        "\\\\server\\share\\vae": "vae",
        "\\Users\\alice\\vae": "vae",
        "https://alice:secret@host.org/a.parquet?token=secret#x": "https://host.org/a.parquet",
        **dict.fromkeys(["/", "..", "../..", "~", "~/", "~bob", str(home), "/home/bob", "C:\\Users\\bob", "C:\\"], "."),
        "/a\0b": "a\0b",
    }
    for path, expected in paths.items():
        assert portable({"a": [{"b": (path,)}]}) == {"a": [{"b": [expected]}]}, path
        assert portable(expected) == expected


def test_s04_a_saved_config_loads_and_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--config", str(ROOT / "configs/tiny/text2img.yaml"), "--output_dir", str(tmp_path / "out")]
    words += ["--data.source", "imagefolder", "--data.path", "/home/alice/birds", "--denoiser.pretrained", "~/unet"]
    words += ["--data.held_out", "{test: ../alice/list.txt, validation: configs/openmoji/heldout.txt}"]
    save_config(load_config(StageConfig, words), tmp_path / "saved.yaml")
    text = (tmp_path / "saved.yaml").read_text()
    assert not [secret for secret in ("alice", "/home", "~", str(tmp_path)) if secret in text]
    again = load_config(StageConfig, ["--config", str(tmp_path / "saved.yaml")])
    assert (again.output_dir, again.data.path, again.denoiser["pretrained"]) == ("out", "birds", "unet")
    assert again.data.held_out == {"test": "list.txt", "validation": "configs/openmoji/heldout.txt"}


def test_s04_data_of_the_hub_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "birds").mkdir(parents=True)
    assert [on_hub(name) for name in ("alice/birds", "birds", "alice/birds@v1")] == [True] * 3
    paths = ("me/birds", "/a/b", "./a", "../a", "~/a", "a/b/c", "a\\b", "package:a/b", "", "~")
    assert [name for name in paths if on_hub(name)] == []


# ---- S5: paths that lead out ----


@pytest.fixture
def opened(monkeypatch):
    """The real paths of the image files that were opened."""
    paths, real = [], Image.open

    def watched_open(file, *arguments, **named):
        paths.append(os.path.realpath(file) if isinstance(file, str) else file)
        return real(file, *arguments, **named)

    monkeypatch.setattr(headers.Image, "open", watched_open)
    return paths


def test_s05_metadata_and_links_cannot_lead_out_of_the_folder(tmp_path, opened):
    folder, secret = tmp_path / "data", tmp_path / "secret"
    folder.mkdir()
    secret.mkdir()
    rows = write_folder(folder, 3, suffixes=("png",))
    noise_image(np.random.default_rng(9)).save(secret / "x.png")
    (folder / "file.png").symlink_to(secret / "x.png")
    (folder / "folder").symlink_to(secret)
    bad = ["../secret/x.png", str(secret / "x.png"), "/etc/passwd", "file.png", "folder/x.png", "a/../../secret/x.png"]
    write_metadata(folder, [*rows, *({"file_name": name, "text": "a secret"} for name in bad)])
    chosen = DataConfig(source="imagefolder", path=str(folder), held_out_percent=0.0)
    with pytest.raises(ValueError, match="6 problem") as refused:
        checked_source(chosen)
    assert str(refused.value).count("outside: ") == 6
    assert opened
    assert [path for path in opened if not path.startswith(str(folder.resolve()))] == []


def test_s05_metadata_that_are_a_link_out_of_the_folder_are_not_read(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_folder(folder, 3, suffixes=("png",))
    shutil.move(folder / "metadata.jsonl", tmp_path / "elsewhere.jsonl")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(ValueError, match=r"outside: metadata\.jsonl: the path leads out of the folder"):
        build_source(DataConfig(source="imagefolder", path=str(folder)))


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_s05_rows_of_a_table_cannot_name_files_elsewhere(kind, tmp_path, opened, monkeypatch):
    folder, secret = tmp_path / "data", tmp_path / "secret.png"
    folder.mkdir()
    noise_image(np.random.default_rng(9)).save(secret)
    (folder / "link.png").symlink_to(secret)
    noise_image(np.random.default_rng(9)).save(folder / "inside.png")
    binary, string = datasets.Value("binary"), datasets.Value("string")
    image = datasets.Image() if kind == "hub" else {"bytes": binary, "path": string}  # else saving takes the files in
    features = datasets.Features({"image": image, "text": string})
    names = [str(secret), f"{folder}/../secret.png", str(folder / "link.png"), str(folder / "inside.png")]
    rows = {"image": [{"bytes": None, "path": name} for name in names], "text": ["a"] * len(names)}
    table = datasets.Dataset.from_dict(rows, features=features)
    if kind == "hub":
        monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder)
        monkeypatch.setattr(datasets_config, "DOWNLOADED_DATASETS_PATH", folder / "downloads")
        source = RowSource(TableRows(table, None, None, root=None))
    elif kind == "saved":
        table.save_to_disk(folder)
        source = build_source(DataConfig(source="dataset", path=str(folder)))
    else:
        table.to_parquet(folder / "table.parquet")
        source = build_source(DataConfig(source="parquet", path=str(folder)))
    for row in range(len(names) - 1):
        with pytest.raises(ImageError, match="leads out of the folder"):
            source.image(row)
    assert opened == []
    assert source.image(len(names) - 1).size == (64, 64)


@table(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("/etc/passwd", "etc-passwd"),
        ("..", "1fec01955feb"),
        ("", "image"),
        (".hidden", "hidden"),
        ("a\0b\nc", "a-b-c"),
        ("C:\\x", "c-x"),
        ("日本", "日本"),
        ("Zwölf \uff21\uff22/", "zwölf-\uff41\uff42"),
        ("Zwo\u0308lf \u202egnp.exe\u202c", "zwölf-gnp-exe"),  # composed; and read from left to right
        ("हिन्दी ไก่", "हिन्दी-ไก่"),
        ("nul.txt", "nul-txt"),
        ("👩🏽\u200d🚀 3.5", "👩🏽-🚀-3-5"),
        ("x" * 300, "x" * 80),
        ("猫" * 300, "猫" * 66),
    ],
)
def test_s05_prompts_become_plain_file_names(prompt, name):
    assert slug(prompt) == name


@table("name", ["../../secret.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", ".hidden"])
def test_s05_a_manifest_that_names_other_files_is_refused_and_they_are_not_read(name, tmp_path, monkeypatch):
    step = CheckpointStore(tmp_path / "run" / "checkpoints", 2).save(1, {"a": {"w": torch.ones(2)}}, {})
    content = json.loads((step / "manifest.json").read_text())
    del content["sha256"]
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((step / "a.safetensors").read_bytes())
    content["files"][name] = content["files"].pop("a.safetensors")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (step / "manifest.json").write_text(json.dumps({**content, "sha256": digest}))
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path.name), real(path))[1])
    for refused in (lambda: read_manifest(step), lambda: CheckpointStore.load(step)):
        with pytest.raises(CheckpointError, match="which is no file of its folder"):
            refused()
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 2).latest() is None
    assert set(read) == {"manifest.json"}
