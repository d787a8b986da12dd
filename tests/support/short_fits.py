"""Shorter searches, fits and timings, for tests that depend on neither how fine nor how many they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from utils import meta_methods, stacking_methods
from utils.building import latency, sparse_timing
from utils.combiners import boosting, forest, fusion_learner, greedy, logistic, perceptron, pooling
from utils.core import engines
from utils.numeric import super_learner


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
        patch.setattr(forest, "SHRINKAGES", forest.SHRINKAGES[::2])
        for learner in (boosting, fusion_learner, perceptron):
            patch.setattr(learner, "STOPS", 2)
        patch.setattr(greedy, "STEPS", 8)
        patch.setattr(greedy, "BAGS", 4)
        patch.setattr(pooling, "STRENGTHS", (np.inf, 1.0, 0.1, 0.0))
        yield


@contextmanager
def few_fits() -> Iterator[None]:
    """Shorten the searches of whole commands, keep them in this process, and time each network twice.

    Forks of a process that has imported this much took a sixth of a small pipeline.
    """

    def perceptron_learner(kinds: Sequence[str], *arguments: Any) -> perceptron.PerceptronLearner:
        return perceptron.PerceptronLearner(tuple(kinds[:1]), *arguments)

    with short_searches(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "cores", lambda: 1)
        patch.setattr(super_learner, "STRENGTHS", super_learner.STRENGTHS[::5])
        for methods in (stacking_methods, meta_methods):
            patch.setattr(methods, "PerceptronLearner", perceptron_learner)
        patch.setattr(latency, "WARM", 0)
        for module in (latency, sparse_timing):
            patch.setattr(module, "MOST", 2)
        yield
