"""Torch modules of the simple combiners against their formulas."""

from __future__ import annotations

import numpy as np
import torch

from utils.combiners import heads
from utils.numeric.metrics import softmax

LOGITS = np.random.default_rng(10).normal(size=(3, 20, 4)).astype(np.float32)
WEIGHTS, TEMPERATURES = np.array([0.2, 0.3, 0.5]), np.array([1.0, 2.0, 0.5])


def answers(module: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(LOGITS.transpose(1, 0, 2).copy())).numpy()


def test_mean_of_probabilities():
    np.testing.assert_allclose(answers(heads.MeanOfProbabilities()), softmax(LOGITS).mean(axis=0), atol=1e-6)


def test_probability_of_mean_logits_divides_by_both_temperatures():
    mean = (LOGITS / TEMPERATURES[:, None, None]).mean(axis=0)
    found = answers(heads.ProbabilityOfMeanLogits(1.5, TEMPERATURES))
    np.testing.assert_allclose(found, softmax(mean / 1.5), atol=1e-6)


def test_a_tied_vote_goes_to_the_larger_mean_probability():
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    shares = heads.VoteShares(5e-7)(logits)[0]
    assert shares[0] > shares[1] > shares[2]
    assert abs(shares.sum().item() - 1) < 1e-6


def test_a_linear_pool_at_a_temperature():
    mixture = np.tensordot(WEIGHTS, softmax(LOGITS / TEMPERATURES[:, None, None]), axes=1)
    found = answers(heads.LinearPool(WEIGHTS, 2.0, TEMPERATURES))
    np.testing.assert_allclose(found, softmax(np.log(mixture) / 2.0), atol=1e-6)


def test_a_log_linear_pool_clips_log_probabilities():
    certain = torch.tensor([[[100.0, 0.0], [0.0, 1.0]]])
    found = heads.LogLinearPool(np.array([0.5, 0.5]), 1.0, np.ones(2))(certain)[0]
    scores = 0.5 * (np.maximum([0, -100], np.log(1e-12)) + np.log(softmax(np.array([0.0, 1.0]))))
    np.testing.assert_allclose(found.numpy(), softmax(scores), atol=1e-6)
