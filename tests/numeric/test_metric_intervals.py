"""Intervals of point metrics: they hold the truth as often as they say, and are missing where rows are too few."""

from __future__ import annotations

import numpy as np
import pytest

from utils.numeric.metric_intervals import metric_intervals
from utils.numeric.metrics import point_metrics, softmax
from utils.numeric.statistics import bootstrap_metrics

NAMES = "abcd"


def rows(rng, count, classes=4, strength=3.0):
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(strength * logits), labels


def intervals(probabilities, labels, groups=None, replicates=200):
    samples = bootstrap_metrics([probabilities], labels, groups=groups, replicates=replicates)
    metrics = point_metrics(probabilities, labels, NAMES[: probabilities.shape[1]])
    samples = {name: values[0] for name, values in samples.items()}
    return metrics, *metric_intervals(metrics, samples, probabilities, labels, groups)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95% accuracy on 150 rows: percentiles of the bootstrap held F1 in 89% and log-loss in 90% of cases."""
    rng = np.random.default_rng(0)
    truth = point_metrics(*rows(rng, 200_000), NAMES) | {"ece": 0.0}
    held = dict.fromkeys(("accuracy", "f1_macro", "log_loss", "brier", "ece"), 0)
    given = held.copy()
    for _ in range(150):
        _, found, _ = intervals(*rows(rng, 150))
        for name in held.keys() & found.keys():
            low, high = found[name]
            held[name] += low <= truth[name] <= high
            given[name] += 1
    for name, count in held.items():
        assert given[name] > 100
        assert count / given[name] >= 0.92, name


def test_the_value_is_inside_its_interval():
    metrics, found, reason = intervals(*rows(np.random.default_rng(1), 300))
    assert reason == ""
    assert found.keys() >= {"accuracy", "f1_macro", "precision_weighted", "log_loss", "ece", "mce", "roc_auc_ovr_macro"}
    for name, (low, high) in found.items():
        assert low <= metrics[name] <= high, name


def test_calibration_errors_begin_at_0_where_chance_alone_may_give_them():
    rng = np.random.default_rng(2)
    probabilities, labels = rows(rng, 200)
    assert intervals(probabilities, labels)[1]["ece"][0] == 0.0
    sharpened = softmax(3 * np.log(probabilities))
    found = intervals(sharpened, labels)
    assert 0 < found[1]["ece"][0] <= found[0]["ece"]


def test_what_is_too_few_is_left_out_and_said():
    labels = np.arange(60) % 4
    certain = 0.96 * np.eye(4)[labels] + 0.01
    metrics, found, reason = intervals(certain, labels)
    assert metrics["accuracy"] == found["accuracy"][1] == found["f1_macro"][1] == 1.0
    assert 0.8 < found["f1_macro"][0] < 1
    assert "log_loss" not in found
    assert reason == "0 errors; the interval of a mean loss needs 3"
    rare = np.concatenate([labels[labels < 3], [3, 3]])
    _, found, reason = intervals(0.96 * np.eye(4)[rare] + 0.01, rare)
    assert "f1_macro" not in found
    assert "f1_weighted" in found
    assert "a class with 2 rows; the interval of a macro average needs 5" in reason
    assert intervals(certain, labels, groups=labels)[1:] == ({}, "4 groups; an interval needs 10")
    assert intervals(certain[:8], labels[:8])[1:] == ({}, "8 rows; an interval needs 10")


@pytest.mark.parametrize("metric", ["accuracy", "log_loss", "f1_macro"])
def test_rows_in_groups_widen_every_interval(metric):
    probabilities, labels = rows(np.random.default_rng(3), 100)
    repeated = np.repeat(np.arange(100), 6)
    alone = intervals(probabilities, labels)[1][metric]
    grouped = intervals(probabilities[repeated], labels[repeated], groups=repeated)[1][metric]
    ungrouped = intervals(probabilities[repeated], labels[repeated])[1][metric]
    assert grouped[1] - grouped[0] == pytest.approx(alone[1] - alone[0], rel=0.35)
    assert ungrouped[1] - ungrouped[0] < 0.6 * (grouped[1] - grouped[0])


def test_areas_and_f1_hold_the_truth_in_small_classes():
    """Four classes of 8 rows: without widening the area under the ROC curve was held in 87% of cases."""
    rng = np.random.default_rng(5)
    truth = point_metrics(*rows(rng, 200_000, strength=2.0), NAMES)
    held = dict.fromkeys(("f1_macro", "roc_auc_ovr_macro"), 0)
    for _ in range(200):
        labels = np.repeat(np.arange(4), 8)
        logits = rng.normal(size=(32, 4))
        logits[np.arange(32), labels] += 2.0
        _, found, _ = intervals(softmax(2.0 * logits), labels)
        for name in held:
            held[name] += found[name][0] <= truth[name] <= found[name][1]
    assert all(count / 200 >= 0.93 for count in held.values()), held


def test_a_class_of_few_groups_has_no_macro_interval():
    probabilities, _ = rows(np.random.default_rng(6), 200, classes=2)
    labels = np.repeat([0, 1], [160, 40])
    groups = np.arange(200) // 10
    _, found, reason = intervals(probabilities, labels, groups)
    assert "f1_macro" not in found
    assert reason.endswith("a class with 4 groups; the interval of a macro average needs 5")
    assert "f1_macro" in intervals(probabilities, labels)[1]
