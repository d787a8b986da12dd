"""The ranking of evaluated models, and the labels that the recommended model puts in doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.evaluation.evaluation_context import out_of_sample_predictions
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.numeric import label_issues
from utils.numeric.metrics import METRICS
from utils.numeric.statistics import holm

COLUMNS = ("accuracy", "f1_macro", "log_loss", "ece", "ci95", "contaminated", "optimistic", "unknown_training_data")
COMPARISONS = ("vs_best_single", "vs_soft_voting")


@dataclass(frozen=True)
class LabelIssueTable:
    """Labels in doubt, ready to be written."""

    csv: str
    record: Mapping[str, Any]
    summary: Mapping[str, Any]
    """`{model, n, in_doubt}`, for the ranking"""


def rank(
    records: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, str],
    split: str,
    metric: str,
    columns: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `{split, n, order, rows}`, with rows ordered by the metric, then log-loss, then name.

    Contaminated models and those with unknown training data come last and have no rank. `records` are {model:
    `metrics.json`}, `kinds` {model: member or ensemble}; rows contain `COLUMNS` and the further `columns`. The p-values
    of each comparison are corrected for the number of models by Holm's method.
    """
    higher_is_better = METRICS[metric].higher_is_better

    def order(name: str) -> tuple[bool, float, float, str]:
        record = records[name]
        value = -record[metric] if higher_is_better else record[metric]
        return not _is_ranked(record), value, record["log_loss"], name

    corrected = {
        (key, p_value): holm(
            {name: record[key][p_value] for name, record in records.items() if _is_tested(record, key, p_value)}
        )
        for key in COMPARISONS
        for p_value in ("p_value", "delong_p")
    }
    rows = []
    for position, name in enumerate(sorted(records, key=order), start=1):
        record = records[name]
        row = {"rank": position if _is_ranked(record) else None, "name": name, "kind": kinds[name]}
        row |= {key: record[key] for key in (*COLUMNS, *columns)}
        for key in COMPARISONS:
            comparison = record[key]
            p_values = {p_value: corrected[key, p_value].get(name) for p_value in ("p_value", "delong_p")}
            row[key] = None if comparison is None else comparison | _corrected(comparison, p_values)
        rows.append(row)
    n = next(iter(records.values()))["n_samples"]
    return {"split": split, "n": n, "order": [metric, "log_loss", "name"], "rows": rows}


def _corrected(comparison: Mapping[str, Any], corrected: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the corrected p-values; that of the accuracy also as `mcnemar_p_holm` if rows are independent."""
    p_value = corrected["p_value"]
    return {
        "p_value_holm": p_value,
        "mcnemar_p_holm": p_value if comparison["test"] == "mcnemar" else None,
        "delong_p_holm": corrected["delong_p"],
    }


def _is_tested(record: Mapping[str, Any], key: str, p_value: str) -> bool:
    """Return whether a comparison counts in the correction; those of unranked models do not."""
    return record[key] is not None and record[key].get(p_value) is not None and _is_ranked(record)


def _is_ranked(record: Mapping[str, Any]) -> bool:
    """Return whether a model is known not to be fitted on evaluated rows."""
    return not record["contaminated"] and not record["unknown_training_data"]


def label_issue_table(inputs: EvaluationInputs, name: str) -> LabelIssueTable:
    """Return the labels that the out-of-sample predictions of a model contradict (confident learning)."""
    classes = inputs.catalog.classes
    predictions = out_of_sample_predictions(inputs, name)
    assert predictions is not None, "what is recommended has out-of-sample rows"
    issues = label_issues.find_label_issues(predictions.probabilities, predictions.labels)
    splits, ids = predictions.split.tolist(), predictions.sample_ids.tolist()
    paths = [inputs.image_paths.get(key, "") for key in zip(splits, ids, strict=True)]
    text = label_issues.issues_csv(issues, predictions.probabilities, predictions.labels, splits, ids, paths, classes)
    summary = {"model": name, "n": len(ids), "in_doubt": len(issues.rows)}
    thresholds = [None if np.isnan(value) else float(value) for value in issues.thresholds]
    counts = None if issues.counts is None else issues.counts.tolist()
    detail = {"classes": list(classes), "thresholds": thresholds, "confident_joint": counts}
    return LabelIssueTable(text, summary | detail, summary)
