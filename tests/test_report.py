"""The report: what is flagged as copied, and JSON that every reader takes."""

import json
from math import inf, nan

from PIL import Image

from ldm.evaluation.measure import Measure
from ldm.evaluation.report import Curve, Figure, Report, Row, Section
from ldm.evaluation.summary import summary

from .table import table


def exactly(value):
    return Measure(value, value, value, 200)


@table(
    ("better", "interval", "beside", "copied"),
    [
        ("higher", (0.4, 0.6), {}, False),
        ("higher", (0.4, 0.6), {"copy": 0.39}, False),
        ("higher", (0.4, 0.6), {"copy": 0.4}, True),
        ("higher", (0.4, 0.6), {"copy": 0.9}, True),
        ("higher", (0.4, 0.6), {"shuffled": 0.4}, True),
        ("higher", (0.4, 0.6), {"copy": 0.1, "shuffled": 0.5}, True),
        ("higher", (0.4, 0.6), {"floor": 0.9, "ceiling": 0.9, "chance": 0.9, "other": 0.9}, False),
        ("lower", (0.4, 0.6), {"copy": 0.61}, False),
        ("lower", (0.4, 0.6), {"copy": 0.6}, True),
        ("lower", (0.4, 0.6), {"shuffled": 0.1}, True),
        ("lower", (0.4, 0.6), {"ceiling": 0.1}, False),
        ("none", (0.4, 0.6), {"copy": 0.5, "shuffled": 0.5}, False),
        ("higher", (nan, nan), {"copy": 0.5}, False),
        ("higher", (0.4, 0.6), {"copy": nan}, False),
        ("lower", (nan, nan), {"copy": 0.5}, False),
    ],
)
def test_a_row_is_copied_where_a_copier_is_as_good_as_the_worse_end_of_its_interval(better, interval, beside, copied):
    row = Row("R@1", Measure(0.5, *interval, 200), better, {name: exactly(value) for name, value in beside.items()})
    assert row.copied is copied


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_the_json_has_every_number_and_is_strict():
    row = Row("R@1", Measure(0.5, 0.4, 0.6, 200), "higher", {"copy": exactly(0.4)}, "of 3,731")
    curve = Curve("Loss", "noise level", "loss", {"model": [(0.1, exactly(0.2)), (0.9, exactly(inf))]}, log_x=True)
    image = Figure("Held out", "a cat", Image.new("RGB", (2, 2)))
    settings = {"guidance_scale": 1.25, "seeds": (0, 1), "versions": {"torch": "2.13.0"}, "missing": nan}
    report = Report("Birds", "me/birds", settings, [Section("Captions", "Text.", [row], [curve], [image])])
    found = json.loads(json.dumps(report.as_json(), allow_nan=False), parse_constant=refuse)
    assert found == {
        "title": "Birds",
        "model": "me/birds",
        "settings": {"guidance_scale": 1.25, "seeds": [0, 1], "versions": {"torch": "2.13.0"}, "missing": None},
        "sections": [
            {
                "title": "Captions",
                "text": "Text.",
                "rows": [
                    {
                        "name": "R@1",
                        **{"value": 0.5, "low": 0.4, "high": 0.6, "n": 200},
                        "better": "higher",
                        "beside": {"copy": {"value": 0.4, "low": 0.4, "high": 0.4, "n": 200}},
                        "copied": True,
                        "note": "of 3,731",
                    }
                ],
                "curves": [
                    {
                        **{"title": "Loss", "x_label": "noise level", "y_label": "loss", "log_x": True},
                        "lines": {
                            "model": [
                                {"x": 0.1, "value": 0.2, "low": 0.2, "high": 0.2, "n": 200},
                                {"x": 0.9, "value": None, "low": None, "high": None, "n": 200},
                            ]
                        },
                    }
                ],
            }
        ],
    }


def test_the_headlines_are_the_first_rows_and_columns_come_in_their_order():
    first, second, third = (
        Row(name, exactly(0.5), "higher", dict.fromkeys(beside, exactly(0.1)))
        for name, beside in (("a", ["real", "ceiling"]), ("b", ["shuffled", "floor"]), ("c", []))
    )
    report = Report("", "", {}, [Section("1", rows=[first, second]), Section("2"), Section("3", rows=[third])])
    assert report.headlines == (first, third)
    assert report.sections[0].beside == ("floor", "shuffled", "ceiling", "real")
    assert report.sections[1].beside == ()


def test_the_summary_says_of_each_headline_what_it_stands_beside_and_what_it_means():
    good, copied = exactly(0.78), exactly(0.2)
    rows = [
        Row("R@1, pixels", good, "higher", {"copy": exactly(0.25), "ceiling": exactly(0.985)}),
        Row("spread within a prompt over spread across prompts", copied, "lower", {"copy": exactly(0.1)}),
        Row("bits per dimension", good, "lower", {"pixel by pixel": exactly(7.5), "other": exactly(3.0)}),
    ]
    sections = [Section(row.name, rows=[row, row], meaning=f"Meaning {number}.") for number, row in enumerate(rows)]
    assert summary(Report("", "", {}, [*sections, Section("none")])).splitlines() == [
        "                                    value (95 % interval)   copy  ceiling  pixel by pixel  other",
        "R@1, pixels ↑                       0.780 (0.780 to 0.780)  0.25  0.985",
        "    Meaning 0.",
        "spread within a prompt over spread  0.200 (0.200 to 0.200)  0.1",
        "across prompts ↓",
        "    Meaning 1. Here a copier reaches this.",
        "bits per dimension ↓                0.780 (0.780 to 0.780)                 7.5             3",
        "    Meaning 2.",
        "copy: a copier of training images; ceiling: the true images, or what the autoencoder makes of them;",
        "pixel by pixel: each colour value sent alone",
    ]
    assert summary(Report("", "", {}, [])) == "nothing was measured"
