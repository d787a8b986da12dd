"""Plots of one member's or ensemble's scores, drawn from its `metrics.json`; matplotlib is imported on first use.

Figures are made without pyplot, so that no global setting is changed and no window is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core import engines
from utils.core.artifacts import digest_of, replacing
from utils.evaluation.drawing import library_defaults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPARED, ALL, NONE = SELECTIONS = ("compared", "all", "none")
"""Models whose plots are drawn: those that the report compares, all in the ranking, or none."""
VERSION = 4  # incremented when the same scores would give different pictures
SHOWN = (
    *("name", "split", "n_samples", "n_classes", "confusion_matrix", "per_class", "reliability", "ece", "mce"),
    *("selective", "curves", "roc_auc_ovr_macro", "average_precision_macro"),
)
HEADER_BYTES = 4096  # first bytes of a PNG file, which contain its metadata
DPI = 130
MAX_NAMED_CLASSES = 40  # classes up to which names and numbers are readable
MAX_PERCENTAGES = 15  # classes up to which cells have space for a percentage below the count
MAX_LEGEND_CLASSES = 10  # classes up to which each curve has its own name and colour
MAX_NAME_LENGTH = 18  # characters of a class's name


@dataclass(frozen=True)
class Picture:
    """A plot of one of `KINDS` from a `metrics.json` record, and its PNG file."""

    kind: str
    record: Mapping[str, Any]
    path: Path

    @property
    def digest(self) -> str:
        """Digest of the scores that it shows."""
        return digest_of([VERSION, self.kind, {key: self.record[key] for key in SHOWN}])

    @property
    def is_current(self) -> bool:
        """Whether the file already shows these scores."""
        return self.path.is_file() and self.digest.encode() in self.path.read_bytes()[:HEADER_BYTES]


def shown_models(ranking: Mapping[str, Any], selection: str) -> set[str]:
    """Return the names of the models in a ranking whose plots are drawn; `selection` is one of `SELECTIONS`.

    The compared models are the recommended ones, the best single member, soft voting, greedy selection and the first of
    the ranking.
    """
    ranked = [row["name"] for row in ranking["rows"]]
    if selection == ALL:
        return set(ranked)
    if selection == NONE:
        return set()
    recommended = [(ranking[key] or {}).get("name") for key in ("recommended", "recommended_fast")]
    return {*recommended, *ranking["peers"].values(), *ranked[:1]} & set(ranked)


def draw_all(pictures: Sequence[Picture]) -> None:
    """Draw the pictures that do not exist yet, in several processes if there are many."""
    missing = [picture for picture in pictures if not picture.is_current]
    list(engines.current().map(draw, missing, description="pictures", n_processes=engines.cores()))


def draw(picture: Picture) -> None:
    """Write one picture, atomically."""
    with library_defaults():
        _draw(picture)


def _draw(picture: Picture) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind, record = picture.kind, picture.record
    by_class = kind in ("confusion_matrix", "per_class_metrics")
    per_class = 0.5 if kind == "confusion_matrix" and record["n_classes"] <= MAX_PERCENTAGES else 0.35
    side = min(14.0, max(5.0, 2.5 + per_class * record["n_classes"])) if by_class else 5.0
    height = max(4.0, side * 0.6) if kind == "per_class_metrics" else side * 0.9
    figure = Figure(figsize=(side, height))
    FigureCanvasAgg(figure)
    # Margins in inches; a layout engine would draw everything twice to determine them.
    left, below = (1.4, 1.3) if by_class else (0.7, 0.6)
    axes = figure.add_axes((left / side, below / height, 1 - (left + 0.2) / side, 1 - (below + 0.4) / height))
    KINDS[kind](axes, record)
    axes.set_title(f"{_plain(record['name'], 48)}: {record['split']}, {record['n_samples']} rows", fontsize=9)
    with replacing(picture.path) as temporary:
        figure.savefig(temporary, dpi=DPI, metadata={"Software": None, "Source": picture.digest})


def confusion_matrix(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw counts of true classes (rows) and predicted classes (columns); percentages and colours are by true class."""
    counts = np.array(record["confusion_matrix"])
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(counts) > MAX_NAMED_CLASSES:
        return
    names = [_plain(name, MAX_NAME_LENGTH) for name in record["per_class"]]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, column in zip(*np.nonzero(counts), strict=True):
        dark = fractions[row, column] > 0.5
        color = "white" if dark else "black"
        share = f"\n{100 * fractions[row, column]:.1f}%" if len(counts) <= MAX_PERCENTAGES else ""
        text = f"{counts[row, column]}{share}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def reliability(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw accuracy against confidence in 15 bins, with the fraction of rows in each."""
    bins = record["reliability"]
    filled = [index for index, count in enumerate(bins["count"]) if count]
    confidence, accuracy = ([bins[key][index] for index in filled] for key in ("confidence", "accuracy"))
    share = np.array(bins["count"]) / record["n_samples"]
    width = 1 / len(share)
    axes.bar((np.arange(len(share)) + 0.5) * width, share, width * 0.95, color="#d0d7de", label="fraction of rows")
    axes.plot([0, 1], [0, 1], color="#6e7781", linestyle="--", linewidth=1, label="perfect calibration")
    axes.plot(confidence, accuracy, color="#0550ae", marker="o", markersize=4, label="accuracy")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    errors = f"ECE {record['ece']:.4f}, MCE {record['mce']:.4f}"
    axes.legend(loc="upper left", fontsize=8, title=errors, title_fontsize=8)


def risk_coverage(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw the selective risk: error rate among the most confident rows, against the fraction of rows."""
    selective = record["selective"]
    axes.plot(selective["coverage"], selective["risk"], color="#0550ae")
    axes.axhline(selective["target_risk"], color="#cf222e", linestyle="--", linewidth=1, label="target risk")
    if selective["answered"] is not None and selective["error"] is not None:
        axes.plot([selective["answered"]], [selective["error"]], "o", color="#cf222e", label="threshold from val")
    axes.set(xlabel="coverage: fraction of rows answered", ylabel="selective risk: error rate", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", fontsize=8)


def per_class_metrics(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw precision, recall and F1 of each class: as bars, or as points if there are too many for names."""
    names = list(record["per_class"])
    positions = np.arange(len(names))
    is_named = len(names) <= MAX_NAMED_CLASSES
    for shift, (key, color) in enumerate((("precision", "#0550ae"), ("recall", "#bf8700"), ("f1", "#1a7f37"))):
        values = [record["per_class"][name][key] for name in names]
        if is_named:
            axes.bar(positions + 0.27 * (shift - 1), values, 0.25, color=color, label=key)
        else:
            axes.plot(positions, values, ".", color=color, markersize=3, label=key)
    if is_named:
        axes.set_xticks(
            positions, [_plain(name, MAX_NAME_LENGTH) for name in names], rotation=45, ha="right", fontsize=7
        )
    axes.set_ylim(0, 1.25)  # space for the legend
    axes.legend(loc="upper center", fontsize=8, ncols=3)


def roc_curves(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw the one-vs-rest ROC curve of each class."""
    points = {
        name: ([0, *curve["false_positive_rate"]], [0, *curve["true_positive_rate"]])
        for name, curve in record["curves"].items()
    }
    axes.plot([0, 1], [0, 1], color="#6e7781", linestyle="--", linewidth=1)
    _draw_curves(axes, points, {name: record["per_class"][name]["roc_auc"] for name in points}, "AUC")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")


def precision_recall_curves(axes: Axes, record: Mapping[str, Any]) -> None:
    """Draw the one-vs-rest precision-recall curve of each class."""
    points = {name: (curve["true_positive_rate"], curve["precision"]) for name, curve in record["curves"].items()}
    _draw_curves(axes, points, {name: record["per_class"][name]["average_precision"] for name in points}, "AP")
    axes.set(xlabel="recall", ylabel="precision")


def _draw_curves(
    axes: Axes,
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    areas: Mapping[str, float],
    area: str,
) -> None:
    """Draw steps through the points of each class, with a legend of names and areas if there are few classes."""
    is_named = len(points) <= MAX_LEGEND_CLASSES
    for name, (x, y) in points.items():
        label = f"{_plain(name, MAX_NAME_LENGTH)}, {area} {areas[name]:.3f}" if is_named else None
        steps = "steps-post" if area == "AUC" else "steps-pre"
        colour, opacity = (None, 1.0) if is_named else ("#0550ae", 0.4)
        axes.plot(x, y, drawstyle=steps, linewidth=1.2, label=label, color=colour, alpha=opacity)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    if is_named and points:
        axes.legend(loc="lower right" if area == "AUC" else "lower left", fontsize=7)


def _plain(name: str, max_length: int) -> str:
    """Return a name without mathtext, shortened if it is too long."""
    shown = name if len(name) <= max_length else f"{name[: max_length - 3]}..."
    return shown.replace("\n", " ").replace("$", r"\$")


KINDS: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
    "confusion_matrix": confusion_matrix,
    "reliability": reliability,
    "risk_coverage": risk_coverage,
    "per_class_metrics": per_class_metrics,
    "roc_curves": roc_curves,
    "precision_recall_curves": precision_recall_curves,
}
"""{name of the file: function that draws it}"""


def kinds_of(record: Mapping[str, Any]) -> list[str]:
    """Return the kinds of pictures that a record has data for; with many classes, neither matrix nor curves."""
    needs = {"confusion_matrix": "confusion_matrix", "roc_curves": "curves", "precision_recall_curves": "curves"}
    return [kind for kind in KINDS if kind not in needs or record[needs[kind]]]
