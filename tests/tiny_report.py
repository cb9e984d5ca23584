"""A report with made-up numbers that has one of everything, and text that wants to be more than text."""

import numpy as np
from PIL import Image

from ldm.evaluation.images import comparison_sheet
from ldm.evaluation.measure import Measure
from ldm.evaluation.report import Curve, Figure, Report, Row, Section

HOSTILE = '<script>alert("1")</script> | <img src=x onerror=alert(2)> & **bold** [link](http://a.b) `code` {{ 7 * 7 }}'
"""HTML, Markdown and a template in a caption."""

UNICODE = "امرأة رائدة فضاء 👩🏾‍🚀 宇航员 \u202eidib half \ud800 a pair"
"""Right to left, joined, an override of direction, and what no UTF-8 file can hold."""


def around(value, width=0.05, n=200):
    return Measure(value, value - width, value + width, n)


def disc(colour, size=64):
    """An image of a disc, (S, S, 3)."""
    y, x = np.mgrid[:size, :size] - size / 2
    return np.where((x**2 + y**2 < (size / 3) ** 2)[..., None], colour, 255).astype(np.uint8)


def tiny_report():
    """Return it; the same at every call."""
    copy, shuffled, ceiling = around(0.42), around(0.01, 0.01), around(0.985, 0.01)
    beside = {"floor": around(0.0003, 0.0001), "copy": around(0.0, 0.0), "shuffled": shuffled, "ceiling": ceiling}
    retrieval = [
        Row("R@1", Measure(0.78, 0.72, 0.835, 200), "higher", beside, "of 3,731 images"),
        Row("R@5", Measure(0.45, 0.40, 0.52, 200), "higher", {**beside, "copy": copy}),
    ]
    factors = [
        Row("skin tone", around(0.91, 0.04, 133), "higher", {"chance": around(1 / 6, 0)}),
        Row("gender", around(0.62, 0.07, 96), "higher", {"chance": around(0.5, 0)}, HOSTILE),
        Row("images in a family", around(5.2, 0.3, 133), "none", {}),
    ]
    distances = [
        Row(
            "KID",
            Measure(0.0042, 0.0036, 0.0049, 200),
            "lower",
            {"floor": around(0.031, 0.002), "real": around(2e-4, 1e-4)},
        ),
        Row("Fréchet distance", Measure(51.2, 47.3, 55.9, 200), "lower", {"copy": around(44.0, 2)}),
        Row("not measured", Measure(float("nan"), float("nan"), float("nan"), 0), "lower", {"copy": around(1.0)}),
    ]
    levels, steps = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9), (2, 4, 8, 16, 25, 50)
    loss = {
        "training": [(x, around(0.9 - 0.7 * x, 0.02)) for x in levels],
        HOSTILE: [(x, around(1 - 0.7 * x)) for x in levels],
    }
    sweep = {"R@1": [(float(x), around(0.8 - 0.9 / x, 0.06)) for x in steps]}
    colours = [(200, 60, 40), (40, 120, 200), (250, 180, 30), (60, 160, 80), (140, 80, 170), (90, 90, 90)]
    drawn = np.stack([disc(np.array(colour)) for colour in colours])
    noisy = np.clip(drawn + np.random.default_rng(0).normal(0, 12, drawn.shape), 0, 255).astype(np.uint8)
    captions = ["red disc", "blue disc", "yellow disc medium-dark skin tone", "green disc", "violet disc", "grey disc"]
    images = [
        Figure("Held-out captions", f"{HOSTILE}\n{UNICODE}", comparison_sheet(captions, noisy, drawn)),
        Figure("One image", "a disc of 64 pixels, enlarged", Image.fromarray(noisy[0]).convert("P")),
    ]
    settings = {
        **{
            "feature network": "efficientnet_lite0",
            "weights": "9656183e" * 8,
            "resize": "bicubic, antialiased, to 224 px",
        },
        **{"guidance_scale": 1.25, "num_inference_steps": 25, "seeds": [0, 1, 2], "dataset": "tiny", "split": "test"},
        **{"hardware": "2 threads, AVX512", "versions": {"torch": "2.13.0", "diffusers": "0.42.1"}, "note": HOSTILE},
    }
    sections = [
        Section("Does it follow the caption?", "Retrieval among all images.\n\n" + HOSTILE, retrieval, [], images),
        Section("Which part of the caption?", UNICODE, factors),
        Section(
            "Does it look like the data?",
            "",
            distances,
            [
                Curve("Loss by noise level", "noise level (0: image, 1: noise)", "loss", loss),
                Curve("Retrieval by steps", "steps", "R@1", sweep, log_x=True),
            ],
        ),
    ]
    return Report("Evaluation", "tiny/text2img, 40 steps", settings, sections)
