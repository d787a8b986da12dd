"""Learners of stackers: a setting is one model of the path, and standardisation is folded into the first layer."""

from __future__ import annotations

import numpy as np
import pytest
import xgboost

from utils.combiners.boosting import BoosterLearner
from utils.combiners.forest import ForestLearner
from utils.combiners.perceptron import PerceptronLearner
from utils.numeric.metrics import log_loss

pytestmark = pytest.mark.usefixtures("small_forests")
M, N, C = 3, 90, 3


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    logits[:, np.arange(N), labels] += 1
    return logits, labels


LEARNERS = [
    BoosterLearner(n_estimators=20, max_depth=3, learning_rate=0.3, seed=1),
    ForestLearner(seed=1),
    PerceptronLearner(("log_probabilities", "probabilities"), (8,), 12, 0.01, 0.1, 1),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_the_model_of_a_setting_answers_as_when_it_was_tried(learner, rows):
    logits, labels = rows
    by_setting = learner.predictions(logits[:, ::2], labels[::2], logits[:, 1::2])
    settings = learner.settings()
    assert by_setting.shape == (len(settings), N // 2, C)
    for index in (0, len(settings) - 1):
        model = learner.fit(logits[:, ::2], labels[::2], settings[index])
        np.testing.assert_allclose(model.predict_proba(logits[:, 1::2]), by_setting[index], atol=1e-5)


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_it_learns_the_rows(learner, rows):
    logits, labels = rows
    model = learner.fit(logits, labels, learner.settings()[-1])
    assert log_loss(model.predict_proba(logits), labels) < np.log(C)


def test_boosted_trees_keep_their_rows_in_bins_alone(rows):
    """All fits of a path stay open: rows as floats would take three times the memory of their bins."""
    logits, labels = rows
    trainings = LEARNERS[0].trainings(0, logits, labels, [np.arange(N) < 30, np.arange(N) >= 60])
    for _, training in trainings:
        training.advance([0])
        assert isinstance(training.inside, xgboost.QuantileDMatrix)
        assert training.table is trainings[0][1].table
