"""Wrong configs, wrong arguments and odd captions, and what must hold of each: `tests.test_fuzz`, `benchmarks.fuzz`.

A check takes what a strategy drew and raises AssertionError, or lets an exception through, where the contract is
broken: whatever is wrong is refused by an error of our own that names it, and what is not refused works.
"""

import copy
import csv
import inspect as inspect_module
import io
import json
import math
import os
import re
import shutil
import sys
import traceback
import unicodedata
from contextlib import chdir, nullcontext
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import datasets
import diffusers
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin
from safetensors.torch import load_file, save_file

from ldm.commands import cli
from ldm.commands import sample as sample_module
from ldm.commands.sample import sample, slug
from ldm.conditioners.text import TextConditioner
from ldm.config import AutoencoderConfig, ClipConfig, DataOptions, StageConfig, SystemConfig
from ldm.config.file import load_config, save_config
from ldm.config.places import pretrained_place
from ldm.data.batches import CaptionedImages
from ldm.data.inspection import inspect
from ldm.data.preflight import caption_fault, checked_source
from ldm.data.rows import CAPTION_COLUMNS, IMAGE_COLUMNS, texts
from ldm.data.sources import OWN, build_source, source_config
from ldm.errors import ConfigError
from ldm.evaluation.images import contact_sheet
from ldm.evaluation.leaks import refuse_leaks
from ldm.evaluation.samples import SAMPLES
from ldm.export import kinds
from ldm.models import network
from ldm.models.network import AUTOENCODERS, build_network, set_attention_and_memory
from ldm.models.provenance import Provenance
from ldm.models.text_encoder import train_tokenizer
from ldm.recipes import autoencoder as autoencoder_recipe
from ldm.recipes import diffusion as diffusion_recipe
from ldm.stage import build_stage, pretrained_parts
from ldm.training.autoencoding import rehearse_saving
from ldm.training.optim import build_optimizer, learning_rate, lookup_tables
from ldm.training.progress import planned_steps
from ldm.training.record import run_record
from ldm.training.rehearsal import first_batch, rehearse
from ldm.training.run import refuse_missing_trackers
from ldm.training.steps import AutoencoderStep, DiffusionStep
from ldm.training.validation import Validation
from pipelines import PIPELINES, inputs

from . import tiny_pipeline
from .image_folders import encoded, noise_image, write_metadata
from .tiny_evaluation import write_place
from .tiny_stages import CLASSES, PIXELS, save_parts, stages

ROOT = Path(__file__).parents[1]
KINDS = {"autoencoder": AutoencoderConfig, "clip": ClipConfig, "stages": SystemConfig, "denoiser": StageConfig}
CONFIGS = sorted((ROOT / "configs").glob("*/*.yaml"))
SECRET = "hunter2-do-not-print"
CAPTIONS = ("men with bunny ears", "woman astronaut medium-dark skin tone", "keycap 3")
MEMORY = 2**26
"""Bytes that networks may take here: larger ones are refused as on a machine that small."""
SIZE = 64
"""Pixels, tokens, frames beyond which a config that was taken is not tried out."""

# ---- junk ----

EDGES = (
    0,
    -1,
    1,
    2,
    3,
    5,
    7,
    33,
    200,
    10**9,
    2**31,
    2**63,
    10**30,
    -(2**63),
    True,
    False,
    0.5,
    -0.5,
    2.0,
    1e-300,
    1e308,
)
NOT_FINITE = (math.nan, math.inf, -math.inf)
ODD_TEXTS = ("", " ", "no", "null", "whyte", "../..", "a\0b", "\ud800", "1e-4", "[0.1", "{a: 1", "cuda:7", "x" * 300)
numbers = st.sampled_from(EDGES) | st.sampled_from(NOT_FINITE) | st.integers() | st.floats()
odd_texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
scalars = st.none() | numbers | odd_texts
lists = st.lists(scalars, max_size=4)
few = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, -1, 7, 2.5, 10**9]) | scalars, min_size=2, max_size=2)
junk = scalars | lists | st.lists(lists, max_size=2) | st.dictionaries(odd_texts, scalars | lists, max_size=3)


def path_of(error):
    """The file in which an exception was raised."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


def is_ours(error):
    """Whether an exception was raised by this project and not by what it is built on."""
    file = path_of(error)
    return file.is_relative_to(ROOT / "ldm") or file.is_relative_to(ROOT / "pipelines")


def names_path(message, path):
    """Whether a message names a dotted path, or a part that the path is in."""
    parts = path.split(".")
    ancestors = [".".join(parts[: count + 1]) for count in range(len(parts))]
    printed = [one.encode("utf-8", "backslashreplace").decode() for one in ancestors]
    return any(re.search(rf"(?<![\w.]){re.escape(one)}(?!\w)", message) for one in {*ancestors, *printed} if one)


# ---- configs ----


class Shades:
    """Captioned images, one of them transparent, or clips, that no file holds."""

    names = origins = subjects = wholes = None

    def __init__(self, num_frames=None):
        self.num_frames, self.fingerprint = num_frames, f"shades {num_frames}"

    def __len__(self):
        return 40

    def image(self, index):
        image = noise_image(np.random.default_rng(index), 16)
        if index == 0:
            image.putalpha(128)
        return image

    def item(self, index):
        return [self.image(index)] * (self.num_frames or 1)

    def frame(self, index, number):
        return self.item(index)[number]

    def captions(self, index):
        return (CAPTIONS[index % 3],)

    all_captions = captions

    def class_label(self, index):
        return index % CLASSES


class OneProcess:
    """What a `Run` is to the parts that it trains, without its folder, trackers and accelerator."""

    device, is_main = torch.device("cpu"), True

    def __init__(self, config):
        self.seed, self.config = config.seed, config.loop
        self.accelerator = SimpleNamespace(
            mixed_precision="no", no_sync=lambda _: nullcontext(), reduce=lambda tensor, reduction: tensor
        )

    def prepare(self, module):
        return module

    def switch(self, part):
        loop = self.config
        set_attention_and_memory(part, gradient_checkpointing=loop.gradient_checkpointing, xformers=loop.xformers)

    def attention(self):
        return nullcontext()


class Bench:
    """A folder to work in, the configs that are broken, the pipeline that is called."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.parts = self.folder / "parts"
        save_parts(self.parts)
        self.trees = {f"{file.parent.name}/{file.stem}": _whole(yaml.safe_load(file.read_text())) for file in CONFIGS}
        self.small = {"tiny vae": _whole(_small_autoencoder(yaml.safe_load(CONFIGS[-1].read_text())))}
        for name, tree in stages(self.parts).items():
            common = {
                "output_dir": "out",
                "data": tree.get("data", {}) | {"image_size": PIXELS, "batch_size": 4, "held_out_percent": 20.0},
                "loop": {"max_train_steps": 50},
            }
            self.small[name] = _whole({**copy.deepcopy(tree), **common, "validation": {"num_inference_steps": 3}})
        self.pipeline = tiny_pipeline.pipeline()
        self.usual = tiny_pipeline.arrays(self.pipeline, steps=2)
        self.tokenizer = train_tokenizer(CAPTIONS, 560, 12)
        self.files = odd_files()
        self.images = self.folder / "images"
        self.images.mkdir()
        for number in range(4):
            noise_image(np.random.default_rng(number), 16).save(self.images / f"{number}.png")

    def odd_folder(self, more=()):
        """A folder with three images, some of them also elsewhere in it, and no metadata."""
        folder = self.folder / "odd"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("0.png", "1.png", "2.png", *more):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.images / Path(name).name, folder / name)
        return folder

    def write_place(self):
        """Write what commands work on, once: models, data to measure them on, a training to average."""
        folder = self.folder / "lines" / "place"
        if not folder.exists():
            folder.mkdir(parents=True)
            (self.folder / "home").mkdir()
            write_place(folder)
            for file in ("heldout.txt", "validation.txt"):
                (folder / file).write_text("\n".join((folder / file).read_text().splitlines()[:3]))
            run = self.folder / "lines" / "run"
            shutil.copytree(folder / "stock", run / "model")
            (run / "model" / "README.md").write_text("---\nlibrary_name: diffusers\n---\n\n# Mine\n")
            Provenance("data", "0" * 32, 1, 40, 1.0, 1.0, "none", {}).save(run / "model")
            (run / "snapshots").mkdir()
            (weights,) = (run / "model" / "unet").glob("*.safetensors")
            tensors = {f"denoiser.{key}": tensor for key, tensor in load_file(weights).items()}
            for step in range(5, 45, 5):
                for length in (0.05, 0.1):
                    about = {"global_step": str(step), "steps_taken": str(step), "sigma_rel": str(length)}
                    save_file(tensors, run / "snapshots" / f"step-{step:07d}-{length}.safetensors", about)


def _options_of(name):
    """The options of a command."""
    function = getattr(cli, name)
    own = inspect_module.signature(function).parameters.keys() - cli.COMMANDS[name].positional.keys()
    return (own - {"options"}) | (DataOptions.__annotations__.keys() if "options" in own else set())


def kind_of(tree):
    return next(kind for part, kind in KINDS.items() if part in tree)


def _small_autoencoder(tree):
    tree["data"] |= {"image_size": PIXELS, "held_out": {}, "held_out_percent": 20.0}
    tree["autoencoder"] |= {"sample_size": PIXELS}
    tree["reconstruction"] |= {"adversarial": "hinge", "discriminator_channels": 8, "discriminator_layers": 1}
    return tree


def _whole(tree):
    """The tree with every field, and every argument of its networks, that it leaves to its default."""
    for key in ("denoiser", "autoencoder"):
        if "_class_name" in tree.get(key, {}):
            tree[key] = _defaults(getattr(diffusers, tree[key]["_class_name"])) | tree[key]
    file = Path(os.environ["LDM_CACHE"]) / "whole.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return json.loads(json.dumps(asdict(load_config(kind_of(tree), ["--config", str(file)]))))


def _defaults(kind):
    """The arguments of a network's class that have a default."""
    arguments = inspect_module.signature(kind.__init__).parameters.values()
    given = {one.name: one.default for one in arguments if one.default is not one.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def paths(tree, above=()):
    """Every path of a tree: leaves and whole parts."""
    for key, value in tree.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def config_cases(trees, overrides=True):
    """Strategy: name of a tree, what is done (replace, misspell, add, delete, override), where, and a value."""
    kinds = [*["replace"] * 7, "misspell", "add", "delete"] + ["override"] * 3 * overrides
    return st.sampled_from(sorted(trees)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.sampled_from(kinds),
            st.sampled_from(sorted(paths(trees[name]))),
            numbers | few | junk,
            st.sampled_from(["q", "_x", " ", "-"]),
        )
    )


def changed(tree, kind, path, value, letters):
    """The changed tree, the path that an error must name, whether a key is unknown, and words for the command line."""
    tree = copy.deepcopy(tree)
    *parents, key = path
    part = tree
    for parent in parents:
        part = part[parent]
    dotted, words, unknown = ".".join(map(str, path)), [], False
    if kind == "replace":
        part[key] = value
    elif kind == "delete":
        del part[key]
    elif kind == "override":
        words = [f"--{dotted}={as_text(value)}"]
    else:
        wrong = f"{key}{letters}"
        if kind == "misspell":
            del part[key]
        part[wrong] = {"token": SECRET} if isinstance(value, dict) else SECRET
        dotted, unknown = ".".join([*map(str, parents), wrong]), True
    return tree, dotted, unknown, words


def as_text(value):
    """A value as it stands on a command line."""
    text = (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...")
    )
    return text.strip()


def check_config(bench, case):
    """A broken config is refused by a `ConfigError` that names the place, or read; a secret is never printed."""
    name, kind, path, value, letters = case
    trees = bench.trees | bench.small
    tree, dotted, unknown, words = changed(trees[name], kind, path, value, letters)
    config = _loaded(bench, trees[name], tree, dotted, words)
    if unknown and not _any_key(path):
        assert "no such field" in config
    return config


def _any_key(path):
    """Whether the path is in a mapping whose keys are not those of a dataclass."""
    above = path[:-1]
    networks = above[:3] == ("conditioners", "text", "encoder"), above[:2] in (("clip", "text"), ("clip", "vision"))
    return bool({"denoiser", "autoencoder", "held_out", "keywords", "stages"} & {*above}) or any(networks)


def _loaded(bench, whole, tree, dotted, words):
    file = bench.folder / "changed.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    try:
        config = load_config(kind_of(whole), ["--config", str(file), *words])
    except ConfigError as error:
        assert SECRET not in str(error)
        assert names_path(str(error), dotted), f"{dotted} is not named in: {error}"
        return str(error)
    assert is_dataclass(config)
    return config


def check_training(bench, case):
    """What is read of a broken config can be trained with, or is refused by our own error that names the place."""
    name, kind, path, value, letters = case
    config = check_config(bench, case)
    if isinstance(config, str) or _large(config):
        return
    _, dotted, unknown, _ = changed(bench.small[name], kind, path, value, letters)
    try:
        with patch.object(network, "memory_bytes", lambda: MEMORY), torch.random.fork_rng():
            prepare(config, bench, name)
    except Exception as error:
        assert is_ours(error), f"{path_of(error)}: {type(error).__name__}: {error}"
        assert SECRET not in str(error)
        assert names_path(str(error), dotted), f"{dotted} is not named in: {error}"
    else:
        assert not unknown, f"{dotted} was taken"


def _large(config):
    """Whether a sound config needs more time or memory than a check may take."""
    sizes = [config.data.image_size]
    if isinstance(config, StageConfig):
        parts = config.conditioners
        sizes += [parts.text.max_length] if parts.text else []
        sizes += [parts.low_res.image_size] if parts.low_res else []
        sizes += [config.data.num_frames] if config.data.clips else []
        sizes += [parts.label.num_classes // 10**4] if parts.label else []
        sizes += [config.objective.num_train_timesteps // 10**3]
    else:
        sizes += [config.reconstruction.discriminator_channels, 16 * config.reconstruction.discriminator_layers]
    return max(sizes) > SIZE


def prepare(config, bench, name):
    """Do what the entry scripts do before the first step, in their order, on images that no file holds."""
    if config.data.source not in OWN or config.data.languages != ("en",) or config.data.groups:
        build_source(config.data)
    refuse_missing_trackers(config.loop.trackers)
    images = CaptionedImages(Shades(num_frames=config.data.num_frames if config.data.clips else None), config.data)
    assert images.splits["train"]
    run = OneProcess(config)
    if isinstance(config, AutoencoderConfig):
        place = pretrained_place(config.autoencoder)
        refuse_leaks([] if place is None else [place], images)
        autoencoder = build_network(config.autoencoder, "autoencoder", AUTOENCODERS)
        step = AutoencoderStep(autoencoder, config.reconstruction, run, config.optim.ema_decay)
        batch, start = first_batch(images, 2), config.reconstruction.discriminator_start_step
        where = f"{autoencoder_recipe.FIELDS}, data.image_size {config.data.image_size}"
    else:
        refuse_leaks(pretrained_parts(config), images)
        stage = build_stage(config, images.captions("train"), lambda: images.first_images("train", 40))
        step = DiffusionStep(stage, run, config.optim.ema_decay)
        batch, start = first_batch(images, 2), 0
        where = f"{diffusion_recipe.FIELDS}, data.image_size {config.data.image_size}"
    rehearse(step, batch, where, start)
    if isinstance(config, AutoencoderConfig):
        rehearse_saving(step.averaged, batch.pixel_values, where)
    if isinstance(config, StageConfig) and name == "stable diffusion":
        kind = kinds.kind_of(stage, config.space.kind)
        pipeline = kinds.build_pipeline(kind, stage, step.averaged, config, PIPELINES)
        config_ = replace(config, validation=replace(config.validation, loss_images=1))
        samples = SAMPLES[kind.samples](images, stage.space, config.sampled_size)
        Validation(config_, images, step, pipeline, samples, run).rehearse()
    json.dumps(run_record(config, images, step, "no").state())
    save_config(config, bench.folder / "saved.yaml")
    total = planned_steps(config.loop, 10.0)
    learning_rate(0, total or sys.maxsize, config.optim)
    for module in step.modules.values():
        build_optimizer(module.parameters(), config.optim, lookup_tables(module))


def check_text_config(bench, text):
    """Any bytes as a config are read or refused by a `ConfigError`."""
    file = bench.folder / "text.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    for kind in (StageConfig, AutoencoderConfig):
        try:
            load_config(kind, ["--config", str(file)])
        except ConfigError as error:
            assert str(error)


YAML_PIECES = (
    "a",
    "b:",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&x ",
    "*x",
    "!!",
    "!!python/name:os.system",
    "|",
    ">",
    "'",
    '"',
    "\n",
    "\n  ",
    "data: ",
    "seed: ",
    "optim: ",
    "<<: ",
    "? ",
    ",",
    "%",
    "@",
    "\t",
    "\\ud800",
    "0x" + "f" * 5000,
    "1" * 5000,
    "denoiser: ",
    "&a [*a]",
    "output_dir: x\n",
    "[" * 400,
)
text_configs = (
    st.lists(st.sampled_from(YAML_PIECES), max_size=14).map("".join) | st.text(max_size=60) | st.binary(max_size=60)
)

# ---- arguments of a pipeline ----

FLOATS = (0.0, 1.0, -1.0, math.nan, math.inf, 6e4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
shapes = st.sampled_from(
    [
        (),
        (0,),
        (1,),
        (1, 12, 16),
        (2, 12, 16),
        (1, 1, 16),
        (1, 2, 16),
        (1, 0, 16),
        (0, 12, 16),
        (1, 40, 16),
        (1, 12, 8),
        (12, 16),
        (1, 4, 8, 8),
        (2, 4, 8, 8),
        (1, 4, 0, 8),
        (1, 3, 8, 8),
        (1, 4, 8),
    ]
)
tensors = st.builds(
    lambda shape, dtype, value: torch.full(shape, value if dtype.is_floating_point else 1, dtype=dtype),
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(FLOATS),
)
seeds = st.integers(0, 9).map(lambda seed: torch.Generator().manual_seed(seed))
embeds = st.builds(
    lambda count, tokens, dtype: torch.full((count, tokens, tiny_pipeline.WIDTH), 0.5, dtype=dtype),
    st.integers(1, 2),
    st.sampled_from([1, 2, 3, tiny_pipeline.LENGTH, tiny_pipeline.LENGTH + 1, 40]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
images = st.builds(
    Image.new,
    st.sampled_from(["RGB", "RGBA", "L", "1", "P", "PA", "LA", "CMYK", "HSV", "I", "I;16", "F"]),
    st.sampled_from([(16, 16), (1, 1), (5, 40), (0, 5)]),
)
arrays = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.sampled_from(
        [(16, 16), (16, 16, 3), (16, 16, 1), (2, 16, 16, 3), (1, 5, 7, 3), (0, 16, 3), (16, 16, 4), (3,), ()]
    ),
    st.sampled_from([np.float32, np.float64, np.float16, np.uint8, bool, object, "U3"]),
    st.sampled_from([0.0, 1.0, -1.0, 0.25, 200.0]),
)
times = st.sampled_from(
    [None, [], [500, 10], [10, 500], [5, 5], [1000, 1], [math.nan], [math.inf, 1], [-1], "9", 5, ["9"], [None], [True]]
) | st.sampled_from([np.array([9.0, 3.0]), torch.tensor([500, 3]), np.ones((2, 2)), [10**30], [10**5000], (7, 2.5)])
prompts = st.sampled_from(["", "a", "\ud83d", "\0", "x" * 2000, b"cat", 5, None]) | st.text(max_size=8)
sizes = st.sampled_from([0, -8, 1, 2, 3, 16, 18, 33.0, 10**9, 2**40, 10**30, 10**5000, "16", None, True])
anything = junk | tensors | st.builds(np.ones, st.sampled_from([2, (1, 4, 8, 8)])) | st.builds(object)
ARGUMENTS = {
    "prompt": prompts | st.lists(prompts, max_size=3) | st.tuples(prompts),
    "height": sizes,
    "width": sizes,
    "num_inference_steps": st.sampled_from([0, 1, 2, 3, -1, 1001, 10**30, 2.0, "2", None, np.int64(2)]),
    "guidance_scale": numbers | st.sampled_from([10**5000, "3", None, 1j, np.float32(2), np.nan]),
    "negative_prompt": prompts | st.lists(prompts, max_size=3),
    "num_images_per_prompt": st.sampled_from([0, 1, 2, 3, -1, 5000, 10**9, 10**30, 10**5000, 1.0, None, "2"]),
    "generator": seeds | st.lists(seeds | st.none(), max_size=3) | st.integers(),
    "latents": tensors,
    "prompt_embeds": tensors | embeds,
    "negative_prompt_embeds": tensors | embeds,
    "output_type": st.sampled_from(["pil", "np", "pt", "latent", "PIL", "", None, 5, ["pil"]]),
    "return_dict": st.booleans() | st.none(),
    "image": images | tensors | arrays | st.lists(images | arrays | tensors | st.none(), max_size=3),
    "mask_image": images | tensors | arrays | st.lists(images | tensors | arrays, max_size=2),
    "strength": numbers | st.sampled_from([0.5, 1, 1.0, 0.4, True, "1", 1e-300, np.float32(0.5)]),
    "timesteps": times,
    "sigmas": times,
    "eta": numbers | st.sampled_from([0.5, 1, "1", 1j, np.float32(0.5)]),
    "guidance_rescale": numbers | st.sampled_from([0.5, 1, "1", 1j, np.float32(0.5)]),
    "clip_skip": st.sampled_from([0, 1, 2, 3, -1, 10**30, 10**5000, 1.0, "1", None, True]),
    "cross_attention_kwargs": st.sampled_from(
        [None, {}, {"scale": 0.5}, {"scale": "x"}, {"scale": None}, {"unknown": 1}, {5: 1}, 5, []]
    ),
    "callback_on_step_end": st.sampled_from([None, 5, "f", [], lambda *_: {}, lambda *_: None]),
    "callback_on_step_end_tensor_inputs": st.sampled_from(
        [None, "latents", ["latents"], ("prompt_embeds",), [1], [[]], 5]
    ),
}
LARGE_WHERE_ANYTHING = ("num_inference_steps", "num_images_per_prompt", "height", "width")
"""Arguments of which a large value that is right would take long: only the values above."""


def _argument(name):
    rest = ARGUMENTS[name] if name in LARGE_WHERE_ANYTHING else st.one_of(ARGUMENTS[name], ARGUMENTS[name], anything)
    return st.tuples(st.just(name), rest)  # of the argument's own kind in about half of the cases


pipeline_cases = st.one_of(
    st.lists(st.sampled_from(sorted(ARGUMENTS)).flatmap(_argument), min_size=1, max_size=3).map(dict),
    # embeddings, which no prompt may stand beside, with other arguments
    st.tuples(
        st.fixed_dictionaries({"prompt": st.none(), "prompt_embeds": embeds}),
        st.lists(st.sampled_from(sorted(ARGUMENTS)).flatmap(_argument), max_size=2).map(dict),
    ).map(lambda both: both[0] | both[1]),
    # an image, without which there is no mask and no strength
    st.tuples(
        st.fixed_dictionaries({"image": images | tensors}),
        st.lists(st.sampled_from(["mask_image", "strength", *sorted(ARGUMENTS)]).flatmap(_argument), max_size=3).map(
            dict
        ),
    ).map(lambda both: both[0] | both[1]),
)


def check_call(bench, call):
    """A call gives finite images of the right shape, or a ValueError that names an argument; the next is as ever."""
    pipeline = bench.pipeline
    usual = {"prompt": None if torch.is_tensor(call.get("prompt_embeds")) else "a cat", "num_inference_steps": 2}
    arguments = {**usual, "generator": tiny_pipeline.seeds(0)[0], "output_type": "np"} | call
    try:
        found = pipeline(**arguments)
    except (ValueError, TypeError) as error:
        assert is_ours(error), f"{path_of(error)}: {type(error).__name__}: {error}"
        assert len(str(error)) < 600
        named = [name for name in call if re.search(rf"\b{name}(_embeds)?\b", str(error))]
        assert named, f"none of {list(call)} is named in: {error}"
    else:
        images = found.images if arguments.get("return_dict", True) else found[0]
        _check_images(images, arguments)
    assert np.array_equal(tiny_pipeline.arrays(pipeline, steps=2), bench.usual), "the next call gives another image"


def _check_images(images, arguments):
    kind, given = arguments["output_type"], arguments.get("prompt_embeds")
    prompt = arguments["prompt"]
    count = len(given) if given is not None else 1 if isinstance(prompt, str) else len(prompt)
    count *= arguments.get("num_images_per_prompt", 1)
    own = zip(("height", "width"), _own_size(arguments.get("image")), strict=True)
    height, width = (size if arguments.get(side) is None else arguments[side] for side, size in own)
    assert len(images) == count
    if kind == "pil":
        assert all(image.size == (width, height) for image in images)
    else:
        shape = {"np": (height, width, 3), "pt": (3, height, width), "latent": (4, height // 2, width // 2)}[kind]
        assert tuple(images.shape[1:]) == shape
        assert torch.as_tensor(images).isfinite().all()


def _own_size(image):
    """Return height and width of what a call draws if neither is said."""
    if image is None:
        return PIXELS, PIXELS
    first = image[0] if isinstance(image, list | tuple) else image
    if isinstance(first, Image.Image):
        sides = first.size[::-1]
    elif torch.is_tensor(first):
        latents = first.shape[-3] == 4
        sides = [side * 2 if latents else side for side in first.shape[-2:]]
    else:
        sides = first.shape[-3:-1]
    return tuple(side // 2 * 2 for side in sides)


# ---- captions ----

ODD_CAPTIONS = (
    "",
    " ",
    "\0",
    "\ud83d",
    "a\udfff",
    "\u202eright to left\u202c",
    "e\u0301" * 40,
    "\u200d" * 3000,
    "🧑🏽‍🚀👩‍👩‍👧‍👦🏴‍☠️",
    "a\nb\r\nc\u2028d\x85e",
    "<|endoftext|>",
    "<|startoftext|>",
    "</w>",
    "...",
    "-.-",
    "../../etc/passwd",
    "CON",
    "\u3000\u00a0\u2003",
    "ﷺ" * 50,
    "İ" * 90,
    "\ufeff",
    "\uffff",
    "\U0010ffff",
    "null",
    "x" * 100_000,
    "word " * 20_000,
    "\u0300" * 5000,
    "𝖋𝖆𝖓𝖈𝖞",
    "\x1b[31m",
    "\\N{bell}\a",
)
letters = st.characters(exclude_categories=()) | st.sampled_from("\0\ud800\udfff\u200d\u202e\u0301 \n.-_é🐈")
captions = st.sampled_from(ODD_CAPTIONS) | st.text(letters, max_size=40)
caption_values = (
    captions
    | st.lists(captions | st.none(), max_size=3)
    | st.none()
    | st.integers()
    | st.lists(st.integers(), max_size=2)
)
caption_cases = st.tuples(st.lists(caption_values, min_size=1, max_size=4), st.booleans())


def is_text(caption):
    try:
        caption.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_captions(bench, case):
    """Captions that are text go all the way, to tokens, sheets, prompts and files; others are found before training."""
    values, learn = case
    rows = [{"file_name": f"{number}.png", "text": value} for number, value in enumerate(values)]
    write_metadata(bench.images, rows)
    config = source_config(str(bench.images), image_size=PIXELS, held_out_percent=0.0)
    strings = [text for value in values for text in (value if isinstance(value, list) else [value]) if text is not None]
    wrong = [number for number, value in enumerate(values) if caption_fault(value)]
    assert bool(wrong) == any(not isinstance(text, str) or not is_text(text) for text in strings)
    if wrong:
        try:
            checked_source(config)
        except ValueError as error:
            assert all(f"bad caption: {number}.png" in str(error) for number in wrong)
            str(error).encode()
        else:
            raise AssertionError("a caption that is no text was taken")
    _check_report(bench, config, wrong)
    if len(wrong) < len(values):
        source = checked_source(replace(config, on_bad_data="skip"))
        assert len(source) == len(values) - len(wrong)
        read = [caption for row in range(len(source)) for caption in source.captions(row)]
        good = [value for number, value in enumerate(values) if number not in wrong]
        assert read == [caption for value in good for caption in texts(value)]
        assert all(caption == caption.strip() != "" and is_text(caption) for caption in read)
        _check_tokens(bench, read, learn)
    for text in strings:
        if isinstance(text, str):
            _check_prompt(bench, text)


def _check_report(bench, config, wrong):
    report = inspect(
        build_source(config), config, lambda some: [len(one) for one in bench.tokenizer(list(some)).input_ids], 12
    )
    assert any(problem.kind == "bad caption" for problem in report.problems) == bool(wrong)
    json.loads(json.dumps(report.as_json()))
    report.text().encode()


def _check_tokens(bench, read, learn):
    tokenizer = train_tokenizer(read, 560, 12) if learn else bench.tokenizer
    conditioner = TextConditioner(torch.nn.Linear(1, 1), tokenizer, train=False, dropout=0.1)
    with patch.object(TextConditioner, "_reads_mask", False):
        ids = conditioner.tokenize(["", *read])["input_ids"]
    assert ids.shape == (1 + len(read), 12)
    assert 0 <= ids.min() <= ids.max() < len(tokenizer)
    if read:
        sheet = contact_sheet(read, np.zeros((len(read), 8, 8, 3), np.uint8))
        assert sheet.height < 2000 * len(read)


def check_name(name):
    """A part of a file name is one on every file system, and says nothing that cannot be seen."""
    assert 1 <= len(name.encode()) <= 200
    assert name == unicodedata.normalize("NFC", name) == name.lower().strip("-. ")
    assert not set(name) & set('<>:"/\\|?*.')
    kinds = {unicodedata.category(letter)[0] for letter in name}
    assert not kinds & {"C", "Z"}, "control, bidirectional, unassigned, space"


def _check_prompt(bench, text):
    check_name(slug(text))
    if not is_text(text):
        try:
            inputs.texts("prompt", text)
        except ValueError as error:
            assert "not valid Unicode" in str(error)
            str(error).encode()
            return
        raise AssertionError("a lone surrogate was taken as a prompt")
    with patch.object(sample_module, "load_pipeline", lambda *_: bench.pipeline), patch("builtins.print"):
        (path,) = sample([text], "model", str(bench.folder / "out"), negative_prompt=text, num_inference_steps=1)
    assert path.parent == bench.folder / "out"
    with Image.open(path) as image:
        assert image.text["prompt"] == text
        assert image.text["negative_prompt"] == text
    path.unlink()


# ---- ldm sample ----

words = st.sampled_from(
    ["nan", "inf", "-1", "0", "1", "2", "1001", "1e308", "9" * 30, "0x10", "true", "null", "", "[1]", "1.5", "\ud800"]
)
sample_cases = st.tuples(
    captions.filter(lambda text: "\0" not in text),
    st.dictionaries(
        st.sampled_from(
            ["seed", "num_inference_steps", "guidance_scale", "negative_prompt", "trust_remote_code", "sed"]
        ),
        words | st.text(max_size=6),
        max_size=2,
    ),
)


def check_sample(bench, case):
    """`ldm sample` writes one image for a prompt, or exits with a message or jsonargparse's code 2."""
    prompt, options = case
    out = bench.folder / "sampled"
    command = ["sample", "--model", "model", "--out", str(out), "--num_inference_steps=1"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (
        patch.object(sample_module, "load_pipeline", lambda *_: bench.pipeline),
        open(os.devnull, "w", errors="backslashreplace") as sink,
        patch.object(sys, "stdout", sink),
        patch.object(sys, "stderr", sink),
    ):
        try:
            cli.main([*command, "--", prompt])
        except SystemExit as stopped:
            assert stopped.code == 2 or (isinstance(stopped.code, str) and stopped.code)
    for path in out.glob("*"):
        path.unlink()
    assert np.array_equal(tiny_pipeline.arrays(bench.pipeline, steps=2), bench.usual)


# ---- data ----

KEYS = (*IMAGE_COLUMNS, *CAPTION_COLUMNS, "file_name", "image_file_name", "text_file_name", "file_names", "", "a,b")
NAMES = (
    "0.png",
    "1.png",
    "2.png",
    "train/0.png",
    "test/1.png",
    "missing.png",
    "..",
    "/etc/passwd",
    "2.PNG",
    "a\\0.png",
)
keys = st.lists(st.sampled_from(KEYS) | odd_texts, min_size=1, max_size=4, unique=True)
cells = st.sampled_from(NAMES) | st.sampled_from(NAMES) | caption_values | junk
mutations = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), max_size=2)
metadata_cases = st.tuples(
    st.sampled_from(["metadata.jsonl", "metadata.csv", "train/metadata.jsonl", "test/metadata.csv"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    st.sampled_from([True, True, False]),
    st.booleans(),
    keys.flatmap(lambda names: st.lists(st.tuples(*[cells] * len(names)), max_size=4).map(lambda rows: (names, rows))),
    mutations,
)


def mutated(data, changes):
    """The bytes with some of them, at shares of their length, replaced or cut off (no bytes)."""
    for share, new in changes:
        at = int(share * len(data))
        data = data[:at] + new + data[at + len(new) :] if new else data[:at]
    return data


def check_metadata(bench, case):
    """Metadata of any keys, values, encodings and bytes is read alike by validate and train, or refused by both."""
    name, encoding, end, marked, in_splits, (names, rows), changes = case
    names = ["file_name", *names] if marked else names
    rows = [(NAMES[number % 3], *row) if marked else row for number, row in enumerate(rows)]
    if name.endswith(".csv"):
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator=end).writerows([names, *rows])
        text = file.getvalue()
    else:
        text = end.join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in rows)
    folder = bench.odd_folder(("train/0.png", "test/1.png") if in_splits or "/" in name else ())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(mutated(text.encode(encoding, "backslashreplace"), changes))
    check_data(bench, source_config(str(folder), image_size=PIXELS, held_out_percent=20.0))


TYPES = [
    *(("text", kind) for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())),
    ("text", pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
    *(("bytes", kind) for kind in (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view())),
    *(
        ("file", pyarrow.struct({"bytes": kind, "path": pyarrow.string()}))
        for kind in (pyarrow.binary(), pyarrow.null())
    ),
    ("texts", pyarrow.list_(pyarrow.string())),
    ("numbers", pyarrow.int64()),
    ("numbers", pyarrow.date32()),
    ("shares", pyarrow.float32()),
    ("truths", pyarrow.bool_()),
    ("nothing", pyarrow.null()),
    ("lists", pyarrow.list_(pyarrow.uint8())),
    ("maps", pyarrow.map_(pyarrow.string(), pyarrow.string())),
    ("structs", pyarrow.struct({"a": pyarrow.int8()})),
]
"""What a column holds, and how."""
table_cases = st.tuples(
    st.lists(
        st.tuples(st.sampled_from(KEYS) | odd_texts, st.sampled_from(TYPES), st.integers(0, 4)),
        min_size=1,
        max_size=4,
        unique_by=lambda column: column[0],
    ),
    st.sampled_from(["a.parquet", "train/a.parquet", "test.parquet", "saved", "saved with a format"]),
    st.sampled_from([None, "image", "text"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=3)), max_size=1),
)


def check_table(bench, case):
    """Tables of any columns are read alike by validate and train, or refused by both."""
    columns, place, wanted, changes = case
    table = pyarrow.table({_writable(name): _column(bench, *kind, seed) for name, kind, seed in columns})
    folder = bench.odd_folder()
    if place.endswith(".parquet"):
        (folder / place).parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, folder / place)
        (folder / place).write_bytes(mutated((folder / place).read_bytes(), changes))
    else:
        try:
            saved = datasets.Dataset(table).with_format("numpy" if "format" in place else None)
            saved.save_to_disk(folder / "saved")
        except Exception:  # a column that `datasets` does not write, nor the format
            return
        folder = folder / "saved"
    check_data(bench, source_config(str(folder), image_size=PIXELS, held_out_percent=20.0, image_column=wanted))


def _writable(name):
    return name.encode(errors="replace").decode()


def _column(bench, holds, kind, seed):
    """A column of three values, one of them null where `seed` is 3."""
    files = [bench.files[seed % len(bench.files)], bench.files[0], b"no image"]
    names = [NAMES[seed % len(NAMES)], "a text", ""]
    column = {
        "text": names,
        "texts": [[name] for name in names],
        "bytes": files,
        "file": [{"bytes": None if "null" in str(kind) else data, "path": names[0]} for data in files],
        "numbers": [seed, 1, 2],
        "shares": [0.5, 1.0, math.nan],
        "truths": [True, False, True],
        "nothing": [None] * 3,
        "lists": [list(data[:9]) for data in files],
        "maps": [{"a": "b"}] * 3,
        "structs": [{"a": 1}] * 3,
    }[holds]
    column = [None if seed == 3 and row == 1 else value for row, value in enumerate(column)]
    return (
        pyarrow.array(column, pyarrow.int32()).cast(kind)
        if pyarrow.types.is_date(kind)
        else pyarrow.array(column, kind)
    )


file_cases = st.tuples(
    st.integers(0, 11), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=8)), max_size=3)
) | st.tuples(st.integers(0, 11), st.lists(st.tuples(st.floats(0, 0.2), st.binary(min_size=1, max_size=2)), max_size=3))


def check_image_file(bench, case):
    """A file of an image with any bytes changed is read alike by validate and train, or refused by both."""
    number, changes = case
    folder = bench.odd_folder()
    data = mutated(bench.files[number % len(bench.files)], changes)
    (folder / "0.png").write_bytes(data)
    write_metadata(folder, [{"file_name": name, "text": "an image"} for name in ("0.png", "1.png", "2.png")])
    check_data(bench, source_config(str(folder), image_size=PIXELS, held_out_percent=20.0))


def odd_files():
    """Images of every format that is read, with a profile, EXIF, XMP and texts where the format has them."""
    image = noise_image(np.random.default_rng(7), 16)
    exif, texts_ = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6
    texts_.add_text("parameters", "a cat", zip=True)
    texts_.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    more = {"exif": exif, "icc_profile": profile}
    return [
        *(encoded(image, kind, **more) for kind in ("PNG", "JPEG", "WEBP", "TIFF")),
        *(encoded(image, kind) for kind in ("GIF", "BMP")),
        encoded(image, "PNG", pnginfo=texts_),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(image.convert("CMYK"), "JPEG", **more),
        encoded(image.convert("LA"), "PNG", **more),
        encoded(image.convert("RGBA"), "WEBP", lossless=True, **more),
        encoded(image.convert("I;16"), "PNG"),
    ]


def check_data(bench, config):
    """`ldm validate` and a training refuse the same data, with errors of our own, and read the rest alike."""
    try:
        source = build_source(config)
    except (ValueError, OSError) as error:
        _check_refusal(error)
        return
    report = inspect(source, config, lambda some: [1] * len(some), 12)
    json.dumps(report.as_json())
    report.text().encode()
    for skip in (False, True):
        try:
            read = checked_source(replace(config, on_bad_data="skip" if skip else "error"))
            images = CaptionedImages(read, config)
            images.splits.filled("validation")
        except ValueError as error:
            _check_refusal(error)
            assert report.stops, f"validate sees nothing in what a training refuses: {error}"
        else:
            assert skip or not report.stops, f"validate refuses what is trained on: {report.text()}"
            assert skip or len(read) == report.statistics["rows"]
            for row in range(len(read)):
                assert images.pixel_values(row).isfinite().all()
                assert all(is_text(caption) and caption == caption.strip() != "" for caption in read.captions(row))


def _check_refusal(error):
    assert is_ours(error), f"{path_of(error)}: {type(error).__name__}: {error}"
    str(error).encode("utf-8", "backslashreplace")


# ---- the other commands ----

OPTIONS = {name: sorted(_options_of(name)) for name in cli.COMMANDS}
PLACES = (
    *("place/model", "place/stock", "place/pixels", "place/clip", "place/images", "place/heldout.txt", "run"),
    *("place/validation.txt", "place/factors.yaml", "run/model", "nowhere/at/all", "user/name@v1", "openmoji"),
    *("~/x", "~", "$HOME/y", "$NOWHERE", "${", "a*b", "package:ldm/x", "new/folder"),
)
texts_of_lines = (
    words.filter(lambda word: word not in ("1001", "9" * 30))
    | st.sampled_from([*PLACES, "1e30", "2,x", "0.05", "0.05,0.1", "{}", '{"test": "place/heldout.txt"}', "[en, de]"])
    | st.text(st.characters(exclude_characters="\0/"), max_size=6)
)
"""But for those that are right and take long: a thousand steps or processes."""
command_lines = st.sampled_from(sorted(cli.COMMANDS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.sampled_from(PLACES) | texts_of_lines,
        st.dictionaries(st.sampled_from([*OPTIONS[name], "modle"]), texts_of_lines, max_size=3),
    )
)
HELD_OUT = {"data": "place/images", "captions": "place/heldout.txt", "validation_captions": "place/validation.txt"}
USUAL = {
    "validate": {"workers": "0"},
    "sample": {"model": "place/model", "num_inference_steps": "1"},
    "evaluate_clip": HELD_OUT,
    "evaluate": {
        **HELD_OUT,
        **{"network": "place/clip", "num_inference_steps": "1", "variety_prompts": "0", "num_images_per_prompt": "2"},
    },
    "average": {"sigma_rel": "0.05", "network": "place/clip", "num_inference_steps": "1"},
    "join": {"to": "joined"},
    "push": {},
    "cache": {},
}
RIGHT = {
    **{"validate": "place/images", "evaluate": "place/model", "evaluate_clip": "place/clip", "average": "run"},
    "push": "place/model",
}
"""What a command line says unless something else was drawn."""


def check_line(bench, case):
    """A command does what it is told, or exits with a message or jsonargparse's code 2; never with a traceback."""
    name, first, options = case
    positional = [first] if len(first) % 3 else [RIGHT.get(name, first)]
    positional += ["me/model"] if name == "push" else []
    positional = ["UnCLIPPipeline", *positional] if name == "join" else positional
    positional = [] if name == "cache" else positional
    line = [f"--{option}={text}" for option, text in {**USUAL[name], **options}.items()]
    bench.write_place()
    with (
        chdir(bench.folder / "lines"),
        patch.dict(os.environ, {"HOME": str(bench.folder / "home"), "LDM_CACHE": str(bench.folder / "cache")}),
        open(os.devnull, "w", errors="backslashreplace") as sink,
        patch.object(sys, "stdout", sink),
        patch.object(sys, "stderr", sink),
    ):
        try:
            cli.main([name, *line, "--", *positional])
        except SystemExit as stopped:
            assert stopped.code in (0, 1, 2) or (isinstance(stopped.code, str) and stopped.code)
        for folder in Path("run").glob("model-*"):
            shutil.rmtree(folder)


AREAS = {
    "config files": (text_configs, check_text_config),
    "configs": (lambda bench: config_cases(bench.trees), check_config),
    "trainings": (lambda bench: config_cases(bench.small, overrides=False), check_training),
    "pipeline arguments": (pipeline_cases, check_call),
    "captions": (caption_cases, check_captions),
    "ldm sample": (sample_cases, check_sample),
    "metadata": (metadata_cases, check_metadata),
    "tables": (table_cases, check_table),
    "image files": (file_cases, check_image_file),
    "command lines": (command_lines, check_line),
}
"""Strategy, or what makes it for a `Bench`, and check of each area."""


def area(name, bench):
    """The strategy and the check, for what was drawn, of an area."""
    strategy, check = AREAS[name]
    return strategy(bench) if callable(strategy) else strategy, lambda case: check(bench, case)
