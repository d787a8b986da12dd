"""Pools of members: the two forms against their formulas, and what a restored pool keeps."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.pooled_members import LOWEST_SCORE, POOLS
from utils.combiners.weighting import WeightedPool
from utils.numeric.metrics import log_softmax, softmax

LOGITS = np.random.default_rng(6).normal(size=(3, 25, 4)).astype(np.float32)
WEIGHTS = np.array([0.5, 0.3, 0.2])


def pool_of(name, **more):
    return WeightedPool(pool=POOLS[name], weights=WEIGHTS, member_temperatures=np.array([1.0, 2.0, 0.5]), **more)


def test_a_linear_pool_is_the_mixture_of_tempered_members():
    members = softmax(LOGITS / np.array([1.0, 2.0, 0.5])[:, None, None])
    expected = np.tensordot(WEIGHTS, members, axes=1)
    np.testing.assert_allclose(pool_of("linear").predict_proba(LOGITS), expected, atol=1e-12)


def test_a_log_linear_pool_divides_the_weighted_log_probabilities_by_its_temperature():
    scores = np.maximum(log_softmax(LOGITS / np.array([1.0, 2.0, 0.5])[:, None, None]), LOWEST_SCORE)
    expected = softmax(np.tensordot(WEIGHTS, scores, axes=1) / 0.7)
    np.testing.assert_allclose(pool_of("log_linear", temperature=0.7).predict_proba(LOGITS), expected, atol=1e-12)


@pytest.mark.parametrize("name", sorted(POOLS))
def test_a_restored_pool_answers_with_the_same_bytes(name):
    pool = pool_of(name, temperature=1.3)
    again = WeightedPool.from_state(pool.state())
    assert set(pool.state()) == {"shares", "member_temperatures", "temperature", "log_linear"}
    assert again.predict_proba(LOGITS).tobytes() == pool.predict_proba(LOGITS).tobytes()


def test_members_without_weight_are_not_used():
    pool = pool_of("linear")
    pool.weights = np.array([0.6, 0.0, 0.4])
    used = pool.used(3)
    assert used.tolist() == [True, False, True]
    np.testing.assert_allclose(pool.restricted(used).predict_proba(LOGITS[used]), pool.predict_proba(LOGITS))


@pytest.mark.parametrize("name", sorted(POOLS))
def test_votes_lie_between_zero_and_one(name):
    scores = np.maximum(log_softmax(LOGITS * 100), LOWEST_SCORE)
    votes = POOLS[name].votes(POOLS[name].parts(scores))
    assert votes.min() >= 0
    assert votes.max() <= 1
