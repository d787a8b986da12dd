"""The distillation benchmark: what its rows say, on outcomes made by hand and on one split that it runs itself."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import PROJECT, ZOO_CLASSES, write_digits

import distillation

sys.path.insert(0, str(PROJECT / "scripts"))


def outcome(alone: float, student: float, teacher: float) -> dict:
    def scored(accuracy: float) -> dict:
        scores = {"accuracy": accuracy, "log_loss": 1 - accuracy, "ece": 0.1}
        return {"scores": scores, "agreement": accuracy, "history": [{"val_accuracy": accuracy}]}

    said = {"scores": scored(teacher)["scores"], "oof": scored(0.8)["scores"], "entropy": 0.3}
    return {"alone": scored(alone), "oof": scored(student), "teacher": said}


def figures(rows: list[dict]) -> dict[str, dict]:
    return {row["what"]: row for row in rows}


def test_the_share_that_is_kept_is_that_of_the_means():
    rows = figures(distillation.score_rows([outcome(0.8, 0.86, 0.9), outcome(0.82, 0.84, 0.9)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student (oof)"]
    assert kept["figure"] == pytest.approx(0.08 / 0.18, abs=1e-3)
    assert kept["holds"] is False
    gain = rows["log-loss: gain of the student (oof) over the network alone"]
    assert (gain["figure"], gain["holds"]) == (0.04, True)
    assert "better in 2 of 2" in gain["peer"]
    assert rows["accuracy over 2 splits: alone"]["figure"] == 0.81
    assert rows["accuracy: gain of the teacher over the network alone"]["figure"] == pytest.approx(0.09)
    assert rows["log-loss of the teacher's cross-fitted targets, train rows"]["figure"] == pytest.approx(0.2)


def test_a_teacher_that_gains_nothing_leaves_no_share():
    rows = figures(distillation.score_rows([outcome(0.9, 0.9, 0.9)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student (oof)"]
    assert (kept["figure"], kept["holds"], kept["peer"]) == (None, None, "the teacher gains nothing")


def test_a_teacher_that_gains_on_some_splits_alone_leaves_a_share_without_bounds():
    rows = figures(distillation.score_rows([outcome(0.8, 0.85, 0.9), outcome(0.8, 0.81, 0.79)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student (oof)"]
    assert (kept["figure"], kept["peer"]) == (0.667, "no bounds: the teacher does not gain for certain")


def test_the_trainings_of_a_split_count_as_their_mean():
    found = distillation.averaged([outcome(0.8, 0.86, 0.9), outcome(0.82, 0.84, 0.9)])
    assert found["alone"]["scores"]["accuracy"] == pytest.approx(0.81)
    assert found["oof"]["scores"]["log_loss"] == pytest.approx(0.15)
    assert found["oof"]["agreement"] == pytest.approx(0.85)
    assert [curve[0]["val_accuracy"] for curve in found["alone"]["history"]] == [0.8, 0.82]
    assert found["teacher"] == outcome(0, 0, 0.9)["teacher"]


def test_cached_targets_are_below_two_megabytes():
    row = distillation.cache_row()
    assert row["holds"]
    assert 0.3 < row["figure"] < 2


def made_by_hand(data) -> dict[str, np.ndarray]:
    """A prepared split whose two members are right on most rows."""
    ids = np.array(sorted(str(path.relative_to(data)) for path in data.glob("*/*.png")))
    labels = np.array([int(name.partition("/")[0]) for name in ids])
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(2, len(ids), 4)) + 4 * np.eye(4)[labels]).astype(np.float32)
    part = np.array(["train", "train", "train", "val", "test"])[np.arange(len(ids)) % 5]
    honest, train, test = part != "test", part == "train", part == "test"
    return {
        **{"members": np.array(["a", "b"]), "classes": np.array(list(map(str, ZOO_CLASSES)))},
        **{"logits": logits[:, honest], "labels": labels[honest], "sample_ids": ids[honest], "split": part[honest]},
        **{"fold": np.arange(honest.sum()) % 3, "test_logits": logits[:, test], "test_labels": labels[test]},
        **{"test_ids": ids[test], "train_ids": ids[train], "train_labels": labels[train]},
    }


def test_one_split_is_taught_and_scored(tmp_path, monkeypatch):
    data = write_digits(tmp_path / "Data", per_class=20)
    split = made_by_hand(data)
    monkeypatch.setattr(distillation.prepare, "ZOO", tmp_path / "zoo")
    classroom = distillation.Classroom(split, data, tmp_path, whole=True)
    teacher = classroom.teacher()
    assert teacher["scores"]["accuracy"] > 0.9
    assert teacher["oof"]["accuracy"] > 0.9
    found = {who: classroom.student(who, 2, 1) for who in ("alone", "oof")}
    assert [len(one["history"]) for one in found.values()] == [2, 2]
    assert found["oof"]["history"] != found["alone"]["history"]


def test_networks_are_asked_about_the_views_that_the_student_is_shown(tmp_path, monkeypatch):
    """By two networks with random weights: what they say is what the combiner makes of their logits."""
    data = write_digits(tmp_path / "Data", per_class=20)
    split = made_by_hand(data)
    monkeypatch.setattr(distillation.prepare, "ZOO", tmp_path / "zoo")
    classroom = distillation.Classroom(split, data, tmp_path, whole=True)
    asked = []
    from utils.predictions import streaming

    def open_network(spec):
        asked.append(spec.checkpoint)
        return distillation._fresh(4, len(asked))

    monkeypatch.setattr(streaming, "open_network", open_network)
    lessons = {
        who: distillation._batch_schedule(classroom.sources["train"], who, np.ones(48, bool), batch=64)
        for who in distillation.KINDS[1:]
    }
    teach = {who: classroom._asked(one) for who, one in lessons.items()}
    assert asked == [tmp_path / "a_final.pth", tmp_path / "b_final.pth"] * 2
    for one in teach.values():
        assert np.exp(one(0)).sum(axis=1) == pytest.approx(1, abs=1e-5)
        assert not np.array_equal(one(0), one(1))
    assert np.array_equal(teach["views"](0), teach["views"](4))  # views come back
    assert not np.array_equal(teach["consistent"](0), teach["consistent"](4))
