"""Intervals and tests of scores: against the metrics themselves, scipy, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.numeric import statistics
from utils.numeric.metrics import point_metrics, softmax


def rows(seed, count=200, classes=4, strength=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits), labels


def drawn(labels, groups=None, replicates=30):
    return np.concatenate(list(statistics.bootstrap_counts(labels, groups, replicates=replicates, seed=1))).astype(int)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "many equal confidences"])
def test_every_sample_is_scored_as_the_metrics_score_its_rows(grouped, rounded, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 1700)  # several blocks of samples and of rows
    monkeypatch.setattr(statistics, "CACHED", 600)
    probabilities, labels = rows(0)
    if rounded:
        probabilities = probabilities.round(1)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    groups = np.random.default_rng(2).integers(0, 60, len(labels)) if grouped else None
    other = softmax(np.log(probabilities + 1e-3) * 2)
    found = statistics.bootstrap_metrics([other, probabilities], labels, groups=groups, replicates=30, seed=1)
    for sample, counts in enumerate(drawn(labels, groups)):
        own = np.repeat(np.arange(len(labels)), counts)
        expected = point_metrics(probabilities[own], labels[own], "abcd")
        for metric, values in found.items():
            is_area = metric in ("roc_auc_ovr_macro", "average_precision_macro")
            tolerance = 0.03 if is_area else 1e-5  # its influence is a first order
            assert values[1, sample] == pytest.approx(expected[metric], abs=tolerance), metric


def test_the_area_under_the_curve_has_the_interval_of_samples_that_are_ranked_anew():
    probabilities, labels = rows(3, count=300)
    counts = drawn(labels, replicates=300)
    anew = []
    for line in counts:
        own = np.repeat(np.arange(len(labels)), line)
        anew.append(point_metrics(probabilities[own], labels[own], "abcd")["roc_auc_ovr_macro"])
    found = statistics.bootstrap_metrics([probabilities], labels, replicates=300, seed=1)["roc_auc_ovr_macro"][0]
    np.testing.assert_allclose(np.quantile(found, [0.025, 0.975]), np.quantile(anew, [0.025, 0.975]), atol=2e-3)


def test_classes_keep_their_size_and_groups_stay_whole():
    labels = np.array([0] * 5 + [1] * 3 + [2])
    counts = drawn(labels, replicates=200)
    for number, size in enumerate(np.bincount(labels)):
        assert (counts[:, labels == number].sum(axis=1) == size).all()
    assert counts[:, :5].std() > 0.5
    assert (counts[:, 8] == 1).all()
    groups = np.array([7, 7, 8, 8, 9, 3, 3, 4, 5])
    counts = drawn(labels, groups, replicates=200)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 5] == counts[:, 6]).all()
    assert (counts[:, 0] != counts[:, 2]).any()
    assert len(set(counts.sum(axis=1))) > 1  # groups are of different size


def test_the_same_seed_draws_the_same_samples():
    probabilities, labels = rows(0)
    first, again, other = (
        statistics.bootstrap_metrics([probabilities], labels, replicates=20, seed=seed)["log_loss"]
        for seed in (1, 1, 2)
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_class_without_rows_and_a_single_class():
    probabilities = softmax(np.random.default_rng(0).normal(size=(40, 3)))
    for labels in (np.arange(40) % 2, np.zeros(40, dtype=int)):
        found = statistics.bootstrap_metrics([probabilities], labels, replicates=50)
        assert ("roc_auc_ovr_macro" in found) == (labels.max() > 0)
        assert all(np.isfinite(values).all() for values in found.values())
        expected = point_metrics(probabilities, labels, "abc")
        assert found["f1_macro"].min() <= expected["f1_macro"] <= found["f1_macro"].max()


def test_probabilities_of_exactly_0_and_1():
    labels = np.arange(30) % 3
    probabilities = np.eye(3)[np.where(np.arange(30) < 6, (labels + 1) % 3, labels)]
    found = statistics.bootstrap_metrics([probabilities], labels, replicates=200)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["log_loss"][0].mean() == pytest.approx(0.2 * -np.log(1e-12), rel=0.05)
    np.testing.assert_allclose(found["ece"][0], 1 - found["accuracy"][0], atol=1e-6)


def test_nan_is_refused():
    probabilities, labels = rows(0)
    probabilities[7, 1] = np.nan
    with pytest.raises(UserError, match="NaN or infinity, first row 7"):
        statistics.bootstrap_metrics([probabilities], labels, replicates=10)


def test_holm_by_hand():
    found = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    assert statistics.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({}) == {}
