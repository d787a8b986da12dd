"""The ranking of the report: which rows are shown first, models that predict the same, and who was no candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.core.display_text import format_count, format_interval, format_number, format_percent
from utils.evaluation import leaderboard
from utils.evaluation.report_data import PEERS, ReportData
from utils.predictions.catalog import is_chosen_on_val

MOST_ROWS = 12  # of the ranking before the folded table of all models
NONE = "-"
SAME = ("accuracy", "f1_macro", "log_loss", "ece")
"""Figures that are equal in every digit where two models predict the same"""
Row = Mapping[str, Any]


def table(data: ReportData) -> dict[str, Any]:
    """Rows of the ranking: `first` without models that only repeat another, and `all` where there are more."""
    shown = first_rows(data)
    repeated = twins(data.ranking["rows"], _named(data))
    cells = {row["name"]: _cells(row, data, repeated.get(row["name"], [])) for row in data.ranking["rows"]}
    every = list(cells.values())
    return {"first": [cells[name] for name in shown], "all": every if len(every) > len(shown) else []}


def first_rows(data: ReportData) -> list[str]:
    """Names of at most `MOST_ROWS` models in their order, with the recommended ones and their peers among them.

    Of models that predict the same there is one.
    """
    rows = data.ranking["rows"]
    repeating = {name for names in twins(rows, _named(data)).values() for name in names}
    names = [row["name"] for row in rows if row["name"] not in repeating]
    kept = [name for name in names if name in _named(data)]
    others = [name for name in names if name not in kept][: max(0, MOST_ROWS - len(kept))]
    return [name for name in names if name in kept or name in others]


def twins(rows: Sequence[Row], preferred: Sequence[str]) -> dict[str, list[str]]:
    """{model: those with equal figures}, for each set of equal models one: of `preferred`, else the first in order."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in SAME), []).append(row["name"])
    found = {}
    for names in groups.values():
        if len(names) > 1:
            kept = min(names, key=lambda name: preferred.index(name) if name in preferred else len(preferred))
            found[kept] = [name for name in names if name != kept]
    return found


def _named(data: ReportData) -> list[str]:
    """Models that the text names: the focus, the recommended ones, and what they are compared with."""
    chosen = [(data.ranking.get(key) or {}).get("name") for key in leaderboard.CHOICES]
    peers = [(data.ranking.get("peers") or {}).get(peer) for peer in PEERS]
    return [name for name in dict.fromkeys([data.focus, *chosen, *peers]) if name]


def no_candidate(record: Row, data: ReportData) -> str:
    """Why a model was not compared with the recommended one on the same rows; nothing where it was."""
    evidence, crossfit = data.ranking["recommended"]["evidence"], record.get("crossfit") or {}
    if record.get("unknown_training_data"):
        return "training data not stated"
    if not crossfit.get("n"):
        return "no out-of-sample rows"
    if is_chosen_on_val(data.catalog, [record["name"], *(record.get("members") or ())]):
        return f"{format_count(crossfit['n'], 'row')}; val has chosen it"
    if crossfit["n"] < evidence["n"]:
        return f"{crossfit['n']:,} val rows only" if evidence["rows"] == "oof+val" else f"{crossfit['n']:,} rows only"
    return ""


def _cells(row: Row, data: ReportData, repeated_by: Sequence[str]) -> dict[str, Any]:
    record = data.metrics.get(row["name"], {})
    bounds = record.get("ci95") or row.get("ci95") or {}
    out_of_sample, calibrated = (record.get("crossfit") or {}).get("log_loss"), record.get("calibrated_log_loss")
    accuracy = bounds.get("accuracy")
    return {
        "rank": NONE if row["rank"] is None else row["rank"],
        "name": row["name"],
        "same": ", ".join(repeated_by),
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
        "no_candidate": no_candidate(record, data) if record else "",
    }
