"""The report as Markdown, as a page and in a model card: whole, of itself alone, and text stays text."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from ldm.evaluation.markdown import COPIED, markdown, plain
from ldm.evaluation.measure import Measure
from ldm.evaluation.page import html, png, strip
from ldm.evaluation.plot import svg
from ldm.evaluation.report import Curve, Figure, Report, Row, Section
from ldm.export.evaluation_card import BEGIN, END, merge_into_card
from tests.tiny_report import HOSTILE, UNICODE, around, tiny_report

from .table import table

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """What a reader of the page finds: elements with their attributes, and the text of each."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.declared = [], [], [], []
        self.feed(text)
        self.close()

    def handle_decl(self, decl):
        self.declared.append(decl)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements are nested"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self):
        return "".join(data for _, data in self.texts)


@pytest.fixture(scope="module")
def page():
    found = Page(html(tiny_report()))
    assert not found.open
    return found


@pytest.fixture(scope="module")
def words():
    """The Markdown of the tiny report as HTML, by a reader that takes GitHub's tables and HTML."""
    return Page(MarkdownIt("commonmark").enable("table").render(markdown(tiny_report())))


def figures():
    return [figure for section in tiny_report().sections for figure in section.figures]


def test_every_image_is_in_the_page_with_its_pixels_and_without_metadata(page):
    images = page.all("img")
    assert len(images) == len(figures()) == 2
    for attributes, figure in zip(images, figures(), strict=True):
        data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"), validate=True)
        with Image.open(io.BytesIO(data)) as decoded:
            np.testing.assert_array_equal(decoded, figure.image.convert("RGB"))
        assert set(re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|tIME|eXIf|iCCP|pHYs", data)) == {
            b"IHDR",
            b"IDAT",
            b"IEND",
        }
    assert [attributes["width"] for attributes in images] == [str(figures()[0].image.width), "256"]


@table("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_rows_of_any_mode_lose_what_they_say_of_their_making(mode):
    image = Image.new(mode, (3, 2))
    image.info |= {
        "icc_profile": b"of a device",
        "exif": b"Exif\0\0of a camera",
        "comment": "of a place",
        "dpi": (72, 72),
    }
    data = base64.b64decode(png(image).partition(",")[2])
    assert b"of a" not in data
    with Image.open(io.BytesIO(data)) as decoded:
        assert decoded.size == (3, 2)
        assert decoded.info == {}


def test_transparency_stays():
    with Image.open(io.BytesIO(base64.b64decode(png(Image.new("LA", (1, 1), (9, 40))).partition(",")[2]))) as decoded:
        assert decoded.getpixel((0, 0)) == (9, 9, 9, 40)


def test_the_page_needs_nothing_else(page):
    assert not {"script", "iframe", "object", "embed", "form", "base", "video"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name.startswith("xmlns"):  # names of a language, which nobody asks for
                continue
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert re.match(r"data:|#", value), (tag, name, value[:80])
            elif tag not in ("img", "svg"):
                assert not re.search(r"https?:|//|url\((?!#)", value), (tag, name, value[:80])
    style = re.findall(r"<style.*?>(.*?)</style>", html(tiny_report()), re.DOTALL)
    assert style
    assert not re.search(r"@import|url\(|//", "".join(style))
    policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_link_leads_to_a_section(page):
    links = {attributes["href"].removeprefix("#") for attributes in page.all("a")}
    assert links == {"section-1", "section-2", "section-3", "settings"}
    assert links <= {attributes.get("id") for _, attributes in page.elements}


def test_what_others_wrote_is_shown_letter_by_letter(page):
    # in a paragraph, a note, a line's name, a caption and a setting; the half pair is a question mark
    assert page.text().count(HOSTILE) == 5
    assert page.text().count(UNICODE.replace("\ud800", "?")) == 2
    assert page.declared == ["DOCTYPE html"]


def test_names_of_everything_are_escaped():
    measure = around(0.5)
    row = Row(HOSTILE, measure, "higher", {HOSTILE: measure}, HOSTILE)
    curve = Curve(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: [(1, measure)], "b": []})
    section = Section(HOSTILE, HOSTILE, [row], [curve], [Figure(HOSTILE, HOSTILE, Image.new("RGB", (1, 1)))])
    report = Report(HOSTILE, HOSTILE, {HOSTILE: {HOSTILE: [HOSTILE]}}, [section])
    found = Page(html(report))
    assert not {"script", "strong", "code"} & {tag for tag, _ in found.elements}
    assert [attributes["src"][:5] for attributes in found.all("img")] == ["data:"]
    rendered = Page(MarkdownIt("commonmark").enable("table").render(markdown(report)))
    assert not {"script", "strong", "em", "code", "a", "img"} & {tag for tag, _ in rendered.elements}


def test_the_same_report_gives_the_same_bytes_whatever_the_date_and_the_users_plots_are(monkeypatch):
    once = html(tiny_report())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setitem(mpl.rcParams, "axes.linewidth", 30)
    assert html(tiny_report()) == once
    assert mpl.rcParams["axes.linewidth"] == 30, "the user's settings are as they were"
    assert markdown(tiny_report()) == markdown(tiny_report())
    assert not re.search(r"[Mm]atplotlib|<metadata|\b20\d\d-\d\d", once)


def test_every_number_and_every_warning_is_in_the_page_and_in_the_markdown(page, words):
    rows = [row for section in tiny_report().sections for row in section.rows]
    copied = sum(row.copied for row in rows)
    assert copied == 2
    for found in (page, words):
        text = " ".join(found.text().split())
        assert sum(COPIED in data for _, data in found.texts) == copied
        for row in rows:
            for measure in (row.measure, *row.beside.values()):
                assert str(measure) in text
        for value in ("efficientnet_lite0", "9656183e" * 8, "torch 2.13.0, diffusers 0.42.1", "0, 1, 2", "1.25"):
            assert value in text
    headlines = [data for tag, data in page.texts if tag == "h3"]
    assert headlines[:3] == ["R@1", "skin tone", "KID"]


def test_the_table_has_the_columns_of_its_baselines(words):
    names = [data for tag, data in words.texts if tag == "th"]
    assert names[:8] == ["measure", "value (95 % interval)", "n", "floor", "copy", "shuffled", "ceiling", "note"]
    cells = re.findall(r"^\| R.*@5 .*$", markdown(tiny_report()), re.MULTILINE)
    assert [cell.strip() for cell in cells[0].strip("|").split("|")][1:] == [
        *("0.450 (0.400 to 0.520)", "200", "0.000300 (0.000200 to 0.000400)", "0.420 (0.370 to 0.470)"),
        *("0.010 (0.000 to 0.020)", "0.985 (0.975 to 0.995)", COPIED),
    ]


def test_a_curve_is_a_table_of_all_its_places_in_markdown():
    lines = {"a": [(1.0, around(0.5)), (4.0, around(0.25))], "b": [(2 + 1 / 49, around(0.75))]}
    text = markdown(Report("", "", {}, [Section("", curves=[Curve("Sweep", "steps", "R@1", lines)])]))
    half, quarter, most = (str(around(value)) for value in (0.5, 0.25, 0.75))
    expected = ["| steps | a | b |", "| --- | --- | --- |"]
    assert expected == text.splitlines()[-5:-3]
    assert text.splitlines()[-3:] == [f"| 1 | {half} |  |", f"| 2.02 |  | {most} |", f"| 4 | {quarter} |  |"]


@settings(deadline=None, max_examples=150)
@given(st.text(st.sampled_from("ab1 \n\t\\`*_[]()<>|~#$!:@&;-+=.{}\u202e\ud800é👩"), max_size=30))
@example("<div a")
@example("<!-- evaluation: end -->")
@example("> a")
@example("1. a")
@example("--- -")
def test_plain_text_survives_a_reader_of_markdown(text):
    shown = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for written, tag in ((plain(text), "p"), (f"| {plain(text)} | b |\n| --- | --- |", "th")):
        found = Page(reader.render(written))
        assert {name for name, _ in found.elements} <= {"p", "table", "thead", "tr", "th"}
        assert "".join(data for name, data in found.texts if name == tag) == shown + ("b" if tag == "th" else "")


def test_a_strip_is_to_scale():
    found = strip(Row("", Measure(0.5, 0.25, 0.75, 9), "higher", {"copy": around(0.0), "ceiling": around(1.0)}))
    assert (found.value, found.low, found.high) == (50, 26.5, 73.5)
    assert found.marks == (("copy", 3), ("ceiling", 97))
    below = strip(Row("", Measure(-1, -3, 1, 9), "higher", {"copy": around(float("nan"))}))
    assert (below.low, below.value, below.high, below.marks) == (3, 50, 97, ())
    assert strip(Row("", Measure(0, 0, 0, 9), "higher", {})).value == 3
    assert strip(Row("", Measure(float("nan"), 0, 1, 9), "higher", {})) is None


def test_a_plot_shows_its_points_to_scale_and_gaps_where_there_is_no_number():
    ys = [1.0, 3.0, float("nan"), 5.0]
    drawn = svg(Curve("t", "x", "y", {"a": [(float(x), around(y, 0.0)) for x, y in enumerate(ys)]}))
    assert drawn.count("<svg") == 1
    assert "var(--line-0)" in drawn
    assert not re.search(r"#0000|#0001|nan", drawn)
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--line-0\)', drawn)
    points = [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML]) (\S+) (\S+)", path)]
    assert [kind for kind, _, _ in points][:2] == ["M", "L"]
    xs, heights = [x for _, x, _ in points], [-y for _, _, y in points]
    assert heights[1] - heights[0] == pytest.approx((heights[-1] - heights[0]) / 2, abs=1e-3)
    assert xs[1] - xs[0] == pytest.approx((xs[-1] - xs[0]) / 3, abs=1e-3)


@table("log_x", [False, True])
def test_plots_of_nothing_of_one_point_and_of_many_lines_can_be_drawn(log_x):
    assert svg(Curve("", "", "", {}, log_x)).startswith("<svg")
    assert svg(Curve("", "", "", {"a": []}, log_x)).startswith("<svg")
    many = svg(Curve("", "", "", {str(n): [(1.0, around(n))] for n in range(7)}, log_x))
    assert {f"var(--line-{n})" for n in range(6)} == set(re.findall(r"var\(--line-\d+\)", many))
    assert "#0001" not in many, "the seventh line has the first one's colour"


def test_the_places_of_a_sweep_are_written_at_a_logarithmic_axis():
    drawn = svg(Curve("", "", "", {"a": [(float(x), around(0.5)) for x in (1, 3, 25)]}, log_x=True))
    assert re.findall(r">(1|3|25)</text>", drawn) == ["1", "3", "25"]


@pytest.fixture
def folder(tmp_path):
    """A model folder with a card as a training writes it."""
    trained = EvalResult("text-to-image", "imagefolder", "birds", "loss", 1.25, dataset_split="validation")
    data = ModelCardData(license="mit", pipeline_tag="text-to-image", model_name="birds", eval_results=[trained])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Birds\n\nmodel | \\1 text\n").save(tmp_path / "README.md")
    return tmp_path


def test_the_card_has_the_numbers_the_hub_reads_and_what_the_training_wrote(folder):
    before = (folder / "README.md").read_text()
    assert merge_into_card(folder, tiny_report()) is True
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.pipeline_tag, card.data.model_name) == ("mit", "text-to-image", "birds")
    first, *added = card.data.eval_results
    assert (first.metric_type, first.metric_value, first.dataset_split) == ("loss", 1.25, "validation")
    found = {result.metric_type: result.metric_value for result in added}
    assert found == {
        **{"r_at_1": 0.78, "r_at_5": 0.45, "skin_tone": 0.91, "gender": 0.62},
        **{"kid": 0.0042, "fr_chet_distance": 51.2},
    }, "no numbers that only describe, none that are missing"
    assert {(r.task_type, r.dataset_name, r.dataset_split) for r in added} == {("text-to-image", "tiny", "test")}
    assert added[0].metric_args == {"interval": [0.72, 0.835], "n": 200}
    assert markdown(tiny_report()) in card.text
    assert card.text.startswith(before[before.index("\n\n# Birds") :].rstrip()[1:])


def test_a_second_evaluation_takes_the_place_of_the_first(folder):
    merge_into_card(folder, tiny_report())
    once = (folder / "README.md").read_bytes()
    merge_into_card(folder, tiny_report())
    assert (folder / "README.md").read_bytes() == once
    with (folder / "README.md").open("a") as file:
        file.write("\nwritten by hand\n")
    other = Report("Again \\1", "", {}, [Section("s", rows=[Row("SSIM", around(0.9), "higher", {})])])
    merge_into_card(folder, other)
    card = ModelCard.load(folder / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["loss", "ssim"]
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    assert card.text.endswith(f"{END}\n\nwritten by hand\n")
    assert "KID" not in card.text
    assert markdown(other) in card.text


def test_text_after_a_lost_end_is_kept(folder):
    with (folder / "README.md").open("a") as file:
        file.write(f"\n{BEGIN}\nby hand\n")
    merge_into_card(folder, tiny_report())
    merge_into_card(folder, tiny_report())
    text = (folder / "README.md").read_text()
    assert "by hand" in text
    assert text.count(END) == 1


def test_a_card_without_metadata_gets_them_and_a_folder_without_a_card_is_left_alone(tmp_path):
    assert merge_into_card(tmp_path, tiny_report()) is False
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "README.md").write_text("# Mine\n")
    assert merge_into_card(tmp_path, Report("Nothing", "", {}, [])) is True
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == {}
    assert merge_into_card(tmp_path, tiny_report()) is True
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.model_name == tmp_path.name
    assert {result.task_type for result in data.eval_results} == {"image-to-image"}


@table("metadata", ["a: [", "- a", "model-index: 3", "model-index: [{name: x, results: [{}]}]"])
def test_metadata_that_cannot_be_read_are_refused_by_name_and_left_alone(tmp_path, metadata):
    text = f"---\n{metadata}\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}/README.md: the metadata"):
        merge_into_card(tmp_path, tiny_report())
    assert (tmp_path / "README.md").read_text() == text


def test_the_json_of_the_tiny_report_is_strict():
    assert json.loads(json.dumps(tiny_report().as_json(), allow_nan=False)) == tiny_report().as_json()
