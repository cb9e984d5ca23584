"""The pipeline of clips: like the image pipeline frame by frame, saved with the source of its network, sampled."""

import json
import multiprocessing
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from ldm.commands.sample import sample
from ldm.export.hub import model_files
from ldm.models.pipeline import load_pipeline
from ldm.models.temporal import VideoUNet
from pipelines.video import VideoPipeline

from . import tiny_pipeline
from .table import table
from .test_pipeline_folder import be_without_this_project
from .tiny_pipeline import LENGTH, PIXELS, WIDTH, seeds


def video(trained=True):
    network = VideoUNet.over(tiny_pipeline.unet(), temporal_head_dim=8).eval()
    if trained:
        torch.manual_seed(7)
        for parameter in network.temporal.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {name: part for name, part in tiny_pipeline.parts(unet=network).items() if part is not None}
    parts.pop("requires_safety_checker")
    pipe = VideoPipeline(**parts, num_frames=3, num_inference_steps=3, guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe, prompt="a cat", **changes):
    return pipe(prompt, **{"generator": seeds(0)[0], "output_type": "np"} | changes).frames


def test_untrained_layers_make_of_each_frame_what_the_image_pipeline_makes_of_its_noise():
    latents = torch.randn(2, 4, 3, 8, 8, generator=seeds(5)[0])
    made = frames(video(trained=False), ["a cat", "a dog"], latents=latents)
    assert made.shape == (2, 3, PIXELS, PIXELS, 3)
    image = tiny_pipeline.pipeline()
    for frame in range(3):
        call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
        alone = image(["a cat", "a dog"], latents=latents[:, :, frame], **call).images
        np.testing.assert_allclose(made[:, frame], alone, atol=1e-4)


def test_one_frame_is_an_image_of_the_image_pipeline_after_training_too():
    latents = torch.randn(1, 4, 1, 8, 8, generator=seeds(5)[0])
    made = frames(video(), latents=latents, num_frames=1)
    call = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    alone = tiny_pipeline.pipeline()("a cat", latents=latents[:, :, 0], **call).images
    np.testing.assert_allclose(made[:, 0], alone, atol=1e-5)
    assert not np.allclose(frames(video()), frames(video(trained=False)), atol=1e-3)


def test_a_clip_depends_on_its_own_prompt_and_generator_alone():
    pipe = video()
    both = frames(pipe, ["a cat", "a dog"], generator=seeds(1, 2))
    np.testing.assert_allclose(frames(pipe, "a dog", generator=seeds(2)), both[1:], atol=1e-5)
    twice = frames(pipe, "a dog", generator=seeds(2, 2), num_videos_per_prompt=2)
    np.testing.assert_allclose(twice, np.concatenate([both[1:]] * 2), atol=1e-5)


def test_output_types_are_those_of_diffusers():
    pipe = video()
    array, tensor = frames(pipe), frames(pipe, output_type="pt")
    np.testing.assert_allclose(tensor.permute(0, 1, 3, 4, 2).numpy(), array, atol=1e-6)
    (clip,) = frames(pipe, output_type="pil")
    assert [(type(frame), frame.size) for frame in clip] == [(Image.Image, (PIXELS, PIXELS))] * 3
    assert frames(pipe, output_type="latent").shape == (1, 4, 3, 8, 8)
    (alone,) = pipe("a cat", generator=seeds(0)[0], output_type="np", return_dict=False)
    np.testing.assert_array_equal(alone, array)
    assert frames(pipe, num_frames=5).shape[1] == 5


@table(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames: got 0; expected a whole number from 1 to 4096"),
        ({"num_frames": 10**6}, "num_frames: got 1000000; expected a whole number from 1 to 4096"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: got \(1, 4, 8, 8\).*\(1, 4, 3, 8, 8\) \(clips, channels, fr"),
        ({"height": 17}, "height: 17 pixels is not a multiple of the autoencoder's factor 2"),
        ({"prompt_embeds": torch.zeros(1, LENGTH, WIDTH)}, "give either prompt or prompt_embeds"),
        ({"output_type": "gif"}, "output_type: got 'gif'; expected one of pil, np, pt, latent"),
    ],
)
def test_what_cannot_be_sampled_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        frames(video(), **changes)


def test_clips_between_two_prompts_begin_with_the_first_and_end_with_the_second():
    pipe, latents = video(), torch.randn(1, 4, 3, 8, 8, generator=seeds(5)[0])
    between = pipe.interpolate("a cat", "a dog", num_images=3, latents=latents, output_type="np").frames
    ends = [frames(pipe, prompt, latents=latents)[0] for prompt in ("a cat", "a dog")]
    np.testing.assert_allclose(between[[0, 2]], ends, atol=1e-4)


def test_a_callback_sees_the_latents_of_the_clip_and_may_stop():
    seen = []

    def after(pipe, step, timestep, tensors):
        seen.append(tuple(tensors["latents"].shape))
        pipe._interrupt = step == 1
        return {}

    frames(video(), callback_on_step_end=after)
    assert seen == [(1, 4, 3, 8, 8)] * 2


def be_a_stranger(first, second):
    be_without_this_project()
    dynamic_modules_utils.HF_MODULES_CACHE = str(first.parent / "modules")
    ours = DiffusionPipeline.from_pretrained(first, custom_pipeline=str(first), trust_remote_code=True)
    ours.save_pretrained(second)
    again = DiffusionPipeline.from_pretrained(second, custom_pipeline=str(second), trust_remote_code=True)
    for number, pipe in enumerate((ours, again)):
        assert type(pipe.unet).__name__ == "VideoUNet"
        pipe.set_progress_bar_config(disable=True)
        np.save(second / f"{number}.npy", frames(pipe))


def test_a_folder_loads_saves_and_loads_again_without_this_project(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pipe = video()
    pipe.save_pretrained(first)
    stranger = multiprocessing.get_context("fork").Process(target=be_a_stranger, args=(first, second))
    stranger.start()
    stranger.join(120)
    assert stranger.exitcode == 0
    for number in range(2):
        np.testing.assert_allclose(np.load(second / f"{number}.npy"), frames(pipe), atol=1e-5)
    for folder in (first, second):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == ["pipeline", "VideoPipeline"]
        assert index["unet"] == ["temporal", "VideoUNet"]
        assert (folder / "unet" / "temporal.py").read_text() == VideoUNet._source
        for file in folder.rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file


def test_every_file_of_a_saved_folder_is_pushed(tmp_path):
    video().save_pretrained(tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path) for path in model_files(tmp_path)} == written


def test_nothing_is_said_of_deprecated_names_while_it_is_saved(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        video().save_pretrained(tmp_path)
    assert [str(one.message) for one in caught if one.category is FutureWarning] == []


def test_its_code_runs_only_where_it_is_trusted(tmp_path):
    video().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="comes with code of its own"):
        load_pipeline(str(tmp_path), trust_remote_code=False)


def test_sample_writes_a_strip_and_an_animation_with_prompt_and_seed_inside(tmp_path):
    video().save_pretrained(tmp_path / "model")
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "trust_remote_code": True}
    written = sample(["a cat"], str(tmp_path / "model"), str(tmp_path / "out"), seed=4, **options)
    assert [path.suffix for path in written][:2] == [".png", ".gif"]
    with Image.open(written[0]) as strip, Image.open(written[1]) as gif:
        assert strip.size == (3 * PIXELS, PIXELS)
        assert (strip.text["prompt"], strip.text["seed"]) == ("a cat", "4")
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (3, (PIXELS, PIXELS), 0)
        described = json.loads(gif.info["comment"])
        assert (described["prompt"], described["seed"]) == ("a cat", "4")
        gif.seek(2)
        last = np.asarray(gif.convert("RGB")).astype(int)
        assert abs(last - np.asarray(strip).astype(int)[:, 2 * PIXELS :]).mean() < 12, "256 colours"
