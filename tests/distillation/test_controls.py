"""The comparison of a student with its controls: the gain that it keeps, its interval, and the verdict."""

from __future__ import annotations

import numpy as np
import pytest
from stored_predictions import workspace_at

from utils.core.artifacts import write_json
from utils.core.workspace import Workspace
from utils.distillation.controls import (
    Controls,
    agreement,
    compare,
    control_metrics,
    gain_kept,
    read_controls,
    scores,
    temperatures,
    write_controls,
)


def predictions(hits: np.ndarray, labels: np.ndarray, confidence: float = 0.8) -> np.ndarray:
    """Probabilities (N, 2) that are correct where `hits` is True."""
    predicted = np.where(hits, labels, 1 - labels)
    return np.where(np.eye(2, dtype=bool)[predicted], confidence, 1 - confidence)


def evenly_spread(count: int, total: int) -> np.ndarray:
    """A mask with `count` of `total` rows True."""
    return np.floor(np.arange(1, total + 1) * count / total) > np.floor(np.arange(total) * count / total)


LABELS = np.arange(1000) % 2


def gain_of(student: int, alone: int, teacher: int, rows: int = 1000):
    labels = LABELS[:rows]
    arms = (predictions(evenly_spread(count, rows), labels)[None] for count in (student, alone, teacher))
    return gain_kept(*arms, labels)


def test_the_fraction_is_that_of_the_accuracies_and_the_interval_contains_it():
    gain, reason = gain_of(900, 800, 950)
    assert gain["value"] == pytest.approx(100 / 150)
    low, high = gain["ci95"]
    assert 0.3 < low < gain["value"] < high < 1.1
    assert gain["log_loss"]["value"] == pytest.approx(100 / 150)  # every hit has the same log-loss here
    assert reason == ""


def test_a_student_worse_than_the_network_alone_has_a_negative_fraction():
    gain, _ = gain_of(750, 800, 950)
    assert gain["value"] == pytest.approx(-50 / 150)
    assert gain["ci95"][1] < 0.2


def test_without_a_gain_of_the_teacher_the_fraction_is_undefined():
    gain, reason = gain_of(900, 900, 850)
    assert gain["value"] is None
    assert gain["ci95"] == [None, None]
    assert reason.count("not better") == 2  # in accuracy and in log-loss


def test_where_the_teacher_may_gain_nothing_the_interval_has_no_bounds():
    gain, reason = gain_of(26, 25, 27, rows=30)
    assert gain["value"] == pytest.approx(0.5)
    assert gain["ci95"] == [None, None]
    assert reason.count("30 rows") == 2


def test_few_groups_or_errors_leave_the_interval_without_bounds():
    arms = [predictions(evenly_spread(count, 1000), LABELS)[None] for count in (900, 800, 950)]
    assert gain_kept(*arms, LABELS, np.arange(1000) % 9)[0]["ci95"] == [None, None]
    assert None not in gain_kept(*arms, LABELS, np.arange(1000) % 200)[0]["ci95"]
    few, reason = gain_of(998, 991, 1000)  # nine errors of the network alone, and none of its teacher
    assert few["value"] == pytest.approx(7 / 9)
    assert few["ci95"] == few["log_loss"]["ci95"] == [None, None]
    assert "too few to establish" in reason
    assert None not in gain_of(998, 990, 1000)[0]["ci95"]


def test_scores_and_agreement():
    hits = evenly_spread(900, 1000)
    result = scores(predictions(hits, LABELS), LABELS)
    assert result["accuracy"] == 0.9
    assert result["log_loss"] == pytest.approx(-0.9 * np.log(0.8) - 0.1 * np.log(0.2))
    assert result["ece"] == pytest.approx(0.1)
    assert agreement(predictions(hits, LABELS), predictions(np.ones(1000, bool), LABELS)) == 0.9


def latencies(milliseconds: float) -> dict:
    return {"latency_ms": {"batch_1": {"p50": milliseconds}}, "size_mb": 1.0}


def test_the_verdict_has_scores_speed_and_the_fraction_that_is_kept():
    arms = {
        "student": predictions(evenly_spread(900, 1000), LABELS)[None],
        "alone": predictions(evenly_spread(800, 1000), LABELS)[None],
        "teacher": predictions(evenly_spread(950, 1000), LABELS)[None],
    }
    record = {"costs": {"alone": latencies(2.0), "teacher": latencies(24.0)}, "teacher": "t"}
    metrics, notes = compare(record, arms, LABELS, {})
    assert notes["controls"].startswith("for this network distillation helped in accuracy and log-loss (advantage in ")
    assert "accuracy +0.1000 [" in notes["controls"]
    assert "12 times faster than the teacher, 5.0 points behind" in notes["controls"]
    assert "67% of the teacher's gain in accuracy kept" in notes["controls"]
    ahead = metrics["controls"]["alone"]["student_ahead"]
    assert ahead["accuracy"]["interval"][0] > 0
    assert ahead["accuracy"]["level"] == 0.975


def test_both_arms_are_compared_after_temperature_scaling():
    """The student is the network alone, made over-confident: calibrated they are the same."""
    hits = evenly_spread(800, 1000)
    alone = predictions(hits, LABELS, 0.8)[None]
    student = predictions(hits, LABELS, 0.99)[None]
    record = {"costs": {"alone": {}, "teacher": {}}, "teacher": "t"}
    arms = {"student": student, "alone": alone, "teacher": alone}
    arrays = {"val/student": student, "val/alone": alone, "val/teacher": alone[0], "val/labels": LABELS}
    raw = compare(record, arms, LABELS, {})[0]["controls"]["alone"]["student_ahead"]
    assert raw["log_loss"]["interval"][1] < 0
    metrics, notes = compare(record, arms, LABELS, temperatures(arrays))
    fair = metrics["controls"]["alone"]["student_ahead"]
    assert fair["log_loss"]["value"] == pytest.approx(0, abs=1e-4)
    assert "cannot be told apart" in notes["controls"]
    assert temperatures({"val/alone": alone[0], "val/labels": LABELS}) == {}  # of an earlier version


@pytest.fixture
def compared(tmp_path) -> Workspace:
    """A workspace with the controls of one student on four test rows."""
    workspace = workspace_at(tmp_path)
    labels = np.array([0, 1, 0, 1])
    parts = {
        "alone": predictions(np.array([True, False, True, False]), labels),
        "teacher": predictions(np.ones(4, bool), labels),
        "labels": labels,
        "sample_ids": np.array(["a", "b", "c", "d"]),
    }
    parts["student"] = np.stack([parts["teacher"], parts["alone"]])
    parts["alone"] = np.stack([parts["alone"], parts["teacher"]])
    write_controls(workspace, "distilled_mobile", {"test": parts})
    costs = {"alone": {"size_mb": 1.0}, "teacher": {"size_mb": 3.0}}
    path = workspace.distillation("distilled_mobile") / "record.json"
    write_json(path, {"teacher": "soft_voting_ensemble", "costs": costs})
    return workspace


def stored(workspace: Workspace) -> Controls:
    controls = read_controls(workspace, "distilled_mobile")
    assert controls is not None
    return controls


def test_control_metrics_are_of_the_requested_rows_in_their_order(compared):
    student = predictions(np.array([True, True]), np.array([1, 0]))  # of d and c
    metrics, notes = control_metrics(stored(compared), "test", ["d", "c"], student)
    assert metrics["controls"]["alone"]["accuracy"] == 0.75  # wrong on d, correct on c, and both with another seed
    assert metrics["controls"]["teacher"]["accuracy"] == 1.0
    assert metrics["controls"]["teacher"]["agreement"] == 1.0
    assert metrics["controls"]["teacher"]["name"] == "soft_voting_ensemble"
    assert metrics["controls"]["alone"]["size_mb"] == 1.0
    assert metrics["gain_kept"]["value"] == 0.0  # the second student is right on one of two rows as well
    assert "controls" in notes


def test_controls_of_an_earlier_version_are_one_training(compared):
    arrays = dict(stored(compared).arrays)
    del arrays["test/student"]
    arrays["test/alone"] = arrays["test/alone"][0]
    student = predictions(np.array([True, True]), np.array([1, 0]))
    metrics, notes = control_metrics(Controls(stored(compared).record, arrays), "test", ["d", "c"], student)
    assert metrics["controls"]["alone"]["accuracy"] == 0.5
    assert metrics["gain_kept"]["value"] == 1.0
    assert "this network" in notes["controls"]


def test_rows_without_controls_are_noted_and_other_ensembles_have_none(compared):
    probabilities = np.full((1, 2), 0.5)
    metrics, notes = control_metrics(stored(compared), "test", ["unknown"], probabilities)
    assert metrics == {"controls": None, "gain_kept": None}
    assert notes.keys() == metrics.keys()
    assert control_metrics(stored(compared), "val", ["a"], probabilities)[0] == metrics
    assert read_controls(compared, "soft_voting_ensemble") is None
