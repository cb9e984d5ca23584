"""A saved text-to-image folder: stock to plain diffusers, ours on request, with this project absent."""

import json
import multiprocessing
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from ldm.models.pipeline import image_size, load_pipeline, starting_from
from pipelines.text2img import TextToImagePipeline
from tests import tiny_pipeline
from tests.tiny_pipeline import FLOW, PIXELS, arrays, pipeline, unet


class Absent:
    """An import hook that makes this project one that is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ldm", "pipelines", "tests"):
            raise ModuleNotFoundError(name)


def be_without_this_project():
    """Forget this project, and what other tests have loaded, in a forked process."""
    torch.set_num_threads(1)  # threads do not survive a fork
    gone = ("ldm", "pipelines", "tests", "diffusers_modules")  # the last: other tests' folders have a pipeline.py too
    for name in [name for name in sys.modules if name.split(".")[0] in gone]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent())
    os.chdir("/")


def be_a_stranger(first, second):
    """Load, save and load again where this project cannot be imported; run in a forked process."""
    be_without_this_project()
    cache = first.parent / "modules"
    dynamic_modules_utils.HF_MODULES_CACHE = str(cache)
    warnings.simplefilter("error", FutureWarning)
    stock = DiffusionPipeline.from_pretrained(first)
    assert type(stock) is StableDiffusionPipeline
    ours = DiffusionPipeline.from_pretrained(first, custom_pipeline=str(first), trust_remote_code=True)
    assert type(ours).__module__ == "diffusers_modules.local.pipeline"
    (written,) = cache.rglob("pipeline.py")
    written.write_text("another pipeline was loaded")
    ours.save_pretrained(second)
    again = DiffusionPipeline.from_pretrained(second, custom_pipeline="pipeline", trust_remote_code=True)
    assert type(again).__name__ == type(ours).__name__ == "TextToImagePipeline"
    for pipe in (stock, ours, again):
        pipe.set_progress_bar_config(disable=True)
    expected = arrays(stock)
    np.testing.assert_allclose(arrays(ours), expected, atol=1e-5)
    np.testing.assert_allclose(arrays(again), expected, atol=1e-5)
    np.save(second / "expected.npy", expected)
    assert "pipelines" not in sys.modules


def test_folder_loads_as_the_stock_pipeline_and_as_ours_without_this_project(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pipe = pipeline(scheduler=DPMSolverMultistepScheduler(**FLOW))
    pipe.save_pretrained(first)
    stranger = multiprocessing.get_context("fork").Process(target=be_a_stranger, args=(first, second))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    np.testing.assert_allclose(np.load(second / "expected.npy"), arrays(pipe), atol=1e-5)
    assert arrays(TextToImagePipeline.from_pretrained(second)).shape == (1, 16, 16, 3)
    for folder in (first, second):
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
        written = [file for file in folder.rglob("*") if file.suffix in (".json", ".py", ".txt")]
        assert len(written) > 6
        for file in written:
            text = file.read_text(encoding="utf-8")
            assert str(tmp_path) not in text, file
            assert file.suffix == ".py" or "_name_or_path" not in text, file
    assert (first / "pipeline.py").read_bytes() == (second / "pipeline.py").read_bytes()


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="none: no folder of a pipeline, and the Hub gave none: "):
        load_pipeline(str(tmp_path / "none"), False)


class Pixels:
    """A pipeline without an autoencoder."""

    def __init__(self, **components):
        self.components = components

    def __call__(self, prompt):
        """Draw."""


def test_the_size_of_what_is_drawn():
    drawing = pipeline()
    assert image_size(drawing) == PIXELS
    network = drawing.unet
    assert image_size(Pixels(unet=network)) == image_size(Pixels(transformer=network, vae=None)) == 8
    for wrong in (Pixels(movq=network), Pixels(unet=unet(sample_size=None))):
        with pytest.raises(ValueError, match="expected a pipeline that does"):
            image_size(wrong)


def test_latents_that_diffusers_does_not_inpaint_are_for_our_pipeline():
    parts = {"unet": unet(in_channels=16, out_channels=16), "scheduler": DPMSolverMultistepScheduler(**FLOW)}
    stock = StableDiffusionPipeline(**tiny_pipeline.parts(**parts))
    assert type(starting_from(stock, masked=False)).__name__ == "StableDiffusionImg2ImgPipeline"
    with pytest.raises(ValueError, match=r"diffusers has no other pipeline of its parts .* --trust_remote_code true"):
        starting_from(stock, masked=True)
    stock = StableDiffusionPipeline(**tiny_pipeline.parts())
    assert type(starting_from(stock, masked=True)).__name__ == "StableDiffusionInpaintPipeline"
