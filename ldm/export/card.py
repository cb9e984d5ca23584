"""The model card: the README.md of a model folder, with the Hub's metadata and a text for readers."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ldm.config import DataConfig, RunConfig
from ldm.config.file import config_text
from ldm.config.places import on_hub, pinned, portable
from ldm.models.provenance import Provenance

TEMPLATES = Environment(
    loader=PackageLoader("ldm", "export"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701 (Markdown)
)
CARD = "README.md"
EVALUATION_MARKS = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
"""Comments around the part of a card that `ldm evaluate` writes."""
EVALUATION = re.compile("{0}(?:(?!{0}).)*?{1}".format(*EVALUATION_MARKS), re.DOTALL)
OPENMOJI = "[OpenMoji](https://openmoji.org)"
KNOWN_DATA = {
    "openmoji": (OPENMOJI, "CC BY-SA 4.0"),
    "openmoji_clips": (f"clips of {OPENMOJI} images that move", "CC BY-SA 4.0"),
}
"""Name and licence of the images of a source whose data are always the same."""
HUB_LICENCES = {
    *("mit", "apache-2.0", "unlicense", "cc", "cc0-1.0", "pddl", "odc-by", "odbl"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
}
"""The Hub's identifiers of licences that images may have; the Hub refuses a card with an unknown one."""
METRICS = {
    "loss": "loss",
    "r_at_1": "retrieval R@1",
    "r_at_5": "retrieval R@5",
    "back_r_at_1": "retrieval of captions, R@1",
    "back_r_at_5": "retrieval of captions, R@5",
    "codes_used": "codes in use",
    "perplexity": "perplexity of the codes",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "perceptual": "distance in the features of EfficientNet-lite0",
    **{f"loss_at_{level / 100:.2f}": f"loss at noise level {level / 100:.2f}" for level in range(101)},
}
MEASURED_HEADING = "\n## How good it is\n"
AVERAGE = """
## Which weights

These weights are a power-function average whose standard deviation is {sigma_rel} of the training (Karras et al. 2024),
made from snapshots after the training. The numbers and images here are of another average, the training's own.
"""


@dataclass(frozen=True)
class CardText:
    """The words of one kind of model for its card; all of them Markdown."""

    title: str
    about: str
    """A paragraph that describes the model."""
    sheet: str
    """The sheet of the newest validation, ``samples.png``, with a description; left out if there is no sheet."""
    sheets: str
    """Folder, in that of the run, that holds the sheets."""
    loading: str
    """Instructions to load it from the folder ``model``."""
    measured: str
    """The way its metrics were measured; follows the words "with the averaged weights:"."""
    notes: Mapping[str, str]
    """More paragraphs on that, each for a card that has the metric of its name."""
    task: str
    """The Hub's name of the model's task."""
    pipeline_tag: str | None
    """The Hub's name of the task of a whole pipeline; None for a component."""
    tags: Sequence[str]
    library: str = "diffusers"
    """The Hub's name of the library that loads it."""


def write_card(model: Path, run: Path, config: RunConfig, text: CardText, record: Provenance) -> None:
    """Write README.md into the folder `model`, with the newest validation sheet of the folder `run` as samples.png.

    The metrics are those of the newest validation in the run's ``metrics.jsonl``. Paths of this machine are replaced,
    see `portable`.
    """
    data = config.data
    sheets = sorted((run / text.sheets).glob("step-*.png"))
    if sheets:
        shutil.copyfile(sheets[-1], model / "samples.png")
    measured_at, metrics = _newest_metrics(run / "metrics.jsonl")
    results = [_result(text.task, data, metric, value) for metric, value in metrics.items() if math.isfinite(value)]
    name, licence = _data(data)
    identifier = (licence or "").lower().replace(" ", "-")
    card = ModelCardData(
        license=identifier if identifier in HUB_LICENCES else "other" if licence else None,
        library_name=text.library,
        pipeline_tag=text.pipeline_tag,
        tags=list(text.tags),
        datasets=[known] if (known := _hub_data(data)) else None,
        model_name=_called(config.output_dir, model.name) if results else None,
        eval_results=results or None,
    )
    fields = {key: value for key, value in portable(asdict(config)).items() if not key.startswith("push_")}
    notes = [note for metric, note in text.notes.items() if metric in metrics]
    body = TEMPLATES.get_template("card.md.jinja").render(
        title=text.title,
        about=text.about,
        sheet=text.sheet if sheets else None,
        loading=with_name(text.loading, model.name),
        measured_at=measured_at,
        measured="\n\n".join([text.measured, *notes]),
        metrics=[(METRICS.get(metric, metric), f"{value:.4g}") for metric, value in metrics.items()],
        data=name,
        licence=licence,
        record=record,
        versions=", ".join(f"{package} {number}" for package, number in record.versions.items()),
        config=config_text(fields),
    )
    ModelCard(f"---\n{card.to_yaml()}\n---\n\n{body}").save(model / CARD)


def rewrite_for_average(model: Path, name: str, sigma_rel: float) -> None:
    """Rewrite the card in the folder `model` for a power-function average; `name` is the folder's later name.

    The metrics of the training stay, with a note that they are of other weights. An evaluation is removed, and so are
    all results in the Hub's metadata.
    """
    card = ModelCard.load(model / CARD)
    card.data.eval_results = card.data.model_name = None
    text = AVERAGE.format(sigma_rel=sigma_rel) + MEASURED_HEADING
    card.text = with_name(EVALUATION.sub("", card.text).replace(MEASURED_HEADING, text, 1), name)
    card.save(model / CARD)


def with_name(text: str, name: str) -> str:
    """Return a card's text whose examples load `name`, a folder or repository."""
    return re.sub(r'^model = "[^"\n]*"$', f'model = "{name}"', text, flags=re.MULTILINE)


def _called(path: str, otherwise: str) -> str:
    """Return the last part of a path; `otherwise` if it names a user or is empty."""
    return PurePath(portable(path)).name or otherwise


def _hub_data(data: DataConfig) -> str | None:
    """Return the data set's name on the Hub, without its revision; None if it is not on the Hub."""
    return pinned(data.path)[0] if data.source == "dataset" and data.path is not None and on_hub(data.path) else None


def _data(data: DataConfig) -> tuple[str, str | None]:
    """Return the name of the data, in Markdown, and their licence, None if it is not stated."""
    if data.source in KNOWN_DATA:
        name, licence = KNOWN_DATA[data.source]
        return name, data.licence or licence
    known = _hub_data(data)
    name = f"[{known}](https://huggingface.co/datasets/{known})" if known else _called(data.path or "", "images")
    return f"{name} ({data.source})", data.licence


def _newest_metrics(file: Path) -> tuple[int, dict[str, float]]:
    """Return the step of the last validation and its metrics by name; (0, {}) if there was none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        values = {key: float(value) for key, value in row.items() if key.startswith("validation/")}
        if values:
            return int(row["step"]), {key.removeprefix("validation/"): value for key, value in values.items()}
    return 0, {}


def _result(task: str, data: DataConfig, metric: str, value: float) -> EvalResult:
    known = _hub_data(data)
    return EvalResult(
        task_type=task,
        dataset_type=known or data.source,
        dataset_name=known or (_called(data.path, "images") if data.path else data.source),
        dataset_split="validation",
        metric_type=metric,
        metric_name=METRICS.get(metric, metric),
        metric_value=round(value, 6),
    )
