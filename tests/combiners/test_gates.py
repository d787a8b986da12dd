"""Gates: attention over all inputs and sparse gates, fitted and fixed."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.gate_learners import AttentionLearner, SparseLearner
from utils.combiners.gates import fixed_gate
from utils.numeric.metrics import softmax

M, N, C = 3, 120, 4


@pytest.fixture(scope="module")
def rows():
    """Members 0 and 1 are each right on one half of the rows, and certain there; member 2 guesses."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    for member, half in enumerate((np.arange(N) < N // 2, np.arange(N) >= N // 2)):
        logits[member, half] += 6 * np.eye(C)[labels[half]]
    return logits, labels


def test_attention_weights_sum_to_one_and_prefer_the_certain_member(rows):
    logits, labels = rows
    gate = AttentionLearner(width=16, epochs=60, lr=0.02, seed=1).fit(logits, labels, {"epochs": 60})
    weights = gate.weights(logits)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    first = np.arange(N) < N // 2
    assert weights[first, 0].mean() > weights[~first, 0].mean()
    np.testing.assert_allclose(
        gate.predict_proba(logits), (weights.T[:, :, None] * softmax(logits)).sum(axis=0), atol=1e-12
    )


def test_a_setting_is_the_same_training_stopped_earlier(rows):
    logits, labels = rows
    learner = AttentionLearner(width=8, epochs=12, lr=0.01, seed=3)
    by_setting = learner.predictions(logits, labels, logits)
    assert len(by_setting) == len(learner.settings())
    for setting, expected in zip(learner.settings(), by_setting, strict=True):
        found = learner.fit(logits, labels, setting).predict_proba(logits).astype(np.float32)
        assert found.tobytes() == expected.tobytes()


def test_a_fixed_gate_is_the_plain_mean_of_its_experts(rows):
    logits, _ = rows
    gate = fixed_gate(np.array([2, 0]), C)
    np.testing.assert_allclose(gate.predict_proba(logits), softmax(logits[[2, 0]]).mean(axis=0), atol=1e-12)


def test_a_sparse_gate_reads_its_cheapest_expert_and_weights_no_more_than_it_may(rows):
    logits, labels = rows
    learner = SparseLearner(lambda *_: [0, 1, 2], 1, 8, 5, seed=1, costs=np.array([3.0, 2.0, 1.0]))
    gate = learner.fit(logits, labels, {"epochs": 5})
    assert gate.experts[gate.reader] == 2
    weights = gate.weights(logits)
    assert ((weights > 0).sum(axis=1) <= 2).all()
    assert (weights[:, gate.reader] > 0).all()
    changed = logits.copy()
    changed[:2] = 0
    np.testing.assert_array_equal(gate.scores(changed), gate.scores(logits))


def test_only_a_learner_that_may_be_fixed_offers_no_epochs():
    settings = [SparseLearner(lambda *_: [0], 1, 4, 10, 1, fixed).settings()[0]["epochs"] for fixed in (True, False)]
    assert settings[0] == 0
    assert settings[1] > 0
