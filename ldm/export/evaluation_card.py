"""The evaluation in a model card: results in the Hub's metadata, and the report between two comments."""

from __future__ import annotations

import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError  # type: ignore[import-untyped]

from ldm.evaluation.markdown import markdown
from ldm.evaluation.report import Report, Row
from ldm.export.card import CARD, EVALUATION, EVALUATION_MARKS

BEGIN, END = EVALUATION_MARKS


def merge_into_card(folder: Path, report: Report) -> bool:
    """Write the report into ``README.md`` of a model folder; return False if there is no such file.

    An earlier evaluation is replaced: the results that `evaluation_results` marks, and the text between the two
    comments. The rest stays, also the metrics of the training. The report's settings "dataset" and "split" name the
    data of the results.

    Raises:
        ValueError: the Hub cannot read the metadata of the file.

    """
    path = folder / CARD
    if not path.is_file():
        return False
    try:
        card = ModelCard.load(path)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"{folder.name}/{CARD}: the metadata between its --- lines cannot be read: {error}") from error
    kept = [result for result in card.data.eval_results or [] if "interval" not in (result.metric_args or {})]
    task = card.data.pipeline_tag or "image-to-image"  # a card of others may name no task
    results = [*kept, *evaluation_results(report, task)]
    card.data.eval_results = results or None
    card.data.model_name = (card.data.model_name or folder.resolve().name) if results else None
    section = f"{BEGIN}\n{markdown(report)}{END}"
    text, replaced = EVALUATION.subn(lambda _: section, card.text)
    card.text = text if replaced else f"{text.rstrip()}\n\n{section}\n"
    card.save(path)
    return True


def evaluation_results(report: Report, task: str) -> list[EvalResult]:
    """Return the rows of a report as results in the Hub's metadata.

    Rows that only describe, and numbers that are not finite, are left out. Interval and number of images are in
    `metric_args`, which marks the results as those of an evaluation.
    """
    dataset = str(report.settings.get("dataset", "images"))
    split = str(report.settings.get("split", "test"))
    rows = [row for section in report.sections for row in section.rows if row.better != "none"]
    return [_result(row, task, dataset, split) for row in rows if math.isfinite(row.measure.value)]


def _result(row: Row, task: str, dataset: str, split: str) -> EvalResult:
    measure = row.measure
    ends = [round(end, 6) if math.isfinite(end) else None for end in (measure.low, measure.high)]
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=re.sub(r"[^a-z0-9]+", "_", row.name.lower().replace("@", "_at_")).strip("_") or "measure",
        metric_name=row.name,
        metric_value=round(measure.value, 6),
        metric_args={"interval": ends, "n": measure.n},
    )
