"""The report's section on external sets: each model compared with the test split, and classes whose recall drops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.artifacts import read_record
from utils.core.display_text import format_interval, format_number, format_percent
from utils.core.workspace import Workspace
from utils.evaluation import external_text
from utils.evaluation.external_records import EXTERNAL_SET

MAX_LISTED = 50
"""Left-out images that are named on the page; `external.json` names all."""


def read_sets(workspace: Workspace) -> list[Mapping[str, Any]]:
    """Read the records of all external sets. Raises UserError for a damaged one."""
    records = (
        read_record(path, remedy="Remove it, then evaluate again", form=EXTERNAL_SET)
        for path in workspace.external_sets()
    )
    return [record for record in records if record is not None]


def section(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the section on one external set."""
    focus = external_text.focus_of(record)
    left_out = record["left_out_images"]
    images = [(image, f"is {same}") for image, same in left_out["copies"].items()]
    images += list(left_out["unreadable"].items())
    return {
        "name": record["set"],
        "focus": focus,
        "about": external_text.about_the_set(record),
        "sentences": external_text.sentences(record, focus),
        "rows": [_row(record, row, focus) for row in record["rows"]],
        "classes": [_class_row(entry) for entry in record["models"][focus]["classes"]],
        "left_out": images[:MAX_LISTED],
        "more": len(images) - len(images[:MAX_LISTED]),
    }


def _row(record: Mapping[str, Any], row: Mapping[str, Any], focus: str) -> dict[str, Any]:
    model = record["models"][row["name"]]
    accuracy, area = model["drop"]["accuracy"], (model["ood_auroc"] or {}).get("energy")
    intervals = row["ci95"] or {}
    return {
        "rank": "-" if row["rank"] is None else row["rank"],
        "name": row["name"],
        "is_focus": row["name"] == focus,
        "accuracy": format_percent(row["accuracy"]),
        "accuracy_bounds": _percent_bounds(intervals.get("accuracy")),
        "test": format_percent(accuracy["test"]),
        "change": f"{100 * accuracy['change']:+.1f}",
        "change_bounds": _percent_bounds(accuracy["ci95"], "+"),
        "f1_macro": format_number(row["f1_macro"]),
        "log_loss": format_number(row["log_loss"]),
        "log_loss_bounds": format_interval(intervals.get("log_loss")),
        "ece": format_number(row["ece"]),
        "auroc": format_number(None if area is None else area["auroc"], 3),
        "auroc_bounds": format_interval(None if area is None else area["ci95"], 3),
    }


def _class_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": entry["class"],
        "test": f"{format_percent(entry['test'])} of {entry['test_support']:,}",
        "external": f"{format_percent(entry['external'])} of {entry['support']:,}",
        "change": f"{100 * entry['change']:+.1f}",
        "bounds": _percent_bounds(entry["ci95"], "+"),
        "drops": entry["drops"],
    }


def _percent_bounds(bounds: Any, sign: str = "") -> str:
    return "" if bounds is None else f"[{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]"
