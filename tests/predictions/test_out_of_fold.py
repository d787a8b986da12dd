"""Which rows come from the same network, and when out-of-fold rows are better than chance allows."""

from __future__ import annotations

import numpy as np
import pytest

from utils.predictions import out_of_fold


def test_equal_rows_are_told_by_their_logits_even_where_all_are_sure():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 4)).astype(np.float32) * 300
    other = logits + rng.normal(size=logits.shape).astype(np.float32)
    assert out_of_fold.count_equal_rows("logits", logits, logits, tolerance=1e-5) == (500, 500)
    assert out_of_fold.count_equal_rows("logits", other, logits, tolerance=1e-5) == (0, 500)


@pytest.mark.parametrize("kind", ["probabilities", "half-precision probabilities"])
def test_probabilities_are_compared_where_they_tell_anything(kind):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(400, 4)) * np.repeat([1.0, 200.0], 200)[:, None]).astype(np.float32)
    other = logits + rng.normal(size=logits.shape).astype(np.float32) * np.repeat([0.5, 20.0], 200)[:, None]
    exact = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact = (exact / exact.sum(axis=1, keepdims=True)).astype(np.float16 if "half" in kind else np.float32)
    stored = np.log(np.maximum(exact.astype(np.float64), 1e-12))
    same, comparable = out_of_fold.count_equal_rows(kind, stored, logits, tolerance=1e-5)
    assert same == comparable
    assert 150 <= comparable <= 250  # the sure half says nothing
    different, comparable = out_of_fold.count_equal_rows(kind, stored, other, tolerance=1e-5)
    assert different <= 0.01 * comparable


@pytest.mark.parametrize(
    ("right", "n", "other_right", "m", "expected"),
    [(95, 100, 80, 100, 0.00067), (50, 100, 50, 100, 0.5), (100, 100, 40, 40, 1.0), (0, 10, 0, 10, 1.0)],
)
def test_the_proportion_test_is_the_textbooks(right, n, other_right, m, expected):
    better, other = {"accuracy": right / n, "n": n}, {"accuracy": other_right / m, "n": m}
    assert out_of_fold.higher_accuracy_p_value(better, other) == pytest.approx(expected, abs=1e-5)
