"""What the report says of ensembles that were learned: how each weighs its members, what it is held against, its cost.

Every ensemble of the workspace, not the recommended one alone; a part without a row is left out of the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import format_number, format_percent
from utils.distillation.controls import ALONE, TEACHER
from utils.evaluation.report_data import ReportData

MOST_MEMBERS = 30  # columns of the table of weights
NONE = "-"


def learned(data: ReportData) -> dict[str, Any]:
    """`{weights, verdicts, sparse, students}`, each as rows of a table."""
    return {
        "weights": weights(data),
        "verdicts": [
            {
                "name": name,
                "verdict": record["verdict"],
                "unseen": format_number((record.get("crossfit") or {}).get("log_loss")),
            }
            for name, record in data.records.items()
            if record.get("verdict") and record.get("guards")
        ],
        "sparse": [
            _sparse(data, name, record) for name, record in data.records.items() if record.get("expected_experts")
        ],
        "students": [
            _student(name, record, record["controls"])
            for name, record in data.metrics.items()
            if record.get("controls")
        ],
    }


def weights(data: ReportData) -> dict[str, Any]:
    """`{names, rows, more}`: each member's share in every ensemble of several that gives shares; most weight first."""
    shares = {name: own for name, record in data.records.items() if len(own := record.get("weights") or {}) > 1}
    total: dict[str, float] = {}
    for own in shares.values():
        for member, share in own.items():
            total[member] = total.get(member, 0.0) + share
    names = sorted(total, key=lambda member: (-total[member], member))
    rows = [
        {
            "name": name,
            "shares": [format_percent(own[member]) if member in own else NONE for member in names[:MOST_MEMBERS]],
        }
        for name, own in shares.items()
    ]
    return {"names": names[:MOST_MEMBERS], "rows": rows, "more": max(0, len(names) - MOST_MEMBERS)}


def _sparse(data: ReportData, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """How many members an image takes, beside all of them."""
    ways = record.get("beside") or {}
    own, whole = (ways.get(way) or {} for way in ("itself", "all_experts"))
    count = whole.get("experts", len(data.metrics[name]["members"]))
    return {
        "name": name,
        "experts": f"{record['expected_experts']:.2f} of {count:.0f}",
        "latency": f"{format_number(own.get('latency_ms'), 2)} against {format_number(whole.get('latency_ms'), 2)}",
        "accuracy": f"{format_percent(own.get('accuracy'))} against {format_percent(whole.get('accuracy'))}",
        "note": "the same for every image" if record.get("is_fixed") else "",
    }


def _student(name: str, record: Mapping[str, Any], controls: Mapping[str, Any]) -> dict[str, Any]:
    """A distilled network beside itself untaught and its teacher, on the rows of the page."""
    alone, teacher, kept = controls[ALONE], controls[TEACHER], record.get("gain_kept") or {}
    bounds = kept.get("ci95") or (None, None)
    low, high = ("open" if bound is None else format_percent(bound, 0) for bound in bounds)
    return {
        "name": name,
        "teacher": teacher["name"],
        "accuracy": [format_percent(each["accuracy"]) for each in (record, alone, teacher)],
        "log_loss": [format_number(each["log_loss"]) for each in (record, alone, teacher)],
        "size": [format_number(each.get("size_mb"), 2) for each in (record, alone, teacher)],
        "kept": NONE if kept.get("value") is None else f"{format_percent(kept['value'], 0)} [{low}, {high}]",
        "said": (record.get("notes") or {}).get("controls", ""),
    }
