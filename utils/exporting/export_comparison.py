"""Every exported form of a workspace side by side: size and latency as they were measured, beside the test accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_json, replacing
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.exporting import export_folder
from utils.numeric.pareto import pareto_front

PICTURE = "exports.png"
AXES = {"latency_ms": "one image [ms]", "size_mb": "file [MB]"}
MARKERS = "osD^vP*X"
MAX_NAME_LENGTH = 24  # letters of a name
DPI = 130


def compare_exports(workspace: Workspace) -> Result:
    """One row for each file that is `ok`; those that no other beats in accuracy, latency and size are marked, also in
    the picture `metrics_output/ensembles/exports.png`.

    A file answers like its ensemble (that is what `ok` means), so it has that one's accuracy, where `evaluate` has
    measured it. Raises UserError where nothing is exported.
    """
    rows: list[dict[str, Any]] = []
    for place in sorted(workspace.exports.glob(f"[!.]*/{export_folder.STATUS}")):
        if not export_folder.is_replaceable(place.parent):
            continue
        name = place.parent.name
        score = _score(workspace, name)
        for kind, entry in sorted(read_json(place, remedy=export_folder.EXPORT_AGAIN).items()):
            if entry["status"] == "ok" and entry.get("parity"):
                rows.append(
                    {
                        "name": name,
                        "format": kind,
                        "accuracy": (entry.get("test_accuracy") or {}).get("file", score),
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
    """Accuracy against one image's milliseconds and against size, as PNG; full marks where nothing is better in all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    kinds = sorted({row["format"] for row in rows})
    for axes, key, words in zip(panels, AXES, AXES.values(), strict=True):
        for place, kind in enumerate(kinds):
            own = [row for row in rows if row["format"] == kind and None not in (row["accuracy"], row[key])]
            for best in (True, False):
                some = [row for row in own if row["pareto"] == best]
                axes.scatter(
                    [row[key] for row in some],
                    [row["accuracy"] for row in some],
                    color=f"C{place}" if best else "none",
                    edgecolor=f"C{place}",
                    linewidth=1.5,
                    marker=MARKERS[place % len(MARKERS)],
                    label=kind if best == any(row["pareto"] for row in own) and some else None,
                )
            for row in own:
                if row["pareto"]:
                    name = (
                        row["name"]
                        if len(row["name"]) <= MAX_NAME_LENGTH
                        else row["name"][: MAX_NAME_LENGTH - 1] + "\u2026"
                    )
                    # Names of other formats lie lower, since equal accuracies are common.
                    at = {"xytext": (4, -9 - 7 * place), "textcoords": "offset points", "fontsize": 6}
                    axes.annotate(name, (row[key], row["accuracy"]), color=f"C{place}", parse_math=False, **at)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(words)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test")
    panels[1].legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None})


def _score(workspace: Workspace, name: str) -> float | None:
    for place in (workspace.ensemble_metrics(name, "test"), workspace.member_metrics(name, "test")):
        record = read_json(place, remedy="Evaluate again")
        if record is not None:
            return float(record["accuracy"])
    return None


def _costs(row: dict[str, Any]) -> list[float]:
    """What a row costs, lower being better; NaN where it is not known."""
    signs = {"accuracy": -1, "latency_ms": 1, "size_mb": 1}
    return [float("nan") if row[key] is None else sign * row[key] for key, sign in signs.items()]


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
