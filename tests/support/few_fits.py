"""Fewer fits and timings in a run, for tests of commands that depend on neither their number nor their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from utils import meta_methods, stacking_methods
from utils.building import latency, sparse_timing
from utils.combiners import greedy, logistic, perceptron, pooling
from utils.core import engines
from utils.numeric import super_learner


@contextmanager
def few_fits() -> Iterator[None]:
    """Fit with few bags, strengths and kinds of features in this process alone, and time each network twice.

    Forks of a process that has imported this much took a sixth of a small pipeline.
    """

    def on_one_kind(learner: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kinds, *arguments: learner(kinds[:1], *arguments)

    logistic_learner = partial(logistic.LogisticLearner, strengths=logistic.STRENGTHS[::3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "cores", lambda: 1)
        for module in (greedy, pooling):
            patch.setattr(module, "BAGS", 2)
        patch.setattr(pooling, "STRENGTHS", pooling.STRENGTHS[::3])
        patch.setattr(super_learner, "STRENGTHS", super_learner.STRENGTHS[::5])
        patch.setattr(stacking_methods, "LogisticLearner", on_one_kind(logistic_learner))
        for methods in (stacking_methods, meta_methods):
            patch.setattr(methods, "PerceptronLearner", on_one_kind(perceptron.PerceptronLearner))
        patch.setattr(latency, "WARM", 0)
        patch.setattr(latency, "MOST", 2)
        patch.setattr(sparse_timing, "MOST", 2)
        yield


@pytest.fixture(scope="module", autouse=True)
def fewer_fits() -> Iterator[None]:
    """For all tests of a module that imports this fixture."""
    with few_fits():
        yield
