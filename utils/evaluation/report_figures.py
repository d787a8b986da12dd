"""Figures of the report as inline SVG whose colours are those of the page, so that they follow light, dark and print.

Drawn by matplotlib in stand-in colours, which become CSS variables; text stays text. What a figure says stands beside
it in a table or in words as well, and in its label for those who do not see it.
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
HEAT = (0.23, 0.43, 0.80)  # of cells, seen through to the page: readable on white and on black
STRONGEST = 0.75
WIDTH = 7.2  # inches
CELLS_WITH_NUMBERS = 15  # classes; beyond, cells are too small for text
NAMED_CELLS = 40
SETTINGS = {
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


class _Sheet:
    """A figure that is being drawn, and the SVG that it becomes."""

    def __init__(self, rows: int, columns: int, height: float, width: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), layout="constrained")
        self.figure.patch.set_alpha(0)
        self.axes: list[Axes] = list(np.ravel(self.figure.subplots(rows, columns, squeeze=False)))
        for axes in self.axes:
            axes.patch.set_alpha(0)
        self.svg = ""


@contextmanager
def _sheet(label: str, *, height: float, columns: int = 1, rows: int = 1, width: float = WIDTH) -> Iterator[_Sheet]:
    """Draw on `axes` within the block; afterwards `svg` holds the figure, with `label` for screen readers."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has other fonts
        sheet = _Sheet(rows, columns, height, width)
        yield sheet
        buffer = io.StringIO()
        sheet.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        sheet.svg = _inline(buffer.getvalue(), label)


def _inline(text: str, label: str) -> str:
    """An SVG file as part of a page: no prologue, no fixed size, no ids that may occur twice, the page's colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width = float(view[1]) if view else 0.0
    prefix = f"f{abs(hash_of(label))}-"
    used = set(re.findall(r"#([A-Za-z][\w-]*)", text)) & set(re.findall(r'id="([^"]+)"', text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", text)
    for name in used:
        text = re.sub(rf"#{re.escape(name)}(?=[\")])", f"#{prefix}{name}", text)
    head = f'<svg class="figure" role="img" aria-label="{html.escape(printable(label))}" style="--drawn:{width:.0f}px"'
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]+\")[^>]*>", rf"{head.replace(chr(92), chr(92) * 2)} \1>", text, count=1)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    text = text.replace("'DejaVu Sans'", "sans-serif")
    return re.sub(r">\s+<", "><", text)


def hash_of(text: str) -> int:
    """A small number that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode("utf-8", "backslashreplace"))


def forest(bars: Sequence[Bar], axis: str, label: str) -> str:
    """Values with their intervals, one line each, first at the top."""
    with _sheet(label, height=0.9 + 0.2 * len(bars)) as sheet:
        axes = sheet.axes[0]
        for place, bar in enumerate(bars):
            colour = ACCENT if bar.marked else INK if bar.kind == "ensemble" else MUTED
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [place, place], color=colour, linewidth=2 if bar.marked else 1.1)
            marker = "D" if bar.marked else "o" if bar.kind == "ensemble" else "s"
            axes.plot([bar.value], [place], marker=marker, color=colour, markersize=5.5 if bar.marked else 4)
        axes.set_yticks(range(len(bars)), [_short(bar.name) for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(axis)
        axes.tick_params(axis="y", length=0)
    return sheet.svg


def front(points: Mapping[str, tuple[float, float]], best: set[str], focus: str, axis: str, label: str) -> str:
    """Score (a share) against cost on a logarithmic axis, {name: (cost, score)}; those of the front are named."""
    with _sheet(label, height=3.6) as sheet:
        axes = sheet.axes[0]
        for name in sorted(points, key=lambda name: (name == focus, name in best)):  # what matters lies on top
            colour = ACCENT if name == focus else INK if name in best else MUTED
            marker = "D" if name == focus else "o"
            axes.plot(*([value] for value in points[name]), marker=marker, color=colour, markersize=6, linestyle="none")
        line = sorted({points[name] for name in best})
        axes.step(*zip(*line, strict=True), where="post", color=INK, linewidth=0.9)
        places: dict[tuple[float, float], list[str]] = {}
        for name in sorted({*best, *({focus} & points.keys())}, key=lambda name: (name != focus, name)):
            places.setdefault(points[name], []).append(_short(name))
        for number, (place, names) in enumerate(sorted(places.items())):
            offset = (5, -12 if number % 2 else 6)
            axes.annotate(join_names(names, 1), place, offset, textcoords="offset points", fontsize=8)
        if all(cost > 0 for cost, _ in points.values()):
            axes.set_xscale("log")
            _plain_ticks(axes, [cost for cost, _ in points.values()])
        axes.margins(x=0.2, y=0.12)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy")
    return sheet.svg


def _plain_ticks(axes: Axes, costs: Sequence[float]) -> None:
    """1, 2, 5, 10 ... in place of powers of ten, which a span of costs seldom fills."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    wide = max(costs) / min(costs) > 100
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def reliability(panels: Sequence[tuple[str, Mapping[str, Any]]], label: str) -> str:
    """Accuracy against confidence of each panel (title, bins), and below them how many rows a bin holds."""
    width = min(WIDTH, 1.2 + 2.6 * len(panels))
    with _sheet(label, height=3.5, rows=2, columns=len(panels), width=width) as sheet:
        above, below = sheet.axes[: len(panels)], sheet.axes[len(panels) :]
        sheet.axes[0].get_gridspec().set_height_ratios([3, 1])
        for (title, bins), upper, lower in zip(panels, above, below, strict=True):
            kept = [place for place, value in enumerate(bins["accuracy"]) if value is not None]
            width = 1 / len(bins["accuracy"])
            middles = [(place + 0.5) * width for place in range(len(bins["accuracy"]))]
            upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            sure, right = ([bins[key][place] for place in kept] for key in ("confidence", "accuracy"))
            upper.plot(sure, right, color=ACCENT, marker="o", markersize=3.5, linewidth=1.4)
            upper.set(xlim=(0, 1), ylim=(0, 1.02), title=_short(title, 36))
            lower.bar(middles, bins["count"], width=width * 0.85, color=ACCENT, alpha=0.5)
            lower.set(xlim=(0, 1), xlabel="confidence")
            lower.locator_params(axis="y", nbins=3)
        above[0].set_ylabel("accuracy")
        below[0].set_ylabel("rows")
    return sheet.svg


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], label: str) -> str:
    """Counts, true classes down and answers across, coloured by their share of the true class."""
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cells = [[f"{int(value)}" if value else "" for value in row] for row in counts]
    return _cells(shares, cells, classes, ("true class", "answer"), label, turned=True)


def pairs(matrix: np.ndarray, names: Sequence[str], label: str) -> str:
    """A symmetric measure of pairs, -1 to 1, coloured by its size."""
    cells = [[f"{value:.2f}" for value in row] for row in matrix]
    return _cells(np.abs(matrix), cells, names, ("", ""), label, turned=True)


def _cells(
    strength: np.ndarray,
    cells: Sequence[Sequence[str]],
    names: Sequence[str],
    axes_names: tuple[str, str],
    label: str,
    *,
    turned: bool,
) -> str:
    count = len(names)
    side = min(WIDTH, 2.4 + 0.36 * count)
    with _sheet(label, height=side, width=min(WIDTH, side + 0.4)) as sheet:
        axes = sheet.axes[0]
        image = np.empty((*strength.shape, 4))
        image[..., :3], image[..., 3] = HEAT, np.clip(strength, 0, 1) * STRONGEST
        axes.imshow(image, interpolation="none")
        axes.grid(visible=False)
        if count <= CELLS_WITH_NUMBERS:
            size = 8 if count <= 10 else 6.5
            for row, line in enumerate(cells):
                for column, text in enumerate(line):
                    axes.text(column, row, text, ha="center", va="center", fontsize=size)
        step = max(1, -(-count // NAMED_CELLS))
        ticks, words = range(0, count, step), [_short(name, 22) for name in names[::step]]
        small = 9 if count <= 20 else 6
        axes.set_xticks(ticks, words, rotation=90 if turned else 0, fontsize=small)
        axes.set_yticks(ticks, words, fontsize=small)
        axes.tick_params(length=0)
        axes.set(ylabel=axes_names[0], xlabel=axes_names[1])
        for spine in axes.spines.values():
            spine.set_visible(True)
    return sheet.svg


def risk_coverage(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Error rate of the rows answered against the share of them, {name: (coverage, risk)}."""
    with _sheet(label, height=3.2) as sheet:
        axes = sheet.axes[0]
        styles = ((ACCENT, "-"), (SECOND, "--"), (THIRD, ":"))
        for (name, (coverage, risk)), (colour, line) in zip(curves.items(), styles, strict=False):
            axes.plot(coverage, risk, color=colour, linestyle=line, linewidth=1.6, label=_short(name, 40))
        axes.set(xlim=(0, 1.01), xlabel="share of the images that are answered, the surest first", ylabel="error rate")
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    return sheet.svg


def _short(text: str, most: int = 34) -> str:
    """Showable, and cut in the middle where it is long."""
    text = printable(text)
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - most // 2 + 1 :]}"
