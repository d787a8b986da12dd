"""Figures of the report as inline SVG in the colours of the page, for light mode, dark mode and print.

matplotlib draws them in placeholder colours, which are replaced by CSS variables; text remains text. Every figure has a
label for screen readers, and its values are also on the page as a table or in sentences.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.core.display_text import join_names, printable
from utils.evaluation.drawing import library_defaults
from utils.evaluation.report.figure_cache import drawn_once

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, LINE, ACCENT, SECOND, THIRD = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
HEAT = (0.23, 0.43, 0.80)  # RGB colour of cells, whose opacity makes them readable on white and on black
MAX_OPACITY = 0.75
WIDTH = 7.2  # inches
PLACES = [
    *((x, y, side) for y in (10, -10) for x, side in ((4, "left"), (-4, "right"))),
    *((x, 0, side) for x, side in ((8, "left"), (-8, "right"))),
    *((x, y, side) for y in (22, -22, 34, -34) for x, side in ((4, "left"), (-4, "right"))),
]
"""Candidate positions of a point's label: offset in points to the right and up, and text alignment; best first."""
MAX_NUMBERED_CLASSES = 15  # with more, cells are too small for numbers
MAX_TICK_LABELS = 40
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Bar:
    """One line of a forest plot."""

    name: str
    value: float
    low: float | None
    high: float | None
    kind: str
    """member or ensemble"""
    marked: bool
    """Whether it is the recommended one."""


class _Drawing:
    """A figure in progress, and its SVG when it is finished."""

    def __init__(self, rows: int, columns: int, height: float, width: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.figure.patch.set_alpha(0)
        self.axes: list[Axes] = list(np.ravel(self.figure.subplots(rows, columns, squeeze=False)))
        for axes in self.axes:
            axes.patch.set_alpha(0)
        self.svg = ""


@contextmanager
def _drawing(label: str, *, height: float, columns: int = 1, rows: int = 1, width: float = WIDTH) -> Iterator[_Drawing]:
    """Draw on `axes` within the block; afterwards `svg` is the figure, with `label` for screen readers."""
    with library_defaults(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has other fonts
        drawing = _Drawing(rows, columns, height, width)
        yield drawing
        buffer = io.StringIO()
        drawing.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        drawing.svg = _inline(buffer.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """Convert an SVG file to a part of a page: no prologue, no fixed size, unique ids and the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width = float(view[1]) if view else 0.0
    prefix = f"f{_checksum(label)}-"
    used = set(re.findall(r"#([A-Za-z][\w-]*)", text)) & set(re.findall(r'id="([^"]+)"', text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "", text)
    for name in used:
        text = re.sub(rf"#{re.escape(name)}(?=[\")])", f"#{prefix}{name}", text)
    head = f'<svg class="figure" role="img" aria-label="{html.escape(printable(label))}" style="--drawn:{width:.0f}px"'
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]+\")[^>]*>", rf"{head.replace(chr(92), chr(92) * 2)} \1>", text, count=1)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    text = text.replace("'DejaVu Sans'", "sans-serif")
    return re.sub(r">\s+<", "><", text)


def _checksum(text: str) -> int:
    """Return a checksum that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode("utf-8", "backslashreplace"))


@drawn_once
def forest(bars: Sequence[Bar], axis: str, label: str) -> str:
    """Draw a forest plot: values with their intervals, the first at the top."""
    with _drawing(label, height=0.9 + 0.2 * len(bars)) as drawing:
        axes = drawing.axes[0]
        for index, bar in enumerate(bars):
            colour = ACCENT if bar.marked else INK if bar.kind == "ensemble" else MUTED
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [index, index], color=colour, linewidth=2 if bar.marked else 1.1)
            marker = "D" if bar.marked else "o" if bar.kind == "ensemble" else "s"
            axes.plot([bar.value], [index], marker=marker, color=colour, markersize=5.5 if bar.marked else 4)
        axes.set_yticks(range(len(bars)), [_short(bar.name) for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(axis)
        axes.tick_params(axis="y", length=0)
    return drawing.svg


@drawn_once
def front(points: Mapping[str, tuple[float, float]], best: set[str], focus: str, axis: str, label: str) -> str:
    """Draw score against cost, {name: (cost, score)}, on a logarithmic cost axis; label models on the Pareto front."""
    with _drawing(label, height=3.6) as drawing:
        axes = drawing.axes[0]
        for name in sorted(points, key=lambda name: (name == focus, name in best)):  # drawn last, on top
            colour = ACCENT if name == focus else INK if name in best else MUTED
            marker = "D" if name == focus else "o"
            axes.plot(*([value] for value in points[name]), marker=marker, color=colour, markersize=6, linestyle="none")
        line = sorted({points[name] for name in best})
        axes.step(*zip(*line, strict=True), where="post", color=INK, linewidth=0.9)
        labels: dict[tuple[float, float], list[str]] = {}
        for name in sorted({*best, *({focus} & points.keys())}, key=lambda name: (name != focus, name)):
            labels.setdefault(points[name], []).append(_short(name))
        if all(cost > 0 for cost, _ in points.values()):
            axes.set_xscale("log")
            _plain_ticks(axes, [cost for cost, _ in points.values()])
        axes.margins(x=0.2, y=0.12)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy")
        drawing.figure.draw_without_rendering()  # the layout determines the positions of the points
        _label_points(axes, {point: join_names(names, 1) for point, names in labels.items()}, list(points.values()))
    return drawing.svg


def _label_points(axes: Axes, labels: Mapping[tuple[float, float], str], points: Sequence[tuple[float, float]]) -> None:
    """Write labels next to points so that they do not overlap; labels without a free position are left out.

    Positions that cover no point and are nearest to the labelled point are preferred. `labels` are sorted by
    importance. The figure must be laid out.
    """
    frame, boxes = axes.get_window_extent(), list[Any]()
    pixels = axes.transData.transform(np.array(sorted(set(points))))
    for point, text in labels.items():
        pixel, positions = axes.transData.transform(point), []
        for number, (x, y, side) in enumerate(PLACES):
            note = axes.annotate(
                text, point, (x, y), textcoords="offset points", fontsize=8, ha=side, va="center", zorder=5
            )
            box = note.get_window_extent().padded(2)
            note.remove()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in boxes):
                distances = np.hypot(*(pixels - np.clip(pixels, box.min, box.max)).T)
                covered = int((distances == 0).sum())
                is_ambiguous = distances.min() < np.hypot(*(pixel - np.clip(pixel, box.min, box.max))) - 0.5
                positions.append((covered, is_ambiguous, number, box))
        if positions:
            _, _, number, box = min(positions, key=lambda position: position[:3])
            x, y, side = PLACES[number]
            axes.annotate(text, point, (x, y), textcoords="offset points", fontsize=8, ha=side, va="center")
            boxes.append(box)


def _plain_ticks(axes: Axes, costs: Sequence[float]) -> None:
    """Set ticks at 1, 2, 5, 10, ..., because costs seldom span several powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = max(costs) / min(costs) > 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


@drawn_once
def reliability(panels: Sequence[tuple[str, Mapping[str, Any]]], label: str) -> str:
    """Draw reliability diagrams of panels (title, bins), with the number of rows per bin below."""
    width = min(WIDTH, 1.2 + 2.6 * len(panels))
    with _drawing(label, height=3.5, rows=2, columns=len(panels), width=width) as drawing:
        above, below = drawing.axes[: len(panels)], drawing.axes[len(panels) :]
        grid = drawing.axes[0].get_gridspec()
        assert grid is not None, "subplots have a grid"
        grid.set_height_ratios([3, 1])
        for (title, bins), upper, lower in zip(panels, above, below, strict=True):
            filled = [index for index, value in enumerate(bins["accuracy"]) if value is not None]
            width = 1 / len(bins["accuracy"])
            middles = [(index + 0.5) * width for index in range(len(bins["accuracy"]))]
            upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            confidence, accuracy = ([bins[key][index] for index in filled] for key in ("confidence", "accuracy"))
            upper.plot(confidence, accuracy, color=ACCENT, marker="o", markersize=3.5, linewidth=1.4)
            upper.set(xlim=(0, 1), ylim=(0, 1.02), title=_short(title, 36))
            lower.bar(middles, bins["count"], width=width * 0.85, color=ACCENT, alpha=0.5)
            lower.set(xlim=(0, 1), xlabel="confidence")
            lower.locator_params(axis="y", nbins=3)
        above[0].set_ylabel("accuracy")
        below[0].set_ylabel("rows")
    return drawing.svg


@drawn_once
def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], label: str) -> str:
    """Draw a confusion matrix: rows are true classes, columns predicted ones, colours fractions of the true class."""
    counts = np.asarray(matrix, dtype=float)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cells = [[f"{int(value)}" if value else "" for value in row] for row in counts]
    return _cells(fractions, cells, classes, ("true class", "predicted class"), label)


@drawn_once
def pairs(matrix: np.ndarray, names: Sequence[str], label: str) -> str:
    """Draw a symmetric matrix (M, M) of pairwise values from -1 to 1, coloured by absolute value."""
    cells = [[f"{value:.2f}" for value in row] for row in matrix]
    return _cells(np.abs(matrix), cells, names, ("", ""), label)


def _cells(
    strength: np.ndarray,
    cells: Sequence[Sequence[str]],
    names: Sequence[str],
    axes_names: tuple[str, str],
    label: str,
) -> str:
    count = len(names)
    side = min(WIDTH, 2.4 + 0.36 * count)
    with _drawing(label, height=side, width=min(WIDTH, side + 0.4)) as drawing:
        axes = drawing.axes[0]
        image = np.empty((*strength.shape, 4))
        image[..., :3], image[..., 3] = HEAT, np.clip(strength, 0, 1) * MAX_OPACITY
        axes.imshow(image, interpolation="none")
        axes.grid(visible=False)
        if count <= MAX_NUMBERED_CLASSES:
            size = 8 if count <= 10 else 6.5
            for row, line in enumerate(cells):
                for column, text in enumerate(line):
                    axes.text(column, row, text, ha="center", va="center", fontsize=size)
        step = max(1, -(-count // MAX_TICK_LABELS))
        ticks, labels = range(0, count, step), [_short(name, 22) for name in names[::step]]
        small = 9 if count <= 20 else 6
        axes.set_xticks(ticks, labels, rotation=90, fontsize=small)
        axes.set_yticks(ticks, labels, fontsize=small)
        axes.tick_params(length=0)
        axes.set(ylabel=axes_names[0], xlabel=axes_names[1])
        for spine in axes.spines.values():
            spine.set_visible(True)
    return drawing.svg


@drawn_once
def risk_coverage(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Draw risk-coverage curves {name: (coverage, risk)}: error rate of the answered rows, against their fraction."""
    with _drawing(label, height=3.2) as drawing:
        axes = drawing.axes[0]
        styles = ((ACCENT, "-"), (SECOND, "--"), (THIRD, ":"))
        for (name, (coverage, risk)), (colour, line) in zip(curves.items(), styles, strict=False):
            axes.plot(coverage, risk, color=colour, linestyle=line, linewidth=1.6, label=_short(name, 40))
        axes.set(
            xlim=(0, 1.01), xlabel="coverage: fraction of rows answered, most confident first", ylabel="selective risk"
        )
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    return drawing.svg


@drawn_once
def class_curves(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    areas: Mapping[str, float],
    axes_names: tuple[str, str],
    label: str,
) -> str:
    """Draw ROC or precision-recall curves {class: (x, y)}, with a legend if there are few classes."""
    with _drawing(label, height=3.6) as drawing:
        axes = drawing.axes[0]
        lines = [(colour, style) for style in ("-", "--", ":") for colour in (ACCENT, SECOND, THIRD)]
        is_named = len(points) <= len(lines)
        for number, (name, (x, y)) in enumerate(points.items()):
            colour, style = lines[number] if is_named else (MUTED, "-")
            text = f"{_short(name, 24)} {areas[name]:.3f}" if is_named else None
            axes.plot(x, y, color=colour, linestyle=style, linewidth=1.4 if is_named else 0.8, label=text)
        axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02), xlabel=axes_names[0], ylabel=axes_names[1])
        if is_named and points:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="class, area")
    return drawing.svg


def _short(text: str, max_length: int = 34) -> str:
    """Return printable text, shortened in the middle if it is long."""
    text = printable(text)
    if len(text) <= max_length:
        return text
    return f"{text[: max_length // 2]}…{text[len(text) - max_length // 2 + 1 :]}"
