"""Comparison of all exported files of a workspace: test accuracy, latency and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_record, replacing
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation.drawing import library_defaults
from utils.exporting import export_folder
from utils.numeric.pareto import pareto_front

PICTURE = "exports.png"
AXES = {"latency_ms": "latency of one image [ms]", "size_mb": "file size [MB]"}
MARKERS = "osD^vP*X"
MAX_NAME_LENGTH = 24  # letters
DPI = 130


def compare_exports(workspace: Workspace) -> Result:
    """List all files whose parity check passed, and draw `metrics_output/ensembles/exports.png`.

    Pareto-optimal files in accuracy, latency and size are marked. A file that passed its parity check has its
    ensemble's accuracy, if `evaluate` has measured it. Raises UserError if there are no exports.
    """
    rows: list[dict[str, Any]] = []
    for status_path in sorted(workspace.exports.glob(f"[!.]*/{export_folder.STATUS}")):
        if not export_folder.is_replaceable(status_path.parent):
            continue
        name = status_path.parent.name
        accuracy = _measured_accuracy(workspace, name)
        for format_name, entry in sorted((export_folder.read_status(status_path.parent) or {}).items()):
            if entry["status"] == "ok" and entry.get("parity"):
                rows.append(
                    {
                        "name": name,
                        "format": format_name,
                        "accuracy": (entry.get("test_accuracy") or {}).get("file", accuracy),
                        "latency_ms": entry.get("latency_ms"),
                        "size_mb": entry["size_mb"],
                        "max_abs_diff": entry["parity"]["max_abs_diff"],
                    }
                )
    if not rows:
        raise UserError(f"{workspace.exports}: nothing is exported. Run: python ensemble_orchestrator.py export")
    for row, is_on_front in zip(rows, pareto_front([_costs(row) for row in rows]).tolist(), strict=True):
        row["pareto"] = is_on_front
    picture = workspace.scores / PICTURE if any(row["accuracy"] is not None for row in rows) else None
    text = _table(rows)
    if picture is not None:
        draw_comparison(rows, picture)
        text += f"\nwritten: {picture}"
    return Result(text, {"rows": rows, "picture": None if picture is None else str(picture)})


def draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against latency and against size, as PNG; markers of Pareto-optimal files are filled."""
    with library_defaults():
        _draw_comparison(rows, path)


def _draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    formats = sorted({row["format"] for row in rows})
    for axes, key, label in zip(panels, AXES, AXES.values(), strict=True):
        for index, format_name in enumerate(formats):
            points = [row for row in rows if row["format"] == format_name and None not in (row["accuracy"], row[key])]
            for is_pareto in (True, False):
                drawn = [row for row in points if row["pareto"] == is_pareto]
                axes.scatter(
                    [row[key] for row in drawn],
                    [row["accuracy"] for row in drawn],
                    color=f"C{index}" if is_pareto else "none",
                    edgecolor=f"C{index}",
                    linewidth=1.5,
                    marker=MARKERS[index % len(MARKERS)],
                    label=format_name if is_pareto == any(row["pareto"] for row in points) and drawn else None,
                )
            for row in points:
                if row["pareto"]:
                    name = (
                        row["name"]
                        if len(row["name"]) <= MAX_NAME_LENGTH
                        else row["name"][: MAX_NAME_LENGTH - 1] + "\u2026"
                    )
                    # The offset depends on the format, since equal accuracies are common.
                    at = {"xytext": (4, -9 - 7 * index), "textcoords": "offset points", "fontsize": 6}
                    axes.annotate(name, (row[key], row["accuracy"]), color=f"C{index}", parse_math=False, **at)
        if any((row[key] or 0) > 0 for row in rows):  # a logarithmic axis without values has no limits
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy")
    panels[1].legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None})


def _measured_accuracy(workspace: Workspace, name: str) -> float | None:
    for path in (workspace.ensemble_metrics(name, "test"), workspace.member_metrics(name, "test")):
        record = read_record(path, remedy="Evaluate again", form={"accuracy": float})
        if record is not None:
            return float(record["accuracy"])
    return None


def _costs(row: dict[str, Any]) -> list[float]:
    """Costs of a row, where lower is better; NaN for missing values."""
    signs = {"accuracy": -1, "latency_ms": 1, "size_mb": 1}
    return [float("nan") if row[key] is None else sign * row[key] for key, sign in signs.items()]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'name':<{width}}  format       accuracy    latency     size  largest difference"]
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        latency = "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f} ms"
        mark = "  Pareto-optimal" if row["pareto"] else ""
        lines.append(
            f"{row['name']:<{width}}  {row['format']:<11}  {accuracy:>8}  {latency:>9}  {row['size_mb']:>5.1f} MB  "
            f"{row['max_abs_diff']:.1e}{mark}"
        )
    return "\n".join(lines)
