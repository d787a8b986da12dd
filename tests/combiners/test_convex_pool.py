"""The convex pool: what its copies read, what it reports, and its score over simulated workspaces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from utils.combiners.convex_pool import ConvexPool
from utils.numeric import super_learner
from utils.numeric.metrics import clipped_log, log_loss_per_row, softmax


def ridge(features, labels):
    """A ridge classifier of two classes, cheap to fit some thousand times: features (n, F) -> probabilities (n, 2)."""
    centre, targets = features.mean(axis=0), np.where(labels == 1, 1.0, -1.0)
    centred = features - centre
    gram = centred.T @ centred + np.eye(features.shape[1])
    direction = np.linalg.solve(gram, centred.T @ (targets - targets.mean()))

    def predict(rows):
        margins = 2 * ((rows - centre) @ direction + targets.mean())
        return softmax(np.stack([-margins, margins], axis=1))

    return predict


@dataclass
class Simulation:
    """A small workspace whose inputs are ridge classifiers, each on two features of its own, of which few tell much."""

    seed: int
    rows: ClassVar[int] = 80
    inputs: ClassVar[int] = 8

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)
        self.x, self.labels = self.draw(self.rows)
        self.folds = self.random.permutation(np.arange(self.rows) % 5)

    def draw(self, count):
        labels = self.random.integers(0, 2, count)
        x = self.random.normal(size=(self.inputs, count, 2))
        x[0] += np.where(labels == 1, 0.2, -0.2)[:, None]
        return x, labels

    def predictions(self, held_out, x):
        """(I, n, 2): log-probabilities for rows x (I, n, 2) by copies of the inputs without these folds."""
        fitted = ~np.isin(self.folds, held_out)
        pairs = zip(self.x, x, strict=True)
        return clipped_log(np.stack([ridge(own[fitted], self.labels[fitted])(asked) for own, asked in pairs]))

    def crossfit(self, *held_out):
        """(I, N, 2): by copies without the row's fold and these."""
        scores = np.empty((self.inputs, self.rows, 2))
        for fold in range(5):
            inside = self.folds == fold
            scores[:, inside] = self.predictions((fold, *held_out), self.x[:, inside])
        return scores

    def differences(self):
        """Unseen score less the loss on new rows, by two levels and by one; and the score's standard error.

        Both losses are those of the pool less those of equal weights, which were not fitted: this removes most of the
        chance in the rows.
        """
        new_x, new_labels = self.draw(2000)
        crossfit, equal = self.crossfit(), np.full(self.inputs, 1 / self.inputs)
        of_equal = log_loss_per_row(pooled(equal, crossfit), self.labels)
        found = []
        for inner in (self.crossfit, lambda fold: crossfit):
            RecordedPool.fitted.clear()
            losses = log_loss_per_row(
                RecordedPool().fit_two_level(crossfit, inner, self.labels, self.folds), self.labels
            )
            of_new = 0.0
            for fold, copy in enumerate(RecordedPool.fitted[:5]):
                new = self.predictions((fold,), new_x)
                gain = log_loss_per_row(copy._predict_proba(new), new_labels)
                gain -= log_loss_per_row(pooled(equal, new), new_labels)
                of_new += gain.mean() * (self.folds == fold).mean()
            found.append((losses - of_equal).mean() - of_new)
            error = losses.std(ddof=1) / self.rows**0.5
        return (*found, error)


class RecordedPool(ConvexPool):
    """Keeps its copies, in the order of the folds."""

    fitted: ClassVar[list[ConvexPool]] = []

    def _fit(self, logits, labels, folds):
        super()._fit(logits, labels, folds)
        self.fitted.append(self)


def pooled(weights, scores):
    return softmax(np.tensordot(weights, scores, axes=1))


@pytest.mark.slow
def test_the_score_by_two_levels_is_unbiased_and_that_by_one_too_good(monkeypatch):
    monkeypatch.setattr(super_learner, "STRENGTHS", (np.inf, 0.03, 0.003, 0.0))  # as many as the time allows
    two_levels, one_level, errors = np.array([Simulation(seed).differences() for seed in range(100)]).T
    assert abs(two_levels.mean()) < 0.15 * errors.mean()
    assert one_level.mean() < -0.2 * errors.mean()


def test_its_copies_read_what_is_given_for_their_fold_and_answer_from_the_cross_fitted_scores():
    simulation = Simulation(3)
    crossfit = simulation.crossfit()
    answers = ConvexPool().fit_two_level(crossfit, simulation.crossfit, simulation.labels, simulation.folds)
    for fold in range(5):
        inside = simulation.folds == fold
        read = simulation.crossfit(fold)[:, ~inside]
        copy = super_learner.fit(read, simulation.labels[~inside], simulation.folds[~inside])
        np.testing.assert_allclose(answers[inside], pooled(copy.weights, crossfit[:, inside]), atol=1e-9)


def test_its_copies_are_fitted_on_rows_with_inner_predictions_of_every_input():
    simulation = Simulation(3)
    crossfit, folds = simulation.crossfit(), simulation.folds

    def known(fold):
        return np.isin(folds, ((fold + 1) % 5, (fold - 1) % 5, fold))

    def inner(fold):
        scores = simulation.crossfit(fold)
        scores[2, ~known(fold)] = np.nan  # an earlier version has built the other inputs
        return scores

    answers = ConvexPool().fit_two_level(crossfit, inner, simulation.labels, folds)
    for fold in range(5):
        inside = folds == fold
        read = known(fold) & ~inside
        copy = super_learner.fit(simulation.crossfit(fold)[:, read], simulation.labels[read], folds[read])
        np.testing.assert_allclose(answers[inside], pooled(copy.weights, crossfit[:, inside]), atol=1e-9)


def test_the_report_names_weights_best_input_and_penalty():
    simulation = Simulation(4)
    names = tuple("abcdefgh")
    pool = ConvexPool().fit(simulation.crossfit(), simulation.labels, simulation.folds)
    report = json.loads(json.dumps(pool.report(names), allow_nan=False))
    assert tuple(report["input_weights"]) == names
    assert report["input_weights"][report["best_input"]] > 0
    assert sum(report["input_weights"].values()) == pytest.approx(1 / pool.temperature)
    losses = dict(map(tuple, report["held_out_losses"]))
    assert losses[report["strength"]] == pytest.approx(min(losses.values()))
    single = ConvexPool().fit(simulation.crossfit(), simulation.labels, np.zeros(80, dtype=int)).report(names)
    assert (single["strength"], single["held_out_losses"]) == ("infinite", None)
