"""Every combiner on rows that lack a class, have two groups only, or leave nothing to be learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from combiner_cases import FACTS, QUICK, C, M

from utils.building.ensembles import COMBINERS
from utils.combiners.protocol import fit_nested
from utils.numeric import nested_cv
from utils.numeric.nested_cv import inner_folds
from utils.predictions.rows import MemberOutputs

pytestmark = pytest.mark.usefixtures("short_searches")

WIDTHS = (5, 8, 4, 6)
N = 40


def labels_of(case: str) -> np.ndarray:
    """One row of class 2, which is absent from all folds but one; or none."""
    labels = np.arange(N) % 2
    if case == "one row of a class":
        labels[7] = 2
    if case == "one class":
        labels[:] = 1
    return labels


def outputs_of(labels: np.ndarray, shift: float, method: str) -> np.ndarray | MemberOutputs:
    """Members whose logit of the true class is higher by `shift`; of no row and class where it is 0."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(M, N, C))
    logits[:, np.arange(N), labels] += shift
    logits = logits.astype(np.float32) if shift else np.zeros((M, N, C), dtype=np.float32)
    if not COMBINERS[method].configured(QUICK, FACTS).reads_embeddings:
        return logits
    embeddings = [each @ rng.normal(size=(C, width)) for each, width in zip(logits, WIDTHS, strict=True)]
    return MemberOutputs(logits, tuple(each.astype(np.float32) for each in embeddings))


@pytest.mark.parametrize("n_folds", [2, 4])
@pytest.mark.parametrize("method", sorted(COMBINERS))
def test_copies_follow_the_recipe_of_the_final_fit(method, n_folds, monkeypatch):
    """A copy is the recipe fitted on the other rows; class 2 is absent from those of one copy.

    The first round of the final fit reads fits that a copy of it does not have, so both read the first folds here.
    """
    screening = nested_cv._screening_by_first_folds
    monkeypatch.setattr(nested_cv, "_screening_by_pairs", lambda final, _: screening(final))
    labels, folds = labels_of("one row of a class"), np.arange(N) % n_folds
    recipe = COMBINERS[method].configured(QUICK, FACTS)
    outputs = outputs_of(labels, 1.5, method)
    nested = fit_nested(recipe, outputs, labels, folds)
    for probabilities in (nested.crossfit, *nested.inner.values(), recipe.predict_proba(outputs)):
        assert probabilities.shape == (N, C)
        assert (probabilities >= 0).all()
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    json.dumps(recipe.report(FACTS.names), allow_nan=False)
    if not recipe.learns or recipe.reads_embeddings:  # maps of embeddings are fitted once, without labels
        return
    for fold in (folds[labels == 2][0], 0):
        inside, outside = folds == fold, folds != fold
        copy = COMBINERS[method].configured(QUICK, FACTS)
        copy.fit(outputs[:, outside], labels[outside], inner_folds(labels, folds, outside))
        np.testing.assert_allclose(nested.crossfit[inside], copy.predict_proba(outputs[:, inside]), atol=1e-5)


ODD = {"all correct": 30.0, "all wrong": -30.0, "ties": 0.0}
"""What every member adds to the true class."""


@pytest.mark.parametrize("case", [*ODD, "one class"])
@pytest.mark.parametrize("method", sorted(COMBINERS))
def test_rows_that_teach_nothing_are_fitted(method, case):
    labels = labels_of(case)
    recipe = COMBINERS[method].configured(QUICK, FACTS)
    outputs = outputs_of(labels, ODD.get(case, 1.5), method)
    recipe.fit(outputs, labels, np.arange(N) % 3)
    probabilities = recipe.predict_proba(outputs)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    json.dumps(recipe.report(FACTS.names), allow_nan=False)
