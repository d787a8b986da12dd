"""Every exported form of a workspace side by side: size and latency as they were measured, beside the test accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils import export_folder
from utils.artifacts import read_json
from utils.errors import UserError
from utils.results import Result
from utils.workspace import Workspace


def compare(workspace: Workspace) -> Result:
    """One row for each file that is `ok`; those that no other beats in accuracy, latency and size are marked.

    A file answers like its ensemble (that is what `ok` means), so it has that one's accuracy, where `evaluate` has
    measured it. Raises UserError where nothing is exported.
    """
    rows: list[dict[str, Any]] = []
    for place in sorted(workspace.exports.glob(f"[!.]*/{export_folder.STATUS}")):
        if not export_folder.is_ours(place.parent):
            continue
        name = place.parent.name
        score = _score(workspace, name)
        for kind, entry in sorted(read_json(place, remedy=export_folder.AGAIN).items()):
            if entry["status"] == "ok" and entry.get("parity"):
                rows.append(
                    {
                        "name": name,
                        "format": kind,
                        "accuracy": score,
                        "latency_ms": entry.get("latency_ms"),
                        "size_mb": entry["size_mb"],
                        "max_abs_diff": entry["parity"]["max_abs_diff"],
                    }
                )
    if not rows:
        raise UserError(f"{workspace.exports}: nothing is exported. Run: python ensemble_orchestrator.py export")
    for row in rows:
        row["pareto"] = not any(_beats(other, row) for other in rows)
    return Result(_table(rows), {"rows": rows})


def _score(workspace: Workspace, name: str) -> float | None:
    for place in (workspace.ensemble_metrics(name, "test"), workspace.member_metrics(name, "test")):
        record = read_json(place, remedy="Evaluate again")
        if record is not None:
            return float(record["accuracy"])
    return None


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one is nowhere worse and somewhere better; what is not known of both is left out of account."""
    signs = {"accuracy": -1, "latency_ms": 1, "size_mb": 1}
    pairs = [
        (sign * one[key], sign * other[key])
        for key, sign in signs.items()
        if one[key] is not None and other[key] is not None
    ]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'name':<{width}}  format       accuracy  one image     size  largest difference"]
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        latency = "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f} ms"
        mark = "  nothing is better in all" if row["pareto"] else ""
        lines.append(
            f"{row['name']:<{width}}  {row['format']:<11}  {accuracy:>8}  {latency:>9}  {row['size_mb']:>5.1f} MB  "
            f"{row['max_abs_diff']:.1e}{mark}"
        )
    return "\n".join(lines)
