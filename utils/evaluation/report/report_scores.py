"""The report's section on metrics as in papers: scores of several models, curves of classes, folds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import format_interval, format_number, format_p_value
from utils.evaluation.leaderboard import HEADINGS
from utils.evaluation.report import report_figures
from utils.evaluation.report.report_data import ReportData

SHOWN = (
    *("accuracy", "balanced_accuracy", "f1_macro", "matthews_corrcoef", "cohen_kappa", "roc_auc_ovr_macro"),
    *("average_precision_macro", "top_3_accuracy", "top_5_accuracy", "log_loss", "brier"),
)
FOLD_KEYS = ("accuracy", "balanced_accuracy", "f1_macro", "matthews_corrcoef")
MAX_DRAWN_CLASSES = 40


def scores(data: ReportData) -> dict[str, Any] | None:
    """Return tables of scores and of folds, ROC and precision-recall curves; None for records of an earlier version."""
    if "matthews_corrcoef" not in data.evaluated:
        return None
    names = [name for name in dict.fromkeys([data.focus, *data.peers.values()]) if name in data.metrics]
    rows = [
        {
            "title": _title(key),
            "cells": [_cell(data.metrics[name], key) for name in names],
        }
        for key in SHOWN
        if data.evaluated.get(key) is not None
    ]
    return {"names": names, "rows": rows, "folds": _folds(data, names), "figures": _curves(data), "test": _delong(data)}


def _title(key: str) -> str:
    return HEADINGS[key][:1].upper() + HEADINGS[key][1:]


def _cell(record: Mapping[str, Any], key: str) -> dict[str, str]:
    value = record.get(key)
    bounds = format_interval((record.get("ci95") or {}).get(key), 3)
    return {"value": "-" if value is None else format_number(value, 3), "interval": bounds}


def _folds(data: ReportData, names: list[str]) -> dict[str, Any] | None:
    """Return mean and deviation of each model that has folds; None if no model has any."""
    rows = []
    for name in names:
        folds = data.metrics[name].get("folds")
        if folds:
            cells = [f"{folds[key]['mean']:.3f} ± {folds[key]['deviation']:.3f}" for key in FOLD_KEYS]
            rows.append({"name": name, "k": folds["k"], "rows": f"{folds['n']} ({folds['rows']})", "cells": cells})
    return {"titles": [_title(key) for key in FOLD_KEYS], "rows": rows} if rows else None


def _delong(data: ReportData) -> str:
    """Return a sentence on DeLong's test against the best single member; "" if there is none."""
    compared = data.evaluated.get("vs_best_single") or {}
    if compared.get("delta_roc_auc") is None:
        return ""
    interval = format_interval(compared.get("delta_roc_auc_ci95"), 4)
    p_value = compared.get("delong_p")
    p_text = "" if p_value is None else f"; DeLong's test: {format_p_value(p_value)}"
    difference = f"{compared['delta_roc_auc']:+.4f}{f' {interval}' if interval else ''}"
    return f"AUC of {data.focus} less that of {compared['name']}: {difference}{p_text}."


def _curves(data: ReportData) -> list[dict[str, str]]:
    curves, by_class = data.evaluated.get("curves") or {}, data.evaluated["per_class"]
    if not curves or len(curves) > MAX_DRAWN_CLASSES:
        return []
    roc = {
        name: ([0.0, *curve["false_positive_rate"]], [0.0, *curve["true_positive_rate"]])
        for name, curve in curves.items()
    }
    recall = {name: (curve["true_positive_rate"], curve["precision"]) for name, curve in curves.items()}
    figures = []
    for title, points, area, axes in (
        ("ROC curves", roc, "roc_auc", ("false positive rate", "true positive rate")),
        ("Precision-recall curves", recall, "average_precision", ("recall", "precision")),
    ):
        label = f"{title} of {data.focus} on {data.counted_rows}, each class against the rest"
        areas = {name: by_class[name][area] for name in points}
        svg = report_figures.class_curves(points, areas, axes, label)
        figures.append({"title": title, "svg": svg, "caption": f"{label}. Areas are in the table of classes."})
    return figures
