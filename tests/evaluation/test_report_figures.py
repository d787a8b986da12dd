"""Figures as parts of a page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from utils.core import engines, worker_processes
from utils.evaluation.report import figure_cache, report_figures
from utils.evaluation.report.report_figures import Bar

BINS = {"confidence": [0.25, 0.75], "accuracy": [None, 0.8], "count": [0, 10]}
FIGURES = {
    "forest": lambda label: report_figures.forest([Bar("a", 0.9, 0.8, 1.0, "ensemble", True)], "accuracy", label),
    "front": lambda label: report_figures.front({"a": (1.0, 0.9), "b": (2.0, 0.8)}, {"a"}, "b", "ms", label),
    "reliability": lambda label: report_figures.reliability([("before", BINS), ("after", BINS)], label),
    "confusion": lambda label: report_figures.confusion([[3, 1], [0, 4]], ["ant", "bee"], label),
    "pairs": lambda label: report_figures.pairs(np.eye(2), ["a", "b"], label),
    "risk_coverage": lambda label: report_figures.risk_coverage({"a": ([0.5, 1.0], [0.0, 0.1])}, label),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_is_labelled_svg_in_the_colours_of_the_page(kind, monkeypatch):
    monkeypatch.setattr(figure_cache, "MAX_KEPT", 1)
    svg = FIGURES[kind]('errors < 5 & "more"')
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'errors < 5 & "more"'
    assert not set(report_figures.VARIABLES) & set(re.findall(r"#[0-9a-f]{6}", svg))
    FIGURES[kind]("another, so that the first is drawn again")
    assert FIGURES[kind]('errors < 5 & "more"') == svg


def test_ids_of_two_figures_differ():
    ids = [set(re.findall(r' id="([^"]+)"', FIGURES["front"](label))) for label in ("one", "other")]
    assert not ids[0] & ids[1]


def test_names_are_text_and_no_formulas():
    svg = report_figures.confusion([[1, 0], [0, 1]], ["$x_1$", "<b>"], "label")
    assert "$x_1$" in svg
    assert "&lt;b&gt;" in svg


@pytest.mark.parametrize("kind", sorted(FIGURES))
def test_settings_of_the_user_change_no_figure(kind):
    import matplotlib

    plain = FIGURES[kind]("label")
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert FIGURES[kind]("label") == plain


def test_names_of_points_that_lie_close_together_do_not_cover_each_other(monkeypatch):
    from matplotlib.axes import Axes

    notes, annotate = [], Axes.annotate

    def listed(axes, *arguments, **options):
        notes.append(annotate(axes, *arguments, **options))
        return notes[-1]

    monkeypatch.setattr(Axes, "annotate", listed)
    points = {f"a_long_name_{number}": (100 + number, 0.9 + number / 1000) for number in range(6)}
    report_figures.front(points, set(points), "a_long_name_0", "ms", "label")
    boxes = [note.get_window_extent() for note in notes if note.axes is not None]
    assert len(boxes) >= 4
    assert not [1 for row, one in enumerate(boxes) for other in boxes[:row] if one.overlaps(other)]


def test_a_figure_of_equal_values_is_drawn_once(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(savefig(self, *args, **kwargs)))
    counts = [[3, 1], [0, 4]]
    first = report_figures.confusion(counts, ["ant", "bee"], "drawn once")
    assert report_figures.confusion([list(row) for row in counts], ["ant", "bee"], "drawn once") == first
    assert len(drawn) == 1
    counts[0][0] = 5
    other = report_figures.confusion(counts, ["ant", "bee"], "drawn once")
    assert other != first
    assert len(drawn) == 2


def test_figures_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(figure_cache, "MAX_KEPT", 2)
    calls = []
    draw = figure_cache.drawn_once(lambda value: calls.append(value) or str(value))
    assert [draw(value) for value in (1, 2, 1, 3, 1)] == ["1", "2", "1", "3", "1"]
    assert calls == [1, 2, 3, 1]


def test_figures_of_a_page_are_drawn_together_in_processes(monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 2)
    monkeypatch.setattr(worker_processes, "START_SECONDS", dict.fromkeys(worker_processes.START_SECONDS, 0.0))
    expected = [draw("together") for draw in FIGURES.values()]
    for draw in (getattr(report_figures, name) for name in FIGURES):
        monkeypatch.setattr(report_figures, draw.__name__, figure_cache.drawn_once(draw.__wrapped__))
    with figure_cache.drawn_together() as fill:
        placeholders = [draw("together") for draw in FIGURES.values()]
        again = [draw("together") for draw in FIGURES.values()]
        assert len(set(placeholders)) == len(FIGURES)
        assert placeholders == again
        assert not any("svg" in placeholder for placeholder in placeholders)
        page = fill("|".join([*placeholders, *again]))
    assert page.split("|") == expected * 2
    monkeypatch.setattr(report_figures, "_drawing", lambda *_, **__: pytest.fail("a figure was drawn again"))
    assert [draw("together") for draw in FIGURES.values()] == expected


def test_figures_after_a_page_that_failed_are_drawn_at_once():
    with pytest.raises(RuntimeError, match="no section"), figure_cache.drawn_together():
        raise RuntimeError("no section")
    assert "<svg" in report_figures.confusion([[1, 0], [0, 1]], ["ant", "bee"], "after a failed page")
