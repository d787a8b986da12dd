"""Tables of single classes for papers: metrics of each class, confusion matrix with row percentages, curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from utils.evaluation.table_formats import csv_text, escape_latex, escape_markdown, latex_table, markdown_table
from utils.numeric.curves import POINT_KEYS

Record = Mapping[str, Any]
RATES = {
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "positive_predictive_value": "PPV",
    "negative_predictive_value": "NPV",
}
FIGURES = RATES | {"f1": "F1", "average_precision": "AP", "roc_auc": "AUC"}
"""{key of `per_class`: heading}"""
MAX_PRINTED_CLASSES = 40
"""With more classes, a confusion matrix is written only as CSV, since it does not fit a page."""
NOTHING = "--"


def texts(record: Record) -> dict[str, dict[str, str | None]]:
    """Return {per_class, confusion_matrix, curves: {suffix: text}} of a `metrics.json`; None for missing tables."""
    has_matrix = record["confusion_matrix"] is not None
    is_printed = has_matrix and len(record["per_class"]) <= MAX_PRINTED_CLASSES
    return {
        "per_class": {
            "csv": per_class_csv(record),
            "md": markdown_table(*_per_class(record, "md")),
            "tex": latex_table(*_per_class(record, "tex"), f"l{'r' * (len(FIGURES) + 1)}"),
        },
        "confusion_matrix": {
            "csv": confusion_csv(record) if has_matrix else None,
            "md": markdown_table(*_confusion(record, "md")) if is_printed else None,
            "tex": latex_table(*_confusion(record, "tex"), f"l{'r' * (len(record['per_class']) + 1)}")
            if is_printed
            else None,
        },
        "curves": {"csv": curves_csv(record) if record["curves"] else None},
    }


def per_class_csv(record: Record) -> str:
    """Return CSV with one line per class: metrics with their intervals, at full precision."""
    header = ["class", "support"]
    for key in FIGURES:
        header += [key, *([f"{key}_low", f"{key}_high"] if key != "f1" else [])]
    lines = []
    for name, figures in record["per_class"].items():
        line: list[object] = [name, figures["support"]]
        for key in FIGURES:
            bounds = (figures["ci95"] or {}).get(key) or (None, None)
            line += [figures[key], *(bounds if key != "f1" else ())]
        lines.append(line)
    return csv_text(header, lines)


def _per_class(record: Record, form: str) -> tuple[list[str], list[list[str]]]:
    escaped = escape_markdown if form == "md" else escape_latex
    interval = "{:.4f} [{:.4f}, {:.4f}]" if form == "md" else "{:.4f} {{\\scriptsize [{:.4f}, {:.4f}]}}"
    lines = []
    for name, figures in record["per_class"].items():
        cells = []
        for key in FIGURES:
            bounds, value = (figures["ci95"] or {}).get(key), figures[key]
            cells.append(NOTHING if value is None else interval.format(value, *bounds) if bounds else f"{value:.4f}")
        lines.append([escaped(name), str(figures["support"]), *cells])
    return ["class", "rows", *FIGURES.values()], lines


def _percentages(counts: np.ndarray) -> np.ndarray:
    """Return counts (C, C) as percentages of the rows of the true class; 0 for a class without rows."""
    percentages: np.ndarray = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return percentages


def confusion_csv(record: Record) -> str:
    """Return CSV with one line per true class: counts by predicted class, percentages of the class, and its rows."""
    names, counts = list(record["per_class"]), np.array(record["confusion_matrix"])
    header = ["true class", *names, *(f"{name} %" for name in names), "rows"]
    percentages = _percentages(counts)
    lines = [
        [name, *counts[row].tolist(), *percentages[row].tolist(), int(counts[row].sum())]
        for row, name in enumerate(names)
    ]
    return csv_text(header, lines)


def _confusion(record: Record, form: str) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of cells with counts and percentages of the true class."""
    escaped, percent = (escape_markdown, "%") if form == "md" else (escape_latex, r"\%")
    names, counts = list(record["per_class"]), np.array(record["confusion_matrix"])
    percentages = _percentages(counts)
    lines = []
    for row, name in enumerate(names):
        cells = [
            f"{count} ({share:.1f}{percent})" if count else "0"
            for count, share in zip(counts[row].tolist(), percentages[row].tolist(), strict=True)
        ]
        lines.append([escaped(name), *cells, str(int(counts[row].sum()))])
    return ["true class", *map(escaped, names), "rows"], lines


def curves_csv(record: Record) -> str:
    """Return CSV with one line per class and threshold; the true positive rate is the recall."""
    lines = [
        (name, *point)
        for name, curve in record["curves"].items()
        for point in zip(*(curve[key] for key in POINT_KEYS), strict=True)
    ]
    return csv_text(["class", *POINT_KEYS], lines)
