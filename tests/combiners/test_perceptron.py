"""Perceptrons of a stacker: which fits train side by side."""

from __future__ import annotations

import numpy as np
import pytest

from utils.combiners.perceptron import SIDE_BY_SIDE, PerceptronLearner

M, N, C = 3, 60, 4


@pytest.mark.parametrize(("hidden", "most"), [((8, 4), SIDE_BY_SIDE), ((7, 3), 1), ((1,), 1), ((), SIDE_BY_SIDE)])
def test_fits_train_alone_where_the_ones_beside_them_could_change_a_bit(hidden, most):
    rng = np.random.default_rng(0)
    learner = PerceptronLearner(("probabilities",), hidden, epochs=2, lr=0.01, dropout=0.0, seed=0)
    held_out_sets = [np.arange(N) % 5 == part for part in range(5)]
    trainings = learner.trainings(0, rng.normal(size=(M, N, C)), np.arange(N) % C, held_out_sets)
    assert sorted(fit for fits, _ in trainings for fit in fits) == list(range(5))
    assert max(len(fits) for fits, _ in trainings) == most
