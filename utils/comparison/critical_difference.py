"""The critical-difference diagram (Demsar 2006): mean ranks on an axis, with lines over methods that do not differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.core.artifacts import replacing
from utils.core.display_text import printable
from utils.evaluation.drawing import library_defaults

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS_WIDTH, LETTER = 3.2, 0.085  # inches
DPI = 150
MAX_NAME_LENGTH = 40
SETTINGS: dict[Any, Any] = {"font.size": 9, "text.parse_math": False, "pdf.fonttype": 42}


def cliques(mean_ranks: Sequence[float], critical_difference: float) -> list[tuple[int, int]]:
    """Return (first, last) index of the maximal runs of methods, sorted by mean rank, of which no two differ."""
    ranges: list[tuple[int, int]] = []
    for first, rank in enumerate(mean_ranks):
        last = max(index for index, other in enumerate(mean_ranks) if other - rank < critical_difference)
        if last > first and (not ranges or last > ranges[-1][1]):
            ranges.append((first, last))
    return ranges


def draw(record: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Write the diagram of a comparison to each path, in the format of its suffix (PNG or PDF)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [printable(method["name"]) for method in record["methods"]]
    ranks = [method["mean_rank"] for method in record["methods"]]
    distance = record["nemenyi"]["critical_difference"]
    lines = cliques(ranks, distance)
    rows = -(-len(names) // 2)
    with library_defaults(SETTINGS):
        height = 1.1 + 0.22 * rows + 0.12 * len(lines)
        margin = 0.9 + LETTER * min(MAX_NAME_LENGTH, max(map(len, names)))
        width = AXIS_WIDTH + 2 * margin
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((margin / width, 0.02, AXIS_WIDTH / width, 0.96))
        _draw(axes, names, ranks, lines, distance)
        for path in paths:
            metadata = {"Software": None} if path.suffix == ".png" else {"CreationDate": None, "Producer": None}
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=DPI, metadata=metadata)


def _draw(
    axes: Axes, names: Sequence[str], ranks: Sequence[float], lines: Sequence[tuple[int, int]], distance: float
) -> None:
    """Draw the axis from 1, at the left, to the number of methods; better methods are named at the left."""
    count, rows = len(names), -(-len(names) // 2)
    below = 0.6 + 0.5 * len(lines)  # the axis is at height 0, names begin below the lines
    axes.set_xlim(1, count)
    axes.set_ylim(-(below + rows), 2.2)
    axes.axis("off")
    axes.plot([1, count], [0, 0], color="black", linewidth=1)
    step = max(1, count // 8)
    for tick in range(1, count + 1, step):
        axes.plot([tick, tick], [0, 0.2], color="black", linewidth=1)
        axes.text(tick, 0.3, str(tick), ha="center", va="bottom")
    shown = min(distance, count - 1)
    axes.plot([1, 1 + shown], [1.4, 1.4], color="black", linewidth=2, clip_on=False)
    axes.text(1, 1.55, f"critical difference {distance:.2f}", ha="left", va="bottom", clip_on=False)
    for level, (first, last) in enumerate(lines):
        height = -0.4 - 0.5 * level
        axes.plot([ranks[first], ranks[last]], [height, height], color="black", linewidth=3, solid_capstyle="round")
    for index, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        is_left = index < rows
        height = -(below + (index if is_left else count - 1 - index) + 0.4)
        edge = 1 - 0.03 * count if is_left else count + 0.03 * count
        axes.plot([rank, rank, edge], [0, height, height], color="#6e7781", linewidth=0.8, clip_on=False)
        short = name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 3]}..."
        text = f"{short}  {rank:.2f} " if is_left else f" {rank:.2f}  {short}"
        axes.text(edge, height, text, ha="right" if is_left else "left", va="center", clip_on=False)
