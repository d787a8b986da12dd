"""Random forests of scikit-learn as torch modules: equal to the library on every row; shrinkage by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import tree_cases as cases
from sklearn.ensemble import RandomForestClassifier

from utils.combiners.trees import forest_arrays, forest_module, probabilities
from utils.core.artifacts import read_tensors, write_tensors


def grown(features, labels, *, trees: int = 15, **settings) -> RandomForestClassifier:
    return RandomForestClassifier(trees, random_state=0, **settings).fit(features, labels)


def module_of(forest: RandomForestClassifier, layout: str | None = None):
    return forest_module(forest_arrays(forest, classes=forest.n_classes_), layout=layout)


def thresholds(forest: RandomForestClassifier) -> set[tuple[int, float]]:
    trees = [tree.tree_ for tree in forest.estimators_]
    cuts = {cut for tree in trees for cut in zip(tree.feature.tolist(), tree.threshold.tolist(), strict=True)}
    return {(feature, value) for feature, value in cuts if feature >= 0 and np.isfinite(value)}


def agrees(depth: int | None, classes: int, *, missing: float, layout: str | None = None) -> None:
    forest = grown(*cases.training_table(classes, missing=missing), max_depth=depth)
    rows = cases.unseen_rows(thresholds(forest), missing=missing)
    found = probabilities(module_of(forest, layout), rows)
    np.testing.assert_allclose(found, forest.predict_proba(rows), rtol=0, atol=1e-6)


# Against the library -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("missing", [0, 0.1])
@pytest.mark.parametrize(("depth", "classes"), [*cases.SOME, (None, 4)])
def test_agrees_on_random_rows(depth, classes, missing):
    agrees(depth, classes, missing=missing)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 0.1])
@pytest.mark.parametrize(("depth", "classes"), list(product([*cases.ALL_DEPTHS, None], cases.ALL_CLASSES)))
def test_agrees_at_every_depth_with_any_number_of_classes(depth, classes, missing):
    agrees(depth, classes, missing=missing)


@pytest.mark.parametrize("layout", ["perfect", "linked"])
def test_agrees_on_the_digits(layout):
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = digits.data.astype(np.float32)
    forest = grown(features[:700], digits.target[:700], max_depth=7, trees=40)
    found = probabilities(module_of(forest, layout), features)
    assert len(found) == 1797
    np.testing.assert_allclose(found, forest.predict_proba(features), rtol=0, atol=1e-6)


def test_the_cases_hold_splits_of_missing_against_all_others():
    forest = grown(*cases.training_table(3))
    assert sum(np.isinf(tree.tree_.threshold).sum() for tree in forest.estimators_) > 0


@pytest.mark.parametrize("layout", ["perfect", "linked"])
@pytest.mark.parametrize("neighbour", [np.inf, -np.inf])
@pytest.mark.parametrize("value", [2.1, -2.1, 3.0, 1000.1, -1e30])
def test_a_threshold_between_two_neighbouring_float32_parts_them(value, neighbour, layout):
    # Their mean in float64 is the threshold, and rounds to either of them.
    values = np.sort(np.array([value, np.nextafter(np.float32(value), np.float32(neighbour))], dtype=np.float32))
    forest = grown(np.repeat(values, 10)[:, None], np.repeat([0, 1], 10), trees=3, bootstrap=False)
    assert values[0] < forest.estimators_[0].tree_.threshold[0] < values[1]
    found = probabilities(module_of(forest, layout), values[:, None])
    np.testing.assert_array_equal(found, [[1, 0], [0, 1]])


# Arrays --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def forest():
    return grown(*cases.training_table(5), max_depth=6)


def test_the_arrays_survive_the_disk(forest, tmp_path):
    arrays = forest_arrays(forest, classes=5)
    write_tensors(tmp_path / "forest.safetensors", arrays)
    again = read_tensors(tmp_path / "forest.safetensors", remedy="")
    rows = cases.unseen_rows(thresholds(forest), rows=200)
    found, expected = (probabilities(forest_module(each), rows) for each in (again, arrays))
    assert found.tobytes() == expected.tobytes()


def test_a_class_without_rows_keeps_its_column():
    features, labels = cases.training_table(3)
    forest = grown(features, labels * 2)  # classes 0, 2 and 4 of 6
    found = probabilities(forest_module(forest_arrays(forest, classes=6)), features)
    np.testing.assert_allclose(found[:, [0, 2, 4]], forest.predict_proba(features), rtol=0, atol=1e-6)
    assert not found[:, [1, 3, 5]].any()


@pytest.mark.parametrize("runtime", cases.RUNTIMES)
@pytest.mark.parametrize("layout", ["perfect", "linked"])
def test_answers_alike_in_every_runtime(forest, runtime, layout):
    rows = cases.unseen_rows(thresholds(forest), rows=3000)
    run = runtime(module_of(forest, layout))
    for size in (1, 3, 17, 3000):
        np.testing.assert_allclose(run(rows[:size]), forest.predict_proba(rows[:size]), rtol=0, atol=1e-6)


def test_a_module_holds_buffers_and_nothing_to_train(forest):
    module = module_of(forest)
    assert not list(module.parameters())
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32, torch.int32, torch.int64}


# Shrinkage -----------------------------------------------------------------------------------------------------------
def test_probabilities_are_drawn_to_the_parent_and_at_the_root_to_the_uniform_ones():
    features = np.array([[0], [0], [0], [1]], dtype=np.float32)
    forest = grown(features, np.array([0, 0, 0, 1]), trees=1, bootstrap=False)
    found = probabilities(forest_module(forest_arrays(forest, classes=2, shrinkage=4.0)), features[[0, 3]])
    root = np.array([3 + 1 / 2, 1 + 1 / 2]) / 5
    half = 1 / (1 + 4 / 4)  # of the way from the root, which has 4 rows
    expected = [root + half * (np.array([1, 0]) - root), root + half * (np.array([0, 1]) - root)]
    np.testing.assert_allclose(found, expected, atol=1e-7)


def shrunken_by_hand(forest: RandomForestClassifier, rows: np.ndarray, shrinkage: float) -> np.ndarray:
    """Node by node down each path, as the paper writes it."""
    classes, found = forest.n_classes_, np.zeros((len(rows), forest.n_classes_))
    for estimator in forest.estimators_:
        tree = estimator.tree_
        for row, path in enumerate(estimator.decision_path(rows)):
            nodes = path.indices
            weights = tree.weighted_n_node_samples[nodes]
            shares = tree.value[nodes, 0].copy()
            shares[0] = (shares[0] * weights[0] + 1 / classes) / (weights[0] + 1)
            found[row] += shares[0]
            for step in range(1, len(nodes)):
                found[row] += (shares[step] - shares[step - 1]) / (1 + shrinkage / weights[step - 1])
    return found / len(forest.estimators_)


@pytest.mark.parametrize("shrinkage", [0.1, 1.0, 30.0])
def test_shrinkage_equals_its_definition_and_leaves_no_probability_at_zero(shrinkage):
    features, labels = cases.training_table(4, missing=0)
    forest = grown(features, labels, trees=8)
    found = probabilities(forest_module(forest_arrays(forest, classes=4, shrinkage=shrinkage)), features[:40])
    np.testing.assert_allclose(found, shrunken_by_hand(forest, features[:40], shrinkage), rtol=0, atol=1e-6)
    unseen_class = probabilities(forest_module(forest_arrays(forest, classes=5, shrinkage=shrinkage)), features)
    assert unseen_class.min() > 1e-8
