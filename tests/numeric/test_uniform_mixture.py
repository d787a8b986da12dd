"""The mixture with the uniform distribution: what it costs, what it keeps, and what it bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from utils.combiners.heads import MixedWithUniform
from utils.numeric.metrics import log_loss, softmax
from utils.numeric.uniform_mixture import mixed_with_uniform, uniform_weight, without_uniform


@pytest.mark.parametrize("rows", [1, 100, 10_000])
@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_a_certain_and_wrong_answer_costs_what_the_number_of_rows_allows(rows, classes):
    mixed = mixed_with_uniform(np.eye(classes)[:1], uniform_weight(rows, classes))
    np.testing.assert_allclose(-np.log(mixed[0, 1:]), np.log(10 * (classes - 1) * (rows + 2)))
    assert mixed.sum() == pytest.approx(1, abs=1e-12)


def test_one_class_stays_certain_and_no_rows_give_the_uniform_distribution_at_most():
    assert uniform_weight(5, 1) == 0
    np.testing.assert_array_equal(mixed_with_uniform(np.ones((2, 1)), uniform_weight(5, 1)), 1)
    assert 0 < uniform_weight(0, 2) <= 1


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("rows", [10, 100, 1000])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_the_loss_of_well_fitted_rows_rises_by_next_to_nothing(rows, classes, scale):
    rng = np.random.default_rng(rows + classes)
    logits = scale * rng.normal(size=(2000, classes))
    labels = (rng.gumbel(size=logits.shape) + logits).argmax(axis=1)
    probabilities = softmax(logits)
    mixed = mixed_with_uniform(probabilities, uniform_weight(rows, classes))
    assert log_loss(mixed, labels) - log_loss(probabilities, labels) <= 1 / (5 * rows)


def test_classes_and_rows_keep_their_order():
    probabilities = softmax(4 * np.random.default_rng(0).normal(size=(500, 4)))
    mixed = mixed_with_uniform(probabilities, uniform_weight(50, 4))
    np.testing.assert_array_equal(mixed.argsort(axis=1), probabilities.argsort(axis=1))
    confidences, before = mixed.max(axis=1), probabilities.max(axis=1)
    np.testing.assert_array_equal(confidences[before.argsort()], np.sort(confidences))
    assert len(np.unique(confidences)) == len(np.unique(before))


def test_in_single_precision_confident_rows_are_not_tied():
    confident = (1 - np.arange(1, 2001, dtype=np.float32)[:, None] * 2**-24).astype(np.float32)
    rows = torch.from_numpy(np.concatenate([confident, 1 - confident], axis=1))
    mixed = MixedWithUniform(nn.Identity(), uniform_weight(100, 2))(rows).numpy()
    assert mixed.dtype == np.float32
    assert len(np.unique(mixed[:, 0])) >= 0.99 * len(np.unique(confident))
    assert (np.diff(mixed[:, 0]) <= 0).all()
    np.testing.assert_allclose(mixed, mixed_with_uniform(rows.numpy(), uniform_weight(100, 2)), atol=1e-7)


def test_each_row_may_have_a_weight_of_its_own():
    mixed = mixed_with_uniform(np.array([[1.0, 0], [1.0, 0], [1.0, 0]]), np.array([0, 0.5, 1]))
    np.testing.assert_allclose(mixed, [[1, 0], [0.75, 0.25], [0.5, 0.5]])


def test_the_mixture_can_be_undone():
    probabilities = softmax(np.random.default_rng(1).normal(size=(20, 3)))
    np.testing.assert_allclose(without_uniform(mixed_with_uniform(probabilities, 0.1), 0.1), probabilities)
    assert without_uniform(np.array([[1 - 1e-9, 1e-9]]), 0.1).min() == 0
