"""Matthews correlation, kappas, rates of classes and top-k accuracy: equal to scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from utils.numeric.metrics import point_metrics, softmax, top_k_accuracy

NAMES = "abcdefg"
KAPPAS = {"cohen_kappa": None, "cohen_kappa_linear": "linear", "cohen_kappa_quadratic": "quadratic"}


def rows(seed, count=150, classes=7, strength=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, count, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += strength
    return softmax(logits), labels


@pytest.mark.parametrize(("seed", "classes"), [(0, 7), (1, 4), (2, 2), (3, 6)])
def test_scores_of_scikit_learn(seed, classes):
    probabilities, labels = rows(seed, classes=classes)
    found, predicted = point_metrics(probabilities, labels, NAMES[:classes]), probabilities.argmax(axis=1)
    expected = {
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
        "matthews_corrcoef": reference.matthews_corrcoef(labels, predicted),
        "average_precision_macro": reference.average_precision_score(
            np.eye(classes)[labels], probabilities, average="macro"
        ),
    }
    expected |= {name: reference.cohen_kappa_score(labels, predicted, weights=w) for name, w in KAPPAS.items()}
    for k in (3, 5):
        if k < classes:
            expected[f"top_{k}_accuracy"] = reference.top_k_accuracy_score(
                labels, probabilities, k=k, labels=range(classes)
            )
        else:
            assert found[f"top_{k}_accuracy"] is None
            assert f"{classes} classes" in found["notes"][f"top_{k}_accuracy"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_rates_and_areas_of_each_class_are_those_of_the_class_against_the_rest():
    probabilities, labels = rows(4)
    found, predicted = point_metrics(probabilities, labels, NAMES)["per_class"], probabilities.argmax(axis=1)
    for index, name in enumerate(NAMES):
        truth, answer, scores = labels == index, predicted == index, probabilities[:, index]
        expected = {
            "sensitivity": reference.recall_score(truth, answer),
            "specificity": reference.recall_score(~truth, ~answer),
            "positive_predictive_value": reference.precision_score(truth, answer),
            "negative_predictive_value": reference.precision_score(~truth, ~answer),
            "average_precision": reference.average_precision_score(truth, scores),
            "roc_auc": reference.roc_auc_score(truth, scores),
        }
        for key, value in expected.items():
            assert found[name][key] == pytest.approx(value, abs=1e-12), (name, key)
        assert (found[name]["recall"], found[name]["precision"]) == (
            found[name]["sensitivity"],
            found[name]["positive_predictive_value"],
        )


def test_what_is_undefined_is_null():
    found = point_metrics(np.eye(3)[[0, 0, 0]], [0, 0, 0], "abc")
    assert {found[name] for name in KAPPAS} == {None}
    assert found["matthews_corrcoef"] == 0
    assert "by chance" in found["notes"]["cohen_kappa"]
    assert found["per_class"]["b"] | {"precision": 0, "recall": 0, "f1": 0, "support": 0} == {
        **{"precision": 0, "recall": 0, "f1": 0, "support": 0, "specificity": 1.0, "negative_predictive_value": 1.0},
        **dict.fromkeys(("sensitivity", "positive_predictive_value", "average_precision", "roc_auc")),
    }


def test_the_first_of_equally_probable_classes_counts_first():
    probabilities = np.full((2, 4), 0.25)
    assert top_k_accuracy(probabilities, [1, 2], 2) == 0.5
    assert top_k_accuracy(probabilities, [0, 3], 1) == 0.5
