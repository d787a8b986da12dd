"""Features of stackers, in numpy and as a torch module."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.combiners.stacking_features import KINDS, STEPS, STEPS_PER_NAT, centred_log, features, standardisation
from utils.combiners.stacking_heads import StackingFeatures
from utils.numeric.metrics import softmax

LOGITS = np.random.default_rng(9).normal(size=(3, 50, 4)).astype(np.float32)


def test_features_say_what_their_kind_says():
    logits = np.log(np.array([[[0.7, 0.3]], [[0.2, 0.8]]], dtype=np.float32))
    np.testing.assert_allclose(features(logits, "probabilities"), [[0.7, 0.3, 0.2, 0.8]], atol=1e-6)
    centred = features(logits, "log_probabilities")[0]
    np.testing.assert_allclose(centred[:2], [0.5 * np.log(7 / 3), -0.5 * np.log(7 / 3)], atol=1e-6)
    more = features(logits, "log_probabilities+disagreement")[0]
    assert len(more) == 4 + 3 + 2
    entropy = lambda *p: -sum(x * np.log(x) for x in p)  # noqa: E731
    mean = (entropy(0.7, 0.3) + entropy(0.2, 0.8)) / 2
    total = entropy(0.45, 0.55)
    np.testing.assert_allclose(more[4:], [total, mean, total - mean, 0.25, 0.25], atol=1e-6)


def test_logits_and_their_log_probabilities_are_the_same_features():
    logits = LOGITS
    plain = logits - logits.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(centred_log(softmax(logits)), plain, atol=1e-5)


def test_a_constant_feature_stays_finite():
    centre, scale = standardisation(np.ones((5, 3)), [2, 1])
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(centre, 1)


@pytest.mark.parametrize("kind", [*KINDS, STEPS])
def test_the_module_gives_the_same_features(kind):
    found = StackingFeatures(kind)(torch.from_numpy(LOGITS.transpose(1, 0, 2).copy())).numpy()
    np.testing.assert_allclose(found, features(LOGITS, kind), atol=1 if kind == STEPS else 1e-5)


def test_steps_are_whole_numbers_of_the_log_probabilities():
    steps = features(LOGITS, STEPS)
    np.testing.assert_array_equal(steps, np.round(steps))
    flat = np.log(softmax(LOGITS)).transpose(1, 0, 2).reshape(50, 12)
    assert np.abs(steps - flat * STEPS_PER_NAT).max() <= 0.5
