"""Confident learning, by hand and on labels that were changed on purpose."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.numeric import label_issues
from utils.numeric.metrics import softmax


def test_counts_by_hand():
    probabilities = np.array(
        [
            [0.9, 0.1],  # labelled 0, counts for 0
            [0.6, 0.4],  # labelled 0, reaches no threshold: 0 needs 0.6, as it happens, which it just reaches
            [0.3, 0.7],  # labelled 0, counts for 1
            [0.2, 0.8],  # labelled 1, counts for 1
            [0.45, 0.55],  # labelled 1, reaches none
        ]
    )
    found = label_issues.find_label_issues(probabilities, np.array([0, 0, 0, 1, 1]))
    assert found.thresholds == pytest.approx([0.6, 0.675])
    assert found.counts.tolist() == [[2, 1], [0, 1]]
    assert found.rows.tolist() == [2]
    assert found.suggested.tolist() == [1]
    assert found.margins == pytest.approx([-0.4])


def test_the_class_with_most_probability_is_meant_where_several_are_reached():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    found = label_issues.find_label_issues(probabilities, np.array([0, 0, 1, 2]))
    # Row 1 reaches neither 1 (0.6) nor 2 (0.6), row 0 reaches 0 (0.35).
    assert found.counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    twice = label_issues.find_label_issues(np.array([[0.4, 0.6], [0.6, 0.4], [0.9, 0.1]]), np.array([0, 1, 1]))
    # Thresholds 0.4 and 0.25: row 0 reaches both and counts for 1, whose probability is higher.
    assert twice.suggested[twice.rows == 0].tolist() == [1]


def test_changed_labels_are_found_first():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 800)
    logits = rng.normal(size=(800, 4)) + 6 * np.eye(4)[truth]
    wrong = rng.choice(800, 40, replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + 1) % 4
    found = label_issues.find_label_issues(softmax(logits), labels)
    assert len(set(found.rows[:40].tolist()) & set(wrong.tolist())) >= 38
    assert (np.diff(found.margins) >= 0).all()
    assert found.counts.sum() - found.counts.trace() == len(found.rows)
    first = found.rows[0]
    assert found.suggested[0] == truth[first]


def test_a_class_without_rows_is_suggested_to_nobody():
    probabilities = np.array([[0.2, 0.1, 0.7], [0.1, 0.8, 0.1]])
    found = label_issues.find_label_issues(probabilities, np.array([0, 1]))
    assert np.isnan(found.thresholds[2])
    assert found.counts[:, 2].sum() == 0
    with pytest.raises(UserError, match="NaN"):
        label_issues.find_label_issues(np.array([[np.nan, 1.0]]), np.array([0]))


def test_names_of_files_survive_the_table():
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
    labels = np.array([1, 0, 0])
    issues = label_issues.find_label_issues(probabilities, labels)
    ids = ['a "quoted", name.png', "two\nlines.png", "\udcff.png"]
    text = label_issues.issues_csv(issues, probabilities, labels, ["train", "val", "val"], ids, ids, ["<b>", "c,d"])
    text.encode("utf-8")
    lines = list(csv.DictReader(io.StringIO(text, newline="")))
    assert {line["sample_id"] for line in lines} == {ids[row].replace("\udcff", "\\udcff") for row in issues.rows}
    assert [line["rank"] for line in lines] == [str(rank) for rank in range(1, len(lines) + 1)]
    first = lines[0]
    assert float(first["p_label"]) - float(first["p_suggested"]) == pytest.approx(float(first["margin"]), abs=1e-5)
    assert {first["label"], first["suggested"]} == {"<b>", "c,d"}


def test_the_confident_joint_of_more_than_a_thousand_classes_is_left_out():
    classes = 1001
    labels = np.repeat(np.arange(classes), 2)
    probabilities = np.full((2 * classes, classes), 0.1 / (classes - 1))
    probabilities[np.arange(2 * classes), labels] = 0.9
    probabilities[14, [7, 8]] = probabilities[14, [8, 7]]  # labelled 7, looks like 8
    found = label_issues.find_label_issues(probabilities, labels)
    assert (found.rows.tolist(), found.suggested.tolist()) == ([14], [8])
    assert found.counts is None
