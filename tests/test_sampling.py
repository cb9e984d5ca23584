"""Images of prompts: each from its own seed, whatever is drawn beside it and by how many processes."""

from types import SimpleNamespace

import numpy as np
import torch

from ldm.evaluation import sampling
from ldm.evaluation.sampling import sample_images


def drawing(prompt, generator, output_type, scale):
    """A pipeline whose images are noise, and the length of the prompt in a corner."""
    images = [torch.rand(8, 8, 3, generator=draw).numpy() * scale for draw in generator]
    for image, text in zip(images, prompt, strict=True):
        image[0, 0] = len(text) / 255
    return SimpleNamespace(images=np.stack(images))


PROMPTS = ["x" * number for number in range(11)]


def test_an_image_depends_on_its_prompt_and_place_alone(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 4)
    found = sample_images(drawing, PROMPTS, 7, "prompt", scale=1.0)
    assert found.shape == (11, 8, 8, 3)
    assert found.dtype == np.uint8
    assert found[:, 0, 0, 0].tolist() == list(range(11))
    monkeypatch.setattr(sampling, "CHUNK", 50)
    np.testing.assert_array_equal(sample_images(drawing, PROMPTS, 7, "prompt", scale=1.0), found)
    np.testing.assert_array_equal(sample_images(drawing, PROMPTS[3:4], 10, "prompt", scale=1.0)[0, 1:], found[3, 1:])


def test_processes_share_the_prompts_out_and_each_gets_all(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 2)
    alone = sample_images(drawing, PROMPTS, 0, "prompt", scale=1.0)
    shares = []

    def gather(drawn):
        shares.append(drawn)
        return [part for share in shares for part in share] if len(shares) == 3 else whole

    for rank in range(3):
        whole = [(start, alone[start : start + 2]) for start in range(0, 11, 2)]  # until all have been asked
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0)
        monkeypatch.setattr(sampling, "PartialState", lambda state=state: state)
        monkeypatch.setattr(sampling, "gather_object", gather)
        together = sample_images(drawing, PROMPTS, 0, "prompt", scale=1.0)
    assert [len(share) for share in shares] == [2, 2, 2]
    np.testing.assert_array_equal(together, alone)
