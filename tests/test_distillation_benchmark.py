"""The distillation benchmark: what its rows say, on outcomes made by hand and on one split that it runs itself."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import PROJECT, ZOO_CLASSES, write_digits

import distillation

sys.path.insert(0, str(PROJECT / "scripts"))


def outcome(alone: float, student: float, teacher: float) -> dict:
    def scores(accuracy: float) -> dict:
        return {"accuracy": accuracy, "log_loss": 1 - accuracy, "ece": 0.1}

    taught = dict.fromkeys(distillation.TEMPERATURES, scores(student))
    return {
        "scores": {"alone": scores(alone), **taught, "teacher": scores(teacher)},
        "agreement": dict.fromkeys(("alone", *taught), 0.9),
        "history": {"alone": [{"val_accuracy": alone}]},
        "entropy": 0.3,
        "oof": scores(0.8),
    }


def figures(rows: list[dict]) -> dict[str, dict]:
    return {row["what"]: row for row in rows}


def test_the_share_that_is_kept_is_that_of_the_means():
    rows = figures(distillation.score_rows([outcome(0.8, 0.86, 0.9), outcome(0.82, 0.84, 0.9)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student"]
    assert kept["figure"] == pytest.approx(0.08 / 0.18, abs=1e-3)
    assert kept["holds"] is False
    gain = rows["log-loss: gain of the student over the network alone"]
    assert (gain["figure"], gain["holds"]) == (0.04, True)
    assert "better in 2 of 2" in gain["peer"]
    assert rows["accuracy over 2 splits: alone"]["figure"] == 0.81
    assert rows["accuracy: gain of the teacher over the network alone"]["figure"] == pytest.approx(0.09)
    assert rows["log-loss of the teacher's targets (train rows, cross-fitted)"]["figure"] == pytest.approx(0.2)


def test_a_teacher_that_gains_nothing_leaves_no_share():
    rows = figures(distillation.score_rows([outcome(0.9, 0.9, 0.9)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student"]
    assert (kept["figure"], kept["holds"], kept["peer"]) == (None, None, "the teacher gains nothing")


def test_a_teacher_that_gains_on_some_splits_alone_leaves_a_share_without_bounds():
    rows = figures(distillation.score_rows([outcome(0.8, 0.85, 0.9), outcome(0.8, 0.81, 0.79)]))
    kept = rows["accuracy: share of the teacher's gain kept by the student"]
    assert (kept["figure"], kept["peer"]) == (0.667, "no bounds: the teacher does not gain for certain")


def test_the_trainings_of_a_split_count_as_their_mean():
    found = distillation.averaged([outcome(0.8, 0.86, 0.9), outcome(0.82, 0.84, 0.9)])
    assert found["scores"]["alone"]["accuracy"] == pytest.approx(0.81)
    assert found["scores"]["student"]["log_loss"] == pytest.approx(0.15)
    assert [curve[0]["val_accuracy"] for curve in found["history"]["alone"]] == [0.8, 0.82]
    assert found["agreement"]["student"] == pytest.approx(0.9)


def test_cached_targets_are_below_two_megabytes():
    row = distillation.cache_row()
    assert row["holds"]
    assert 0.3 < row["figure"] < 2


def test_one_split_is_taught_and_scored(tmp_path, monkeypatch):
    """By predictions made by hand: who is right on most rows teaches."""
    data = write_digits(tmp_path / "Data", per_class=20)
    ids = np.array(sorted(str(path.relative_to(data)) for path in data.glob("*/*.png")))
    labels = np.array([int(name.partition("/")[0]) for name in ids])
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(2, len(ids), 4)) + 4 * np.eye(4)[labels]).astype(np.float32)
    part = np.array(["train", "train", "train", "val", "test"])[np.arange(len(ids)) % 5]
    honest, train, test = part != "test", part == "train", part == "test"
    split = {
        **{"members": np.array(["a", "b"]), "classes": np.array(list(map(str, ZOO_CLASSES)))},
        **{"logits": logits[:, honest], "labels": labels[honest], "sample_ids": ids[honest], "split": part[honest]},
        **{"fold": np.arange(honest.sum()) % 3, "test_logits": logits[:, test], "test_labels": labels[test]},
        **{"test_ids": ids[test], "train_ids": ids[train], "train_labels": labels[train]},
    }
    monkeypatch.setattr(distillation.prepare, "ZOO", tmp_path / "zoo")
    found = distillation.taught(split, data, 2, 1, whole=True)
    assert set(found["scores"]) == {"alone", *distillation.TEMPERATURES, "teacher"}
    assert found["scores"]["teacher"]["accuracy"] > 0.9
    assert found["oof"]["accuracy"] > 0.9
    assert [len(rows) for rows in found["history"].values()] == [2, 2, 2]
    assert found["history"]["student"] != found["history"]["alone"]
