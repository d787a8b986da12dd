"""Areas under the curves of each class: against scikit-learn, and the influence of rows against derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from utils.numeric import areas
from utils.numeric.metrics import softmax


def rows(seed, count=120, classes=4, *, rounded=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1
    probabilities = softmax(logits)
    return probabilities.round(1) if rounded else probabilities, labels


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "many ties"])
def test_each_class_has_the_areas_of_scikit_learn(rounded, monkeypatch):
    monkeypatch.setattr(areas, "COLUMNS", 3)  # two blocks
    scores, labels = rows(0, rounded=rounded)
    for influences in (False, True):
        found = list(areas.class_areas(scores, labels, influences=influences))
        assert [of_class.index for of_class in found] == [0, 1, 2, 3]
        for of_class in found:
            truth = labels == of_class.index
            assert of_class.roc_auc == pytest.approx(roc_auc_score(truth, scores[:, of_class.index]), abs=1e-12)
            expected = average_precision_score(truth, scores[:, of_class.index])
            assert of_class.average_precision == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True], ids=["all different", "many ties"])
def test_an_influence_is_what_a_copy_of_the_row_changes(rounded):
    scores, labels = rows(1, count=60, rounded=rounded)
    whole = areas.mean_areas(np.repeat(scores, 500, axis=0), np.repeat(labels, 500))
    base = areas.mean_areas(scores, labels)
    assert base.roc_auc_influence.sum() == pytest.approx(0, abs=1e-12)
    assert base.average_precision_influence.sum() == pytest.approx(0, abs=1e-12)
    for row in range(0, 60, 7):
        more = np.append(np.repeat(np.arange(60), 500), row)
        changed = areas.mean_areas(scores[more], labels[more])
        derivative = (changed.roc_auc - whole.roc_auc) * 500
        assert derivative == pytest.approx(base.roc_auc_influence[row], abs=2e-5)
        derivative = (changed.average_precision - whole.average_precision) * 500
        assert derivative == pytest.approx(base.average_precision_influence[row], abs=2e-5)


def test_a_class_without_rows_is_left_out_and_one_with_all_has_no_area():
    scores, labels = rows(2)
    assert [of_class.index for of_class in areas.class_areas(scores, np.where(labels == 2, 1, labels))] == [0, 1, 3]
    single = areas.mean_areas(scores, np.full(len(labels), 3))
    assert (single.roc_auc, single.average_precision) == (None, 1.0)
    assert not single.roc_auc_influence.any()
