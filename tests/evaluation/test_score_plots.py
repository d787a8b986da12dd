"""Pictures of scores: that they are drawn, from hostile names too, once, and without a window."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import CONFIG, empty_workspace

from utils.core import engines, worker_processes
from utils.core.errors import ConfigError
from utils.evaluation import score_plots
from utils.evaluation.class_scores import add_class_scores
from utils.external_sets import command
from utils.numeric import selective
from utils.numeric.metrics import point_metrics, softmax


def record(classes, count=60, name="some_ensemble"):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), count)
    probabilities = softmax(rng.normal(size=(count, len(classes))) + 2 * np.eye(len(classes))[labels])
    found = point_metrics(probabilities, labels, classes)
    add_class_scores(found, probabilities, labels, None, found["notes"])
    curve = selective.selective_metrics((probabilities, labels), (probabilities, labels), target_risk=0.2)
    return found | {"name": name, "split": "test", "selective": curve}


@pytest.mark.parametrize("kind", sorted(score_plots.KINDS))
@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (["a", "b"], "plain"),
        (["$\\frac{", "<script>", "x" * 300, "two\nlines", "a_b^c"], "$x_{ %\n" + "long" * 99),
        ([f"c{number}" for number in range(60)], "many classes"),
    ],
    ids=["two", "hostile", "many"],
)
def test_every_picture_is_drawn(tmp_path, kind, classes, name):
    from PIL import Image

    path = tmp_path / "new" / "picture.png"
    score_plots.draw(score_plots.Picture(kind, record(classes, name=name), path))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize(("count", "bars"), [(2, 6), (60, 0)])
def test_scores_of_many_classes_are_points_in_place_of_thousands_of_bars(count, bars):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    score_plots.per_class_metrics(axes, record([f"c{number}" for number in range(count)]))
    assert (len(axes.patches), len(axes.lines)) == (bars, 0 if bars else 3)


def test_a_picture_of_the_same_scores_is_kept(tmp_path):
    path = tmp_path / "picture.png"
    scores = record(["a", "b"])
    score_plots.draw_all([score_plots.Picture("reliability", scores, path)])
    before = path.stat().st_mtime_ns
    score_plots.draw_all([score_plots.Picture("reliability", scores | {"created": "later"}, path)])
    assert path.stat().st_mtime_ns == before
    score_plots.draw_all([score_plots.Picture("reliability", scores | {"ece": 0.5}, path)])
    assert path.stat().st_mtime_ns != before


def test_many_pictures_are_drawn_in_processes_with_the_same_bytes(tmp_path, monkeypatch):
    def drawn(folder):
        pictures = [
            score_plots.Picture(kind, record(["a", "b"]), tmp_path / folder / f"{kind}.png")
            for kind in score_plots.KINDS
        ]
        score_plots.draw_all(pictures)
        return [picture.path.read_bytes() for picture in pictures]

    here = drawn("here")
    monkeypatch.setitem(worker_processes.START_SECONDS, worker_processes.FORK, -1)
    monkeypatch.setattr(engines, "cores", lambda: 2)
    assert drawn("beside") == here


def test_neither_pyplot_nor_a_window_is_needed(tmp_path):
    code = (
        "import sys, test_score_plots, pathlib\n"
        "from utils.evaluation import score_plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "scores = test_score_plots.record(['a', 'b'])\n"
        "score_plots.draw(score_plots.Picture('confusion_matrix', scores, pathlib.Path(sys.argv[1])))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    places = os.pathsep.join([*(str(PROJECT / "tests" / part) for part in ("evaluation", "support", "")), str(PROJECT)])
    call = [sys.executable, "-c", code, str(tmp_path / "picture.png")]
    done = subprocess.run(call, env=environment | {"PYTHONPATH": places}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", sorted(score_plots.KINDS))
def test_settings_of_the_user_change_no_picture(tmp_path, kind):
    """`text.usetex` would start LaTeX, which may not be installed."""
    import matplotlib

    scores = record(["a", "b"])
    score_plots.draw(score_plots.Picture(kind, scores, tmp_path / "plain.png"))
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 7, "font.size": 30}):
        score_plots.draw(score_plots.Picture(kind, scores, tmp_path / "set.png"))
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "set.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_many_classes_have_neither_matrix_nor_curves():
    scores = record(["a", "b", "c"])
    assert score_plots.kinds_of(scores) == list(score_plots.KINDS)
    bare = {"confusion_matrix", "roc_curves", "precision_recall_curves"}
    assert (
        set(score_plots.kinds_of(scores | {"confusion_matrix": None, "curves": None}))
        == score_plots.KINDS.keys() - bare
    )


RANKING = {
    "rows": [{"name": name} for name in ("first", "second", "third", "soft_voting_ensemble", "single", "last")],
    "recommended": {"name": "second"},
    "recommended_fast": {"name": "single"},
    "peers": {"best_single": "single", "soft_voting": "soft_voting_ensemble", "greedy_selection_ensemble": None},
}


def test_plots_are_drawn_of_the_models_that_the_report_compares():
    assert score_plots.shown_models(RANKING, "compared") == {"first", "second", "soft_voting_ensemble", "single"}
    without = RANKING | {"recommended_fast": None, "peers": {"best_single": "not in the ranking"}}
    assert score_plots.shown_models(without, "compared") == {"first", "second"}


def test_plots_are_drawn_of_all_models_or_of_none_on_request():
    assert score_plots.shown_models(RANKING, "all") == {row["name"] for row in RANKING["rows"]}
    assert score_plots.shown_models(RANKING, "none") == set()


def test_plots_of_an_external_set_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate --plots: .* expected without --data"):
        command.evaluate(CONFIG, empty_workspace(tmp_path / "w"), data="images", plots="all")
