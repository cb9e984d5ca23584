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
from pipelines import given_frames
from pipelines.video import VideoPipeline

from . import tiny_pipeline
from .table import table
from .test_pipeline_folder import be_without_this_project
from .tiny_pipeline import LENGTH, PIXELS, WIDTH, seeds


def video(trained=True, **told):
    context_channels = 5 if told else 0
    network = VideoUNet.over(tiny_pipeline.unet(), temporal_head_dim=8, context_channels=context_channels).eval()
    if trained:
        torch.manual_seed(7)
        for parameter in network.temporal.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    parts = {name: part for name, part in tiny_pipeline.parts(unet=network).items() if part is not None}
    parts.pop("requires_safety_checker")
    pipe = VideoPipeline(**parts, num_frames=3, num_inference_steps=3, guidance_scale=2.0, **told)
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


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS, 3), np.uint8))


def through(pipe, image):
    """Return an image through the autoencoder."""
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(values).latent_dist.mode()).sample
    return (decoded / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()


def test_a_given_image_is_the_first_frame_and_decides_the_others():
    pipe, image = video(max_context=2), picture()
    made = frames(pipe, image=image)
    np.testing.assert_allclose(made[0, 0], through(pipe, image), atol=1e-5)
    assert not np.allclose(made[0, 1:], frames(pipe, image=picture(1))[0, 1:], atol=1e-3)
    assert not np.allclose(made[0, 1:], frames(pipe)[0, 1:], atol=1e-3)
    two = frames(pipe, ["a cat", "a dog"], image=[image, picture(1)], generator=seeds(0, 0))
    np.testing.assert_allclose(two[0], made[0], atol=1e-5)
    np.testing.assert_allclose(two[1, 0], through(pipe, picture(1)), atol=1e-5)


def test_between_a_first_and_a_last_frame_the_others_are_filled_in():
    pipe = video(max_context=1, interpolates=True)
    made = frames(pipe, image=picture(), last_image=picture(1))
    np.testing.assert_allclose(made[0, [0, 2]], [through(pipe, picture()), through(pipe, picture(1))], atol=1e-5)
    assert not np.allclose(made[0, 1], frames(pipe, image=picture())[0, 1], atol=1e-3)


def test_a_long_clip_is_made_in_passes_each_from_the_last_frames_of_the_one_before():
    pipe, clip = video(max_context=2), [picture(seed) for seed in range(3)]
    made = frames(pipe, video=clip, num_frames=6, generator=seeds(0))
    assert made.shape[1] == 6
    np.testing.assert_allclose(made[0, :3], [through(pipe, frame) for frame in clip], atol=1e-5)
    one = frames(pipe, video=clip[1:], num_frames=3, output_type="latent")
    two = frames(pipe, video=clip[1:], num_frames=3, generator=seeds(0))
    np.testing.assert_allclose(made[0, 3], two[0, 2], atol=1e-5)
    known = given_frames.KnownFrames(one, torch.tensor([True] * 3)).context(1, 4)
    assert known.shape[2] == 3
    assert known[0, 0, :, 0, 0].tolist() == [1, 1, 0]
    assert frames(pipe, num_frames=7).shape[1] == 7, "of a prompt alone, too"
    assert frames(video(), num_frames=7).shape[1] == 7, "in one pass, without given frames"
    assert not np.allclose(made[0, 4], made[0, 3], atol=1e-3)


@table(
    ("num_frames", "known", "window", "most", "expected"),
    [
        (8, 0, 8, 3, [(0, 8)]),
        (8, 1, 8, 3, [(0, 8)]),
        (5, 0, 8, 3, [(0, 5)]),
        (24, 0, 8, 0, [(0, 24)]),
        (24, 8, 8, 3, [(5, 13), (10, 18), (15, 23), (20, 28)]),
        (12, 0, 8, 3, [(0, 8), (5, 13)]),
        (6, 5, 8, 3, [(2, 10)]),
    ],
)
def test_passes_go_on_from_what_is_known_to_the_end(num_frames, known, window, most, expected):
    assert [*given_frames.passes(num_frames, known, window, most)] == expected


def test_guidance_by_given_frames_goes_from_the_output_without_them_towards_that_with_them():
    context = torch.ones(1, 5, 2, 3, 3)

    def network(model_input, **kwargs):
        return (model_input[:, :4] + (10 * model_input[:, 4:].sum() if model_input.shape[1] == 9 else 0),)

    x = torch.randn(2, 4, 2, 3, 3)
    without, told = network(x)[0], network(torch.cat([x, context.repeat(2, 1, 1, 1, 1)], 1))[0]
    for scale in (1.0, 3.0):
        found = given_frames.InContext(network, context, scale)(x)[0]
        torch.testing.assert_close(found, without + scale * (told - without))


@table(
    ("told", "changes", "message"),
    [
        ({}, {"image": picture()}, "image, video: this model goes on from no frames"),
        ({"max_context": 1}, {"last_image": picture()}, "last_image: expected image too"),
        ({"max_context": 1}, {"image": picture(), "last_image": picture()}, "conditioners.frames.between"),
        ({"max_context": 1}, {"image": picture(), "video": [picture()]}, "image, video: got both"),
        ({"max_context": 1}, {"video": [picture()] * 3}, "num_frames: got 3; expected more than the 3 frames"),
        ({"max_context": 1}, {"image": picture(), "num_frames": 1}, "num_frames: got 1, and all of them are given"),
        ({"max_context": 1}, {"image": [picture()] * 2}, "image: got 2 for 1 prompts; expected 1, or one a prompt"),
        ({"max_context": 1}, {"video": [[picture()], [picture()] * 2]}, "video: got clips of .* expected clips of one"),
        ({"max_context": 1}, {"video": "film.mp4"}, "video: got str; expected an image of PIL"),
        ({"max_context": 1}, {"context_guidance_scale": 0.5}, "context_guidance_scale: got 0.5; expected a number fr"),
        ({"max_context": 1}, {"num_frames": 5, "latents": torch.zeros(1, 4, 5, 8, 8)}, "latents: got noise for a clip"),
    ],
)
def test_frames_that_cannot_be_gone_on_from_are_refused(told, changes, message):
    with pytest.raises(ValueError, match=message):
        frames(video(**told), **changes)


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


def test_sample_goes_on_from_a_picture_or_a_film_of_files(tmp_path):
    video(max_context=2, interpolates=True).save_pretrained(tmp_path / "model")
    frame, film = tmp_path / "frame.png", tmp_path / "film.gif"
    picture().save(frame)
    shades = [Image.new("RGB", (PIXELS, PIXELS), (shade,) * 3) for shade in (40, 90)]
    shades[0].save(film, save_all=True, append_images=shades[1:], duration=100)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "trust_remote_code": True, "overwrite": True}

    def drawn(**given):
        strip, *_ = sample(["a cat"], str(tmp_path / "model"), str(tmp_path / "out"), **given, **options)
        with Image.open(strip) as image:
            return np.asarray(image).astype(int)

    alone, from_frame = drawn(), drawn(image=str(frame))
    assert abs(alone[:, :PIXELS] - from_frame[:, :PIXELS]).mean() > 1, "the first frame is given"
    ended = drawn(image=str(frame), last_image=str(frame))
    np.testing.assert_array_equal(ended[:, :PIXELS], from_frame[:, :PIXELS])
    np.testing.assert_array_equal(ended[:, :PIXELS], ended[:, -PIXELS:])
    assert drawn(video=str(film), num_frames=4).shape[1] == 4 * PIXELS
    with pytest.raises(ValueError, match="mask_image, strength: a clip goes on from its first frames as they are"):
        drawn(image=str(frame), strength=0.5)
    with pytest.raises(ValueError, match=r"video: .*frame\.txt: not a film"):
        drawn(video=str(tmp_path / "frame.txt"), num_frames=4)
    tiny_pipeline.pipeline().save_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match=r"num_frames: \w+ samples no clips"):
        sample(["a cat"], str(tmp_path / "images"), str(tmp_path / "out"), num_frames=4, **options)
