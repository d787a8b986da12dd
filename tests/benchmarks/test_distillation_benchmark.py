"""The distillation benchmark: its folds, what its rows say of made-up trainings, and a short run of it."""

from __future__ import annotations

from dataclasses import replace

import distillation_runs
import numpy as np
import pytest
from conftest import write_digits

import distillation
from distillation_rows import Trained, image_scores, score_rows

LABELS = {"val": np.arange(100) % 2, "test": np.arange(200) % 2}


def probabilities(accuracy: float, seed: int) -> dict[str, np.ndarray]:
    """Of one training that is right on this fraction of the images."""
    arrays = {}
    for split, labels in LABELS.items():
        rng = np.random.default_rng([seed, len(labels)])
        hits = rng.permutation(len(labels)) < round(accuracy * len(labels))
        predicted = np.where(hits, labels, 1 - labels)
        arrays[split] = np.where(np.eye(2, dtype=bool)[predicted], 0.9, 0.1)
    return arrays


def fold(alone: float, student: float, teacher: float, seeds: int = 2, first_seed: int = 0) -> Trained:
    arms = {}
    for number, (arm, accuracy, count) in enumerate(
        (("alone", alone, seeds), ("consistent", student, seeds), ("teacher", teacher, 1))
    ):
        each = [probabilities(accuracy, 100 * number + first_seed + seed) for seed in range(count)]
        arms[arm] = {split: np.stack([one[split] for one in each]) for split in LABELS}
    seconds = {"alone": [10.0] * seeds, "consistent": [25.0] * seeds}
    curves = {arm: [{"val_accuracy": np.ones(2), "val_log_loss": np.ones(2)}] * seeds for arm in seconds}
    return Trained(LABELS, arms, seconds, curves)


def figures(rows: list[dict]) -> dict[str, dict]:
    return {row["what"]: row for row in rows}


def test_gains_are_over_the_images_of_all_folds_and_means_over_the_seeds():
    folds = [fold(0.8, 0.9, 0.95), fold(0.7, 0.8, 0.9, first_seed=10)]
    rows = figures(score_rows("net", folds))
    assert rows["net: test images in 2 folds, 2 seeds or more"]["figure"] == 400
    assert rows["net, accuracy: alone"]["figure"] == pytest.approx(0.75)
    gain = rows["net, accuracy: gain of the student (consistent) over the network alone"]
    assert (gain["figure"], gain["holds"]) == (pytest.approx(0.1), True)
    kept = rows["net, accuracy: fraction of that gain kept (consistent)"]
    assert kept["figure"] == pytest.approx(0.1 / 0.175, abs=1e-3)
    assert kept["holds"] is False
    time = rows["net: CPU time (consistent), in that of alone"]
    assert (time["figure"], time["holds"]) == (2.5, True)


def test_a_fraction_of_a_gain_within_noise_has_no_figure():
    rows = figures(score_rows("net", [fold(0.8, 0.81, 0.805)]))
    kept = rows["net, accuracy: fraction of that gain kept (consistent)"]
    assert (kept["figure"], kept["holds"]) == (None, None)
    assert rows["net, accuracy: gain of the student (consistent) over the network alone"]["holds"] is False


def test_log_losses_are_calibrated_on_val():
    trained = fold(0.8, 0.8, 0.9, seeds=1)
    plain = image_scores([trained], "alone")["log_loss"]
    overconfident = np.where(trained.probabilities["alone"]["val"] > 0.5, 0.999, 0.001)
    tests = np.where(trained.probabilities["alone"]["test"] > 0.5, 0.999, 0.001)
    trained.probabilities["alone"].update(val=overconfident, test=tests)
    np.testing.assert_allclose(
        image_scores([trained], "alone")["log_loss"], plain, atol=0.02
    )  # up to the prior of the fit


def test_test_folds_are_disjoint_and_no_image_is_trained_on_and_tested():
    labels = np.repeat(np.arange(4), 60)
    seen = np.zeros(len(labels), dtype=int)
    for number in range(distillation_runs.N_FOLDS):
        rows = distillation_runs.fold_rows(labels, number, distillation_runs.DIGITS)
        assert len(np.unique(np.concatenate(list(rows.values())))) == sum(map(len, rows.values()))
        assert (len(rows["train"]), len(rows["val"])) == (12, 24)
        assert np.bincount(labels[rows["test"]]).tolist() == [10] * 4
        seen[rows["test"]] += 1
    assert (seen == 1).all()


def test_cached_targets_are_below_two_megabytes():
    row = distillation.cache_row()
    assert row["holds"]
    assert 0.3 < row["figure"] < 2


def test_a_short_run_keeps_its_trainings(tmp_path, monkeypatch):
    """Both kinds of targets are the mean of the members' probabilities, and a second run trains nothing."""
    images = distillation_runs.read_images(write_digits(tmp_path / "Data", per_class=12))
    design = replace(distillation.shortened(distillation_runs.DIGITS), train=0.25)  # of few images
    one = distillation_runs.Fold(images, 1, design, tmp_path / "kept")
    distillation.run([one], distillation.ARMS, 1, minutes=10)
    monkeypatch.setattr(distillation_runs.Fold, "_train", None)
    distillation.run([one], distillation.ARMS, 1, minutes=10)
    (student,) = design.students
    trained = distillation.collected(one, student, distillation.ARMS, 1)
    assert set(trained.probabilities) == {"alone", "consistent", "views", "teacher"}
    assert all(len(curves[0]["val_accuracy"]) == 2 for curves in trained.curves.values())
    assert not np.array_equal(trained.probabilities["alone"]["test"], trained.probabilities["consistent"]["test"])
    assert score_rows(student, [trained])
    assert distillation.collected(one, student, distillation.ARMS, 0) is None
    distillation.run([one], distillation.ARMS, 2, minutes=-1)  # the time is up: nothing is trained
