"""The report's ranking: the first models, the others behind one click, and a forest plot of each score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import format_count, format_interval, format_number, format_percent
from utils.evaluation import leaderboard
from utils.evaluation.report import report_figures
from utils.evaluation.report.report_data import ReportData

MOST_ROWS = 12
"""Rows that are shown initially; recommended models below them are added."""
SAME = ("accuracy", "f1_macro", "log_loss", "brier", "ece")
"""Models whose values of these metrics are equal to nine digits count as models of equal predictions"""
NONE = "-"


def ranking(data: ReportData) -> dict[str, Any]:
    """Return `{rows, more, count, figures}`: rows shown initially and behind a click, and plots of the former."""
    leaders = _equal_models(data)
    rows = [row for row in data.ranking["rows"] if row["name"] in leaders]
    always_shown = {(data.ranking.get(key) or {}).get("name") for key in leaderboard.CHOICES} | {data.focus}
    first = [
        row
        for index, row in enumerate(rows)
        if index < MOST_ROWS or always_shown & {row["name"], *leaders[row["name"]]}
    ]
    names = {row["name"] for row in first}
    return {
        "rows": [_row(data, row, leaders[row["name"]]) for row in first],
        "more": [_row(data, row, leaders[row["name"]]) for row in rows if row["name"] not in names],
        "count": len(data.ranking["rows"]),
        "figures": [_forest(data, metric, first) for metric in ("accuracy", "log_loss")],
    }


def _equal_models(data: ReportData) -> dict[str, list[str]]:
    """Return {representative model: other models of equal predictions}, in the order of the ranking.

    The recommended model represents its equals, else the first. Models of which only one is contaminated or ranked do
    not count as equal.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in data.ranking["rows"]:
        record = data.metrics.get(row["name"], {})
        values = [record.get(key) for key in SAME]
        rounded = tuple(None if value is None else round(value, 9) for value in values)
        identity = () if record else (row["name"],)  # without a record, its predictions are unknown
        key = (
            *identity,
            *rounded,
            (record.get("crossfit") or {}).get("n"),
            row.get("contaminated"),
            row["rank"] is None,
        )
        groups.setdefault(key, []).append(row["name"])
    named = [(data.ranking.get(key) or {}).get("name") for key in leaderboard.CHOICES]
    leaders = {}
    for names in groups.values():
        leader = min(names, key=lambda name: named.index(name) if name in named else len(named))
        leaders[leader] = [name for name in names if name != leader]
    return leaders


def _row(data: ReportData, row: Mapping[str, Any], equal: list[str]) -> dict[str, Any]:
    record = data.metrics.get(row["name"], {})
    bounds = record.get("ci95") or row.get("ci95") or {}
    out_of_sample = (record.get("crossfit") or {}).get("log_loss")
    calibrated = record.get("calibrated_log_loss")
    excluded = (data.ranking["recommended"].get("not_compared") or {}).get(row["name"], "")
    accuracy = bounds.get("accuracy")
    return {
        "rank": NONE if row["rank"] is None else row["rank"],
        "name": row["name"],
        "equal": equal,
        "kind": row["kind"],
        "marks": leaderboard.marks(row, data.ranking),
        "accuracy": format_percent(row["accuracy"]),
        "accuracy_ci": format_interval([100 * bound for bound in accuracy], 1) if accuracy else "",
        "f1": format_number(row["f1_macro"]),
        "log_loss": format_number(row["log_loss"]),
        "log_loss_ci": format_interval(bounds.get("log_loss")),
        "calibrated": NONE if calibrated is None else format_number(calibrated),
        "ece": format_number(row["ece"]),
        "out_of_sample": NONE if out_of_sample is None else format_number(out_of_sample),
        "excluded": excluded,
    }


def _forest(data: ReportData, metric: str, rows: list[Mapping[str, Any]]) -> dict[str, str]:
    bars, measured = [], False
    for row in rows:
        record = data.metrics.get(row["name"], row)
        low, high = (record.get("ci95") or {}).get(metric) or (None, None)
        measured |= low is not None
        marked = row["name"] == data.focus
        bars.append(report_figures.Bar(row["name"], record[metric], low, high, row["kind"], marked))
    title = "Accuracy" if metric == "accuracy" else "Log-loss"
    better = "higher is better" if metric == "accuracy" else "lower is better"
    intervals = "lines are 95% intervals" if measured else "intervals are not measured"
    models = format_count(len(bars), "model")
    shown = models if len(bars) == len(data.ranking["rows"]) else f"{models} of the table above"
    label = f"{title} of {shown} on {format_count(data.ranking['n'], 'row')} of {data.split}; {better}; {intervals}"
    legend = f"Diamond: {data.focus}. Circles: ensembles. Squares: single members."
    return {"title": title, "svg": report_figures.forest(bars, title.lower(), label), "caption": f"{label}. {legend}"}
