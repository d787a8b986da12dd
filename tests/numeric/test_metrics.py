"""Each metric against scikit-learn or a figure computed by hand, and the refusal of what cannot be scored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference

from utils.core.errors import UserError
from utils.numeric import metrics

PROJECT = Path(__file__).resolve().parents[2]


def _rows(*, seed: int, rows: int, classes: int, present: int | None = None, spread: float = 2.0):
    """Probabilities (N, C) and labels (N,), the first C labels one of each `present` class."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, present or classes, rows)
    labels[: present or classes] = np.arange(present or classes)[:rows]
    logits = random.normal(size=(rows, classes)) * spread
    logits[np.arange(rows), labels] += 1.0
    return metrics.softmax(logits), labels


CASES = {
    "binary": _rows(seed=0, rows=60, classes=2),
    "three classes": _rows(seed=1, rows=200, classes=3),
    "ten classes": _rows(seed=2, rows=500, classes=10, spread=1.0),
    "a class without rows": _rows(seed=3, rows=80, classes=5, present=4),
    "one class present": _rows(seed=4, rows=20, classes=3, present=1),
    "one row": _rows(seed=5, rows=1, classes=4, present=1),
    "tied": (np.full((30, 3), 1 / 3), np.arange(30) % 3),
    "coarse": (np.round(_rows(seed=6, rows=100, classes=2)[0], 1), _rows(seed=6, rows=100, classes=2)[1]),
    "perfect": (np.eye(4)[np.arange(12) % 4], np.arange(12) % 4),
    "always wrong": (np.eye(4)[(np.arange(12) + 1) % 4], np.arange(12) % 4),
}


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def _assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_counts_agree_with_scikit_learn(case):
    probabilities, labels = case
    predicted, every = probabilities.argmax(axis=1), range(probabilities.shape[1])
    found = metrics.per_class(probabilities, labels)
    precision, recall, f1, support = reference.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=0
    )
    _assert_close(found["precision"], precision)
    _assert_close(found["recall"], recall)
    _assert_close(found["f1"], f1)
    assert found["support"].tolist() == support.tolist()
    assert (
        metrics.confusion_matrix(probabilities, labels).tolist()
        == reference.confusion_matrix(labels, predicted, labels=every).tolist()
    )
    _assert_close(metrics.accuracy(probabilities, labels), reference.accuracy_score(labels, predicted))


@pytest.mark.parametrize(
    ("ours", "theirs", "average"),
    [
        (metrics.f1_macro, reference.f1_score, "macro"),
        (metrics.f1_weighted, reference.f1_score, "weighted"),
        (metrics.precision_macro, reference.precision_score, "macro"),
        (metrics.recall_macro, reference.recall_score, "macro"),
    ],
)
def test_averages_run_over_the_classes_that_have_rows_like_scikit_learn(case, ours, theirs, average):
    probabilities, labels = case
    present = np.unique(labels)
    expected = theirs(labels, probabilities.argmax(axis=1), labels=present, average=average, zero_division=0)
    _assert_close(ours(probabilities, labels), expected)


def test_log_loss_agrees_with_scikit_learn_where_nothing_is_clipped(case):
    probabilities, labels = case
    if probabilities.min() < 1e-12:
        probabilities = 0.9 * probabilities + 0.1 / probabilities.shape[1]
    expected = reference.log_loss(labels, probabilities, labels=range(probabilities.shape[1]))
    _assert_close(metrics.log_loss(probabilities, labels), expected)


def test_log_loss_of_an_impossible_truth_is_bounded():
    wrong = np.array([[1.0, 0.0], [0.5, 0.5]])
    _assert_close(metrics.log_loss_per_row(wrong, np.array([1, 0])), [12 * np.log(10), np.log(2)])
    _assert_close(metrics.log_loss(wrong, np.array([1, 0])), (12 * np.log(10) + np.log(2)) / 2)


def test_log_loss_of_certainty_is_positive_zero():
    assert str(metrics.log_loss(np.eye(3), np.arange(3))) == "0.0"


def test_brier_is_the_sum_of_scikit_learns_scores_of_each_class(case):
    probabilities, labels = case
    expected = sum(
        reference.brier_score_loss(labels == number, probabilities[:, number], pos_label=True)
        for number in range(probabilities.shape[1])
    )
    _assert_close(metrics.brier(probabilities, labels), expected)


def test_brier_spans_zero_to_two():
    assert metrics.brier(np.eye(2), np.array([0, 1])) == 0.0
    assert metrics.brier(np.eye(2), np.array([1, 0])) == 2.0


def test_area_under_the_curve_agrees_with_scikit_learn(case):
    probabilities, labels = case
    classes = np.unique(labels).tolist()
    found, reason = metrics.roc_auc_ovr_macro(probabilities, labels)
    if len(classes) == 1:
        assert found is None
        assert reason
        return
    expected = np.mean([reference.roc_auc_score(labels == number, probabilities[:, number]) for number in classes])
    _assert_close(found, expected)
    assert reason == ""


def test_area_under_the_curve_gives_ties_half():
    """Class 1: scores 0.2, 0.5 (negatives), 0.5, 0.9 (positives): 3.5 of 4 pairs are ordered; class 0 mirrors it."""
    second = np.array([0.2, 0.5, 0.5, 0.9])
    found, _ = metrics.roc_auc_ovr_macro(np.column_stack([1 - second, second]), np.array([0, 0, 1, 1]))
    assert found == 0.875


def test_area_under_the_curve_says_why_there_is_none():
    found, reason = metrics.roc_auc_ovr_macro(np.full((3, 3), 1 / 3), np.array([1, 1, 1]), ["scab", "spot", "rust"])
    assert found is None
    assert "every row is of class spot" in reason


def test_macro_averages_leave_out_a_class_without_rows_and_say_so():
    """The third class has no row; one row is predicted as it, which costs its own class recall and nothing else."""
    probabilities = np.eye(3)[[0, 0, 1, 2]]
    found = metrics.point_metrics(probabilities, np.array([0, 0, 1, 1]), ["scab", "spot", "rust"])
    assert found["recall_macro"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["precision_macro"] == 1.0
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["roc_auc_ovr_macro"] == pytest.approx((1 + 3 / 4) / 2)
    averages = dict.fromkeys(metrics.MACRO_AVERAGES, "average over 2 of 3 classes; without rows: rust")
    assert {key: note for key, note in found["notes"].items() if not key.startswith("top_")} == averages
    losses = metrics.row_losses(probabilities, np.array([0, 0, 1, 1]), "f1_macro")
    assert losses.mean() == pytest.approx(1 - found["f1_macro"])


@pytest.mark.parametrize(("absent", "shown"), [(5, "b, c, d, e, f"), (6, "b, c, d, e, f and 1 more")])
def test_of_classes_without_rows_five_are_named(absent, shown):
    found = metrics.point_metrics(np.eye(absent + 2)[:2], np.array([0, absent + 1]), "abcdefg"[: absent + 1] + "z")
    assert found["notes"]["f1_macro"] == f"average over 2 of {absent + 2} classes; without rows: {shown}"


def test_calibration_errors_of_hand_computed_rows():
    """Five rows of three bins.

    (0.4, 0.4667]: 0.45 right               -> gap 0.55, share 1/5
    (0.5333, 0.6]: 0.55 right, 0.60 wrong   -> accuracy 0.5, confidence 0.575: gap 0.075, share 2/5
    (0.9333, 1.0]: 1.00 right, 1.00 wrong   -> accuracy 0.5, confidence 1.0: gap 0.5, share 2/5
    """
    probabilities = np.array([[0.45, 0.30, 0.25], [0.55, 0.45, 0], [0.6, 0.4, 0], [1.0, 0, 0], [0, 1.0, 0]])
    labels = np.array([0, 0, 1, 0, 2])
    _assert_close(metrics.ece(probabilities, labels), 0.55 / 5 + 0.075 * 2 / 5 + 0.5 * 2 / 5)
    _assert_close(metrics.mce(probabilities, labels), 0.55)


def test_with_a_row_per_bin_the_adaptive_error_is_the_mean_gap_of_the_rows():
    confidence, hit = np.linspace(0.55, 0.95, 15), np.arange(15) % 3 > 0
    found = metrics.ece_adaptive(np.stack([confidence, 1 - confidence], axis=1), np.where(hit, 0, 1))
    assert found == pytest.approx(np.abs(hit - confidence).mean())


def test_confidence_of_exactly_one_belongs_to_the_last_bin():
    certain, labels = np.tile([1.0, 0.0], (4, 1)), np.array([0, 0, 0, 1])
    _assert_close(metrics.ece(certain, labels), 0.25)
    _assert_close(metrics.mce(certain, labels), 0.25)


def test_an_upper_edge_belongs_to_the_lower_bin():
    """0.6 = 9/15 joins 0.55 below it, not 0.65 above: accuracy 0.5 against 0.575, and 1 against 0.65."""
    first = np.array([0.55, 0.6, 0.65])
    probabilities, labels = np.column_stack([first, 1 - first]), np.array([0, 1, 0])
    _assert_close(metrics.ece(probabilities, labels), (2 * 0.075 + 0.35) / 3)
    _assert_close(metrics.mce(probabilities, labels), 0.35)


def test_every_bin_edge_is_an_upper_edge():
    """C = 15 classes; the confidence k/15 must be in bin k - 1: beside a row of the middle of that bin, one gap."""
    for k in range(2, 15):
        top = np.array([k / 15, (k - 0.5) / 15])
        rest = (1 - top) / 14
        probabilities = np.column_stack([top, *[rest] * 14])
        _assert_close(metrics.mce(probabilities, np.array([0, 1])), abs(0.5 - (k - 0.25) / 15))


def test_equal_probabilities_predict_the_first_class():
    halves = np.full((2, 2), 0.5)
    assert metrics.confusion_matrix(halves, np.array([0, 1])).tolist() == [[1, 0], [1, 0]]


def test_softmax_agrees_with_direct_computation_and_keeps_the_shape():
    logits = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    expected = np.exp(logits.astype(np.float64))
    expected /= expected.sum(axis=-1, keepdims=True)
    _assert_close(metrics.softmax(logits), expected)
    _assert_close(metrics.log_softmax(logits), np.log(expected))
    assert metrics.softmax(logits).dtype == metrics.log_softmax(logits).dtype == np.float64


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1e308, -1e308], [1, 0]),
        ([-1e308, -1e308], [0.5, 0.5]),
        ([1e308, 1e308, 0], [0.5, 0.5, 0]),
        ([1000, 0], [1, 0]),
        ([-1000, -1001], [1 / (1 + np.exp(-1)), np.exp(-1) / (1 + np.exp(-1))]),
        ([0, -np.inf], [1, 0]),
    ],
)
def test_softmax_stands_extreme_logits(logits, expected):
    _assert_close(metrics.softmax(logits), expected)
    assert np.isfinite(metrics.log_softmax(logits)).all()


def test_log_softmax_keeps_what_softmax_rounds_away():
    _assert_close(metrics.log_softmax([0.0, -800.0]), [0.0, -800.0])


FAULTS = [
    ([[0.5, 0.5], [np.nan, 1], [np.inf, 0]], [0, 1, 1], r"2 of 3 rows with NaN or infinity, first row 1: \[nan"),
    ([[0.5, 0.5], [1.2, -0.2]], [0, 1], r"1 of 2 rows below 0, first row 1"),
    (
        [[0.5, 0.5], [0.5, 0.4], [0.6, 0.5]],
        [0, 1, 1],
        r"2 of 3 rows that do not sum to 1 within 0.001, first row 1: 0.9",
    ),
    ([[0.5, 0.5]] * 3, [0, 2, -1], r"labels: 2 of 3 rows outside 0\.\.1, first row 1: 2"),
    ([[0.5, 0.5]], [0, 1], r"labels: found int64 of shape \(2,\); expected integers of shape \(1,\)"),
    ([[0.5, 0.5]], [0.0], r"labels: found float64 of shape \(1,\); expected integers"),
    ([[0.5, 0.5]], [True], r"labels: found bool"),
    (np.zeros((0, 2)), np.zeros(0, int), r"probabilities: found float64 of shape \(0, 2\); expected numbers \(N, C\)"),
    ([0.5, 0.5], [0, 1], r"found float64 of shape \(2,\)"),
    ([["a", "b"]], [0], r"expected numbers"),
]


@pytest.mark.parametrize(("probabilities", "labels", "words"), FAULTS)
def test_what_cannot_be_scored_is_refused_with_the_first_row(probabilities, labels, words):
    with pytest.raises(UserError, match=words):
        metrics.point_metrics(probabilities, labels, ["a", "b"])


@pytest.mark.parametrize(
    "function",
    [
        *(metric.function for metric in metrics.METRICS.values()),
        *(metrics.ece, metrics.mce, metrics.roc_auc_ovr_macro, metrics.per_class, metrics.confusion_matrix),
        *(metrics.precision_macro, metrics.recall_macro, metrics.f1_weighted, metrics.log_loss_per_row),
    ],
)
def test_every_public_metric_checks_its_labels(function):
    with pytest.raises(UserError, match="labels: 1 of 2 rows outside"):
        function(np.full((2, 2), 0.5), np.array([0, -1]))


def test_rounding_of_half_precision_is_accepted():
    probabilities, labels = _rows(seed=7, rows=50, classes=10)
    exact = metrics.log_loss(probabilities, labels)
    np.testing.assert_allclose(metrics.log_loss(probabilities.astype(np.float16), labels), exact, atol=2e-3)


@pytest.mark.parametrize("function", [metrics.log_loss, metrics.brier, metrics.ece, metrics.mce])
def test_single_precision_is_summed_in_double(function):
    probabilities, labels = _rows(seed=9, rows=5000, classes=3)
    single = probabilities.astype(np.float32)
    assert function(single, labels) == function(single.astype(np.float64), labels)


def test_input_arrays_stay_as_they_are():
    probabilities, labels = _rows(seed=8, rows=9, classes=3)
    kept = probabilities.tobytes(), labels.tobytes()
    probabilities.flags.writeable = labels.flags.writeable = False
    metrics.point_metrics(probabilities, labels, "abc")
    assert (probabilities.tobytes(), labels.tobytes()) == kept


def test_the_confusion_matrix_of_more_than_a_thousand_classes_is_not_listed():
    for classes in (1000, 1001):
        found = metrics.point_metrics(np.eye(classes)[:3], np.array([0, 1, 1]), [str(n) for n in range(classes)])
        if classes == 1000:
            assert np.sum(found["confusion_matrix"]) == 3
        else:
            assert found["confusion_matrix"] is None
            assert (
                "1001 classes, more than 1000: the counts are in confusion_matrix*.npz"
                in found["notes"]["confusion_matrix"]
            )


def test_point_metrics_hold_what_the_single_functions_give(case):
    probabilities, labels = case
    names = [f"class {number}" for number in range(probabilities.shape[1])]
    found = metrics.point_metrics(probabilities, labels, names)
    for name in (
        *("accuracy", "f1_macro", "f1_weighted", "precision_macro"),
        *("recall_macro", "log_loss", "brier", "ece", "mce"),
    ):
        assert type(found[name]) is float
        _assert_close(found[name], getattr(metrics, name)(probabilities, labels))
    area, reason = metrics.roc_auc_ovr_macro(probabilities, labels, names)
    assert found["roc_auc_ovr_macro"] == area
    assert found["notes"].get("roc_auc_ovr_macro", "") == reason or len(np.unique(labels)) < len(names)
    assert found["n_samples"] == len(labels)
    assert found["n_classes"] == len(names)
    assert found["confusion_matrix"] == metrics.confusion_matrix(probabilities, labels).tolist()


def test_point_metrics_are_plain_json_with_the_promised_keys():
    found = metrics.point_metrics(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]), ["scab", "spot", "rust"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {
        *("accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro", "log_loss", "brier", "ece", "mce"),
        *("precision_weighted", "recall_weighted", "ece_adaptive", "reliability"),
        *("balanced_accuracy", "matthews_corrcoef", "average_precision_macro", "top_3_accuracy", "top_5_accuracy"),
        *("cohen_kappa", "cohen_kappa_linear", "cohen_kappa_quadratic"),
        *("roc_auc_ovr_macro", "confusion_matrix", "per_class", "n_samples", "n_classes", "notes"),
    }
    assert found["per_class"]["spot"] == {
        **{"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1, "sensitivity": 1.0, "specificity": 0.5},
        **{"positive_predictive_value": 0.5, "negative_predictive_value": 1.0, "roc_auc": 0.75},
        "average_precision": 0.5,
    }
    assert found["confusion_matrix"] == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]


@pytest.mark.parametrize("classes", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_class_names_must_match_the_columns(classes):
    with pytest.raises(UserError, match="expected 2 different names"):
        metrics.point_metrics(np.full((2, 2), 0.5), np.array([0, 1]), classes)


def test_ranking_metrics_know_which_way_is_better():
    good, bad, labels = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.4, 0.6], [0.6, 0.4]]), np.array([0, 1])
    assert list(metrics.METRICS) == ["f1_macro", "accuracy", "log_loss", "brier"]
    for function, higher_is_better in metrics.METRICS.values():
        assert (function(good, labels) > function(bad, labels)) == higher_is_better


def test_metrics_need_numpy_alone():
    code = (
        "import sys, utils.numeric.metrics; print(sorted({'torch', 'sklearn', 'scipy', 'pydantic'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_losses_of_rows_average_to_the_metric(case, name):
    found, metric = metrics.row_losses(*case, name), metrics.METRICS[name]
    assert found.shape == case[1].shape
    expected = metric.function(*case)
    _assert_close(found.mean(), 1 - expected if metric.higher_is_better else expected)


def test_a_rows_loss_of_macro_f1_is_how_it_moves_when_the_row_counts_a_little_more():
    probabilities, labels = CASES["three classes"]
    predicted, rows = probabilities.argmax(axis=1), len(labels)
    found, step = metrics.row_losses(probabilities, labels, "f1_macro"), 1e-6

    def loss(weights):
        return 1 - reference.f1_score(labels, predicted, average="macro", sample_weight=weights)

    for row in range(0, rows, 19):
        weights = np.ones(rows)
        weights[row] += step
        moved = rows * (loss(weights) - loss(np.ones(rows))) / step
        assert found[row] - found.mean() == pytest.approx(moved, abs=1e-4)


def test_only_a_top_k_accuracy_of_too_few_classes_has_a_note():
    found = metrics.point_metrics(np.full((4, 4), 0.25), np.arange(4), list("abcd"))
    assert (found["top_3_accuracy"], found["top_5_accuracy"]) == (0.75, None)
    assert found["notes"].keys() & {"top_3_accuracy", "top_5_accuracy"} == {"top_5_accuracy"}
