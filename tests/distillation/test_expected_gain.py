"""What is said before training: how far the teacher is ahead of the student's architecture on out-of-sample rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from given_predictions import logged
from stored_predictions import workspace_at
from student_runs import SMALL, store_of

from utils.distillation import expected_gain, students, teachers

NAME = "CustomConvNeXt"


@pytest.fixture
def store(built):
    return store_of(workspace_at(built), SMALL)


def predictions(monkeypatch, store, teacher_hits: float, member_hits: float) -> None:
    """Cross-fitted predictions of teacher and member that are right on these fractions of the rows."""

    def crossfit(store_, teacher, split, sample_ids):
        images = store_.images(split)
        labels = dict(zip(images.sample_ids, images.labels.tolist(), strict=True))
        truth = np.array([labels[sample_id] for sample_id in sample_ids])
        fraction = member_hits if teacher.is_member else teacher_hits
        rng = np.random.default_rng(int(teacher.is_member))
        hits = rng.random(len(truth)) < fraction
        classes = len(store_.catalog.classes)
        predicted = np.where(hits, truth, (truth + 1) % classes)
        probabilities = np.full((len(truth), classes), 0.3 / (classes - 1), dtype=np.float32)
        probabilities[np.arange(len(truth)), predicted] = 0.7
        return np.log(probabilities)

    monkeypatch.setattr(teachers, "crossfit_log_probabilities", crossfit)


def stated(store, caplog, teacher: str = "soft_voting", student: str = NAME):
    resolved = students.resolve(store, student)
    with logged(caplog):
        return expected_gain.before_training(
            store, resolved, teachers.resolve(store, teacher, excluded_member=resolved.member)
        )


def test_a_teacher_that_is_ahead_is_stated_with_its_interval(store, monkeypatch, caplog):
    predictions(monkeypatch, store, 0.95, 0.6)
    gain = stated(store, caplog)
    rows = sum(len(store.images(split).sample_ids) for split in ("train", "val"))
    assert (gain["member"], gain["rows"]) == (NAME, rows)
    assert gain["accuracy"]["value"] == pytest.approx(0.35, abs=0.06)
    assert gain["accuracy"]["interval"][0] > 0
    assert f"is ahead of {NAME}, the student's architecture alone, on {rows} out-of-sample rows" in caplog.text
    assert "nothing that a student could keep" not in caplog.text


def test_a_gap_within_noise_is_warned_of(store, monkeypatch, caplog):
    predictions(monkeypatch, store, 0.8, 0.8)
    gain = stated(store, caplog)
    assert gain["accuracy"]["interval"][0] < 0 < gain["accuracy"]["interval"][1]
    assert "there is nothing that a student could keep" in caplog.text


def test_without_a_member_of_the_architecture_nothing_is_stated(store, caplog):
    assert stated(store, caplog, student="CustomMobileOne") is None
    assert "no member has the student's architecture CustomMobileOne" in caplog.text


def test_a_student_that_is_its_teachers_only_network_is_named(store, caplog):
    assert stated(store, caplog, teacher=NAME) is None  # the member is not compared with itself
    assert "is one network of the student's own architecture" in caplog.text


def test_another_preprocessing_is_named(store, caplog):
    student = students.resolve(store, NAME)
    larger = replace(student, preprocessing=replace(student.preprocessing, input_size=48))
    with logged(caplog):
        expected_gain.before_training(store, larger, teachers.resolve(store, "soft_voting", excluded_member="x"))
    assert "each network is shown the same view by its own preprocessing" in caplog.text
