"""Pictures of one member's or ensemble's scores, drawn from its `metrics.json` alone; matplotlib comes with the first.

Figures are made without pyplot, so that no setting of the process is changed and no window is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.artifacts import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
MOST_NAMES = 40  # classes whose names and numbers can still be read
LONGEST = 18  # letters of a class's name


def draw(kind: str, record: Mapping[str, Any], path: Path) -> None:
    """Write one of `KINDS` of a `metrics.json` record as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = record["n_classes"]
    side = 5.0 if kind in ("reliability", "risk_coverage") else min(14.0, max(5.0, 2.5 + 0.35 * classes))
    figure = Figure(figsize=(side, side * (0.85 if kind != "per_class_metrics" else 0.6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    KINDS[kind](axes, record)
    axes.set_title(f"{_plain(record['name'], 60)}: {record['split']}, {record['n_samples']} rows", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None})


def confusion_matrix(axes: Axes, record: Mapping[str, Any]) -> None:
    """Rows are the true classes, colours shares of their rows, numbers counts."""
    counts = np.array(record["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(counts) > MOST_NAMES:
        return
    names = [_plain(name, LONGEST) for name in record["per_class"]]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = shares[row, column] > 0.5
        color = "white" if dark else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)


def reliability(axes: Axes, record: Mapping[str, Any]) -> None:
    """Accuracy over confidence in 15 bins, the diagonal being perfect, and where the rows are."""
    found = record["reliability"]
    filled = [bin_ for bin_, count in enumerate(found["count"]) if count]
    confidence, accuracy = ([found[key][bin_] for bin_ in filled] for key in ("confidence", "accuracy"))
    share = np.array(found["count"]) / record["n_samples"]
    width = 1 / len(share)
    axes.bar((np.arange(len(share)) + 0.5) * width, share, width * 0.95, color="#d0d7de", label="share of rows")
    axes.plot([0, 1], [0, 1], color="#6e7781", linestyle="--", linewidth=1, label="perfect")
    axes.plot(confidence, accuracy, color="#0550ae", marker="o", markersize=4, label="accuracy")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    axes.text(0.03, 0.8, f"ECE {record['ece']:.4f}\nMCE {record['mce']:.4f}", fontsize=8, transform=axes.transAxes)
    axes.legend(loc="upper left", fontsize=8, frameon=False)


def risk_coverage(axes: Axes, record: Mapping[str, Any]) -> None:
    """Error among the surest rows, over the share of rows that are answered."""
    found = record["selective"]
    axes.plot(found["coverage"], found["risk"], color="#0550ae")
    axes.axhline(found["wanted_error"], color="#cf222e", linestyle="--", linewidth=1, label="wanted error")
    if found["answered"] is not None and found["error"] is not None:
        axes.plot([found["answered"]], [found["error"]], "o", color="#cf222e", label="threshold from val")
    axes.set(xlabel="share of rows answered", ylabel="error among them", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=8, frameon=False)


def per_class_metrics(axes: Axes, record: Mapping[str, Any]) -> None:
    """Precision, recall and F1 of each class."""
    names = list(record["per_class"])
    places = np.arange(len(names))
    for shift, (key, color) in enumerate((("precision", "#0550ae"), ("recall", "#bf8700"), ("f1", "#1a7f37"))):
        values = [record["per_class"][name][key] for name in names]
        axes.bar(places + 0.27 * (shift - 1), values, 0.25, color=color, label=key)
    if len(names) <= MOST_NAMES:
        axes.set_xticks(places, [_plain(name, LONGEST) for name in names], rotation=45, ha="right", fontsize=7)
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower left", fontsize=8)


def _plain(name: str, longest: int) -> str:
    """A name as it stands, not read as a formula, cut where it is too long; what no font can draw as an escape."""
    name = name.encode("utf-8", "backslashreplace").decode().replace("\n", " ").replace("$", r"\$")
    return name if len(name) <= longest else f"{name[: longest - 3]}..."


KINDS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "confusion_matrix": confusion_matrix,
    "reliability": reliability,
    "risk_coverage": risk_coverage,
    "per_class_metrics": per_class_metrics,
}
"""Name of the file -> what draws it."""
