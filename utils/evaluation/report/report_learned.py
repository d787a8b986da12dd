"""The report's section on fitted ensembles: weights, comparison with baselines, cost, views, distilled networks.

It covers every ensemble of the workspace; a table without rows is left out of the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.building import view_builder
from utils.core.display_text import format_number, format_percent
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.distillation.controls import ALONE, TEACHER
from utils.evaluation.report.report_data import ReportData, median_milliseconds
from utils.predictions import view_members
from utils.predictions.catalog import Catalog

MAX_MEMBERS = 15  # columns of the table of weights
NONE = "-"


def learned(data: ReportData) -> dict[str, Any]:
    """Return `{weights, verdicts, sparse, views, students}`, each as rows of a table."""
    return {
        "weights": weights(data),
        "verdicts": [
            {
                "name": name,
                "verdict": record["verdict"],
                "log_loss": NONE
                if record.get("unknown_training_data")
                else format_number((record.get("crossfit") or {}).get("log_loss")),
            }
            for name, record in data.records.items()
            if record.get("verdict") and record.get("guards")
        ],
        "sparse": [
            _sparse(data, name, record) for name, record in data.records.items() if record.get("expected_experts")
        ],
        "views": views(data.workspace, data.catalog),
        "students": [
            _student(name, record, record["controls"])
            for name, record in data.metrics.items()
            if record.get("controls")
        ],
    }


def weights(data: ReportData) -> dict[str, Any]:
    """Return `{names, rows, more}`: weights in every ensemble with several members, largest total weight first."""
    by_ensemble = {
        name: member_weights
        for name, record in data.records.items()
        if len(member_weights := record.get("weights") or {}) > 1
    }
    total: dict[str, float] = {}
    for member_weights in by_ensemble.values():
        for member, weight in member_weights.items():
            total[member] = total.get(member, 0.0) + weight
    names = sorted(total, key=lambda member: (-total[member], member))
    shown = names[:MAX_MEMBERS]
    rows = [
        {
            "name": name,
            "weights": [
                format_percent(member_weights[member]) if member in member_weights else NONE for member in shown
            ],
        }
        for name, member_weights in by_ensemble.items()
    ]
    return {"names": shown, "rows": rows, "more": len(names) - len(shown)}


def views(workspace: Workspace, catalog: Catalog) -> list[dict[str, Any]]:
    """Return the views of test-time augmentation of each member, with their gain; empty if no views were tried."""
    rows = []
    for member in catalog.members.values():
        try:
            record = None if member.views else view_members.record_of(workspace, member.name)
        except UserError:  # a damaged record, for which reading the catalog gave a warning
            continue
        if record is None or record["networks"] != view_members.networks_digest(member):
            continue
        low, high = record.get("log_loss_gain_ci95") or (None, None)
        gain = record.get("log_loss_gain")
        rows.append(
            {
                "member": member.name,
                "views": ", ".join(record["views"]) or "none",
                "passes": view_builder.forward_passes(record["views"]),
                "gain": NONE if gain is None else f"{gain:+.4f}",
                "bounds": "" if low is None else f"[{low:+.4f}, {high:+.4f}]",
                "note": view_builder.why_without(record),
            }
        )
    return rows


def _sparse(data: ReportData, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row on a sparse ensemble, compared with running all its members."""
    variants = record.get("beside") or {}
    sparse, dense = (variants.get(key) or {} for key in ("itself", "all_experts"))
    count = dense.get("experts", len(data.metrics[name]["members"]))
    latency, accuracy = (
        [format_of(variant.get(key)) for variant in (sparse, dense)]
        for key, format_of in (("latency_ms", lambda value: format_number(value, 2)), ("accuracy", format_percent))
    )
    return {
        "name": name,
        "experts": f"{record['expected_experts']:.2f} of {count:.0f}",
        "latency": " / ".join(latency),
        "accuracy": " / ".join(accuracy),
        "note": "the same for every image" if record.get("is_fixed") else "",
    }


def _student(name: str, record: Mapping[str, Any], controls: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row on a distilled network, the same network trained without a teacher, and the teacher."""
    baseline, teacher, gain_kept = controls[ALONE], controls[TEACHER], record.get("gain_kept") or {}
    bounds = gain_kept.get("ci95") or (None, None)
    low, high = ("unbounded" if bound is None else format_percent(bound, 0) for bound in bounds)
    value = gain_kept.get("value")
    models = (record, baseline, teacher)
    return {
        "name": name,
        "teacher": teacher["name"],
        "accuracy": [format_percent(model["accuracy"]) for model in models],
        "log_loss": [format_number(model["log_loss"]) for model in models],
        "size": [format_number(model.get("size_mb"), 2) for model in models],
        "latency": [format_number(median_milliseconds(model), 2) for model in (baseline, baseline, teacher)],
        "kept": NONE if value is None else f"{format_percent(value, 0)} [{low}, {high}]",
        "verdict": (record.get("notes") or {}).get("controls", ""),
    }
