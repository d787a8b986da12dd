"""Shorter searches of settings, for tests that depend on what is searched and not on how finely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from utils import stacking_methods
from utils.combiners import boosting, forest, fusion_learner, greedy, logistic, perceptron, pooling


@contextmanager
def short_searches() -> Iterator[None]:
    """Let learners and pools search few settings, at least two, and greedy selections take few steps.

    Logistic stackers keep both forms, on one kind of features; strong ridges need the fewest iterations.
    """

    def logistic_learner(kinds: Sequence[str]) -> logistic.LogisticLearner:
        return logistic.LogisticLearner(tuple(kinds[:1]), strengths=logistic.STRENGTHS[:4:3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking_methods, "LogisticLearner", logistic_learner)
        patch.setattr(forest, "TREES", 4)
        patch.setattr(forest, "LEAVES", forest.LEAVES[:1])
        patch.setattr(forest, "SHRINKAGES", forest.SHRINKAGES[::2])
        for learner in (boosting, fusion_learner, perceptron):
            patch.setattr(learner, "STOPS", 2)
        patch.setattr(greedy, "STEPS", 8)
        patch.setattr(greedy, "BAGS", 4)
        patch.setattr(pooling, "STRENGTHS", (np.inf, 1.0, 0.1, 0.0))
        yield
