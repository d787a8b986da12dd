"""Cross-fitted scores beside scores on many new rows, over simulated workspaces with rare classes and few groups."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from utils import base_back
from utils.combiners.logistic import LogisticLearner
from utils.combiners.protocol import fit_crossfitted
from utils.numeric.means import mean_interval, standard_error
from utils.numeric.metrics import log_loss_per_row
from utils.predictions import folds as workspace_folds
from utils.stacking_methods import StackingLogistic

SIGNAL, OVERCONFIDENCE = 2.2, 1.4
NEW_ROWS = 15
"""Times as many groups as the workspace has."""
WORKSPACES = {
    "rare classes": SimpleNamespace(groups=(50, 40, 20, 3, 1), rows=(1, 1, 1, 1, 1)),
    "few groups": SimpleNamespace(groups=(16, 12, 2), rows=(3, 3, 6)),
}
"""Number of groups and of rows per group, class by class."""


def draw(rng, workspace, times=1):
    """Labels, groups and logits (2, N, C) of members that are too confident; rows of a group share some noise."""
    counts, sizes = np.array(workspace.groups) * times, np.array(workspace.rows)
    class_of_group = np.repeat(np.arange(len(counts)), counts)
    groups = np.repeat(np.arange(len(class_of_group)), sizes[class_of_group])
    labels = class_of_group[groups]
    noise = np.sqrt(0.2) * rng.normal(size=(len(class_of_group), len(counts)))[groups]
    noise = noise + np.sqrt(0.4) * rng.normal(size=noise.shape) + np.sqrt(0.4) * rng.normal(size=(2, *noise.shape))
    logits = OVERCONFIDENCE * SIGNAL * (noise + SIGNAL * np.eye(len(counts))[labels])
    return labels, groups, logits.astype(np.float32)


def simulated(workspace, seed):
    """Cross-fitted log-loss less that on new rows, its standard error, and whether the interval covers the latter."""
    rng = np.random.default_rng(seed)
    labels, groups, logits = draw(rng, workspace)
    folds = workspace_folds._assigned(base_back.load_bundled("samples"), labels, groups, seed)
    learner = LogisticLearner(("log_probabilities",), forms=("shrunk_to_pool",), strengths=(1.0, 0.01))
    recipe = StackingLogistic(learner=learner)
    losses = log_loss_per_row(fit_crossfitted(recipe, logits, labels, folds), labels)
    new_labels, _, new_logits = draw(rng, workspace, NEW_ROWS)
    expected = log_loss_per_row(recipe.predict_proba(new_logits), new_labels).mean()
    low, high = mean_interval(losses, groups)
    return losses.mean() - expected, standard_error(losses, groups), low <= expected <= high


def require_unbiased(count):
    results = [simulated(workspace, seed) for workspace in WORKSPACES.values() for seed in range(count // 2)]
    differences, errors, covered = np.array(results).T
    assert abs(differences.mean()) <= 0.25 * errors.mean()
    return covered.mean()


def test_the_score_is_that_of_new_rows_in_the_mean():
    assert require_unbiased(20) >= 0.8


@pytest.mark.slow
def test_over_two_hundred_workspaces_the_interval_covers_the_score_of_new_rows():
    assert 0.93 <= require_unbiased(200) <= 0.98
