"""Tables of classes for papers: numbers, escaping, and what many classes leave out."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from utils.evaluation import class_tables
from utils.evaluation.class_scores import add_class_scores, fold_scores
from utils.numeric.metrics import f1_macro, point_metrics, softmax

NAMES = ["black_spot", "a|b & c", "healthy"]


def scored(names=NAMES, count=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(names), count)
    logits = rng.normal(size=(count, len(names)))
    logits[np.arange(count), labels] += 1
    probabilities = softmax(logits)
    record = point_metrics(probabilities, labels, names)
    add_class_scores(record, probabilities, labels, None, record["notes"])
    return record, probabilities, labels


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_each_class_has_its_figures_with_intervals():
    record, *_ = scored()
    lines = read(class_tables.per_class_csv(record))
    assert [line["class"] for line in lines] == NAMES
    for line in lines:
        figures = record["per_class"][line["class"]]
        assert float(line["specificity"]) == figures["specificity"]
        assert [float(line[f"roc_auc_{end}"]) for end in ("low", "high")] == figures["ci95"]["roc_auc"]
    texts = class_tables.texts(record)["per_class"]
    assert r"a\|b & c" in texts["md"]
    assert r"a\textbar{}b \& c" in texts["tex"]
    assert {line.replace("\\|", "").count("|") for line in texts["md"].splitlines()} == {10}


def test_a_confusion_matrix_has_counts_and_percentages_of_the_true_class():
    record, _, labels = scored()
    for row, line in enumerate(read(class_tables.confusion_csv(record))):
        counts = [int(line[name]) for name in NAMES]
        assert counts == record["confusion_matrix"][row]
        assert int(line["rows"]) == sum(counts) == (labels == row).sum()
        assert sum(float(line[f"{name} %"]) for name in NAMES) == pytest.approx(100)
        assert float(line[f"{NAMES[0]} %"]) == pytest.approx(100 * counts[0] / sum(counts))
    hits, rows = record["confusion_matrix"][2][2], sum(record["confusion_matrix"][2])
    texts = class_tables.texts(record)["confusion_matrix"]
    assert f"{hits} ({100 * hits / rows:.1f}%)" in texts["md"]
    assert rf"{hits} ({100 * hits / rows:.1f}\%)" in texts["tex"]


def test_curves_are_one_line_per_threshold():
    record, *_ = scored()
    lines = read(class_tables.curves_csv(record))
    assert len(lines) == sum(len(curve["threshold"]) for curve in record["curves"].values())
    assert float(lines[0]["precision"]) == record["curves"][NAMES[0]]["precision"][0]


def test_many_classes_have_no_printed_matrix_and_very_many_no_curves():
    record, *_ = scored([f"class {index}" for index in range(101)], count=300)
    texts = class_tables.texts(record)
    assert (texts["confusion_matrix"]["md"], texts["confusion_matrix"]["tex"], texts["curves"]["csv"]) == (None,) * 3
    assert texts["confusion_matrix"]["csv"]
    assert "more than 100" in record["notes"]["curves"]


def test_scores_over_folds_are_their_mean_and_deviation():
    _, probabilities, labels = scored()
    folds = np.arange(60) % 4
    found = fold_scores(probabilities, labels, folds, "train")
    values = [f1_macro(probabilities[folds == fold], labels[folds == fold]) for fold in range(4)]
    assert (found["k"], found["n"], found["rows"], found["f1_macro"]["values"]) == (4, 60, "train", values)
    assert found["f1_macro"]["mean"] == pytest.approx(np.mean(values))
    assert found["f1_macro"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert fold_scores(probabilities, labels, np.zeros(60, dtype=np.int64), "train") is None
