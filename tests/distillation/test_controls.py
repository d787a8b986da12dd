"""The share of a gain that is kept, its interval, and whether distillation helped, in words."""

from __future__ import annotations

import numpy as np
import pytest

from utils.distillation.controls import agreement, gain_kept, scores, verdict


def answers(hits: np.ndarray, labels: np.ndarray, sureness: float = 0.8) -> np.ndarray:
    """Probabilities (N, 2) that name the right class where `hits` says so."""
    named = np.where(hits, labels, 1 - labels)
    return np.where(np.eye(2, dtype=bool)[named], sureness, 1 - sureness)


def right(count: int, of: int) -> np.ndarray:
    """`count` of `of` rows, evenly spread."""
    return np.floor(np.arange(1, of + 1) * count / of) > np.floor(np.arange(of) * count / of)


LABELS = np.arange(1000) % 2


def kept(student: int, alone: int, teacher: int, rows: int = 1000):
    labels = LABELS[:rows]
    return gain_kept(*(answers(right(count, rows), labels) for count in (student, alone, teacher)), labels)


def test_the_share_is_that_of_the_accuracies_and_the_interval_holds_it():
    found, said = kept(900, 800, 950)
    assert found["value"] == pytest.approx(100 / 150)
    low, high = found["ci95"]
    assert 0.3 < low < found["value"] < high < 1.1
    assert found["log_loss"]["value"] == pytest.approx(100 / 150)  # every hit is worth the same here
    assert said == ""


def test_a_student_below_the_network_alone_keeps_less_than_nothing():
    found, _ = kept(750, 800, 950)
    assert found["value"] == pytest.approx(-50 / 150)
    assert found["ci95"][1] < 0.2


def test_without_a_gain_of_the_teacher_there_is_no_share():
    found, said = kept(900, 900, 850)
    assert found["value"] is None
    assert found["ci95"] == [None, None]
    assert "the teacher's accuracy is not better than that of the network alone" in said


def test_where_the_teacher_may_gain_nothing_there_are_no_bounds():
    found, said = kept(26, 25, 27, rows=30)
    assert found["value"] == pytest.approx(0.5)
    assert found["ci95"] == [None, None]
    assert "30 rows do not show for certain that the teacher gains in accuracy" in said


def test_scores_and_agreement():
    hits = right(900, 1000)
    found = scores(answers(hits, LABELS), LABELS)
    assert found["accuracy"] == 0.9
    assert found["log_loss"] == pytest.approx(-0.9 * np.log(0.8) - 0.1 * np.log(0.2))
    assert found["ece"] == pytest.approx(0.1)
    assert agreement(answers(hits, LABELS), answers(np.ones(1000, bool), LABELS)) == 0.9


@pytest.mark.parametrize(
    ("student", "loss", "words"),
    [
        (0.9, 0.3, "distillation helped ("),
        (0.9, 0.6, "distillation helped in accuracy alone"),
        (0.7, 0.3, "distillation helped in log-loss alone"),
        (0.8, 0.5, "distillation did not help: the same network trained alone is as good or better"),
    ],
)
def test_the_verdict_is_in_words(student, loss, words):
    alone, teacher = ({"accuracy": accuracy, "log_loss": 0.5} for accuracy in (0.8, 0.95))
    said = verdict({"accuracy": student, "log_loss": loss}, alone, teacher, {"value": 0.66})
    assert said.startswith(words)
    assert "66 % of the teacher's gain" in said
