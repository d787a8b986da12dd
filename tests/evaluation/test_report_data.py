"""What the report computes for itself, against examples that can be done by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from utils.core.errors import UserError
from utils.evaluation.report import report_data
from utils.evaluation.report.example_images import LabelledPredictions
from utils.numeric import diversity
from utils.numeric.metrics import softmax
from utils.predictions.rows import UNKNOWN, MemberRows


def rows(split: str, ids: list[str], labels: list[int], probabilities: list[list[float]]) -> MemberRows:
    logits = np.log(np.array(probabilities, dtype=np.float32))
    classes = tuple("abc"[: logits.shape[1]])
    return MemberRows(split, classes, np.array(ids), np.array(labels), logits, np.ones(len(ids), dtype=bool))


def test_what_each_member_adds_to_the_plain_mean():
    first = rows("val", ["1", "2", "3", "x"], [0, 0, 1, UNKNOWN], [[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.5, 0.5]])
    second = rows("val", ["3", "2", "1"], [1, 0, 0], [[0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])
    third = rows("val", ["1", "2", "3", "4"], [0, 0, 1, 0], [[0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.5, 0.5]])
    found = report_data.member_contributions({"a": [first], "b": [second], "c": [third]})
    truth = np.array([[0.8, 0.6, 0.3], [0.4, 0.3, 0.8], [0.9, 0.4, 0.4]])
    assert found.rows == 3
    assert found.accuracy == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert found.log_loss == pytest.approx(-np.log(truth).mean(axis=1))
    assert found.only_correct.tolist() == [1, 1, 0]
    mean = -np.log(truth.mean(axis=0)).mean()
    assert found.mean_log_loss == pytest.approx(mean)
    expected = [-np.log(np.delete(truth, place, axis=0).mean(axis=0)).mean() - mean for place in range(3)]
    assert found.without == pytest.approx(expected)


def test_members_without_a_common_row_are_an_error_in_words():
    parts = {"a": [rows("val", ["1"], [0], [[0.9, 0.1]])], "b": [rows("train", ["1"], [0], [[0.9, 0.1]])]}
    with pytest.raises(UserError, match="a, b: no labelled row"):
        report_data.member_contributions(parts)


def test_a_temperature_is_undone():
    logits = np.random.default_rng(0).normal(size=(20, 4))
    predictions = LabelledPredictions(np.arange(20).astype(str), np.zeros(20, dtype=int), softmax(logits / 0.4))
    data = SimpleNamespace(record={"temperature": 0.4}, predictions=predictions)
    assert report_data.without_temperature(data) == pytest.approx(softmax(logits))
    for record in ({}, {"temperature": None}, {"temperature": 1.0}, {"temperature": 0.4, "share_of_stacker": 0.5}):
        assert report_data.without_temperature(SimpleNamespace(record=record, predictions=predictions)) is None


def test_mutual_information_of_members():
    agreeing = [np.array([[0.9, 0.1]]), np.array([[0.9, 0.1]])]
    opposed = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    unsure = [np.array([[0.5, 0.5]]), np.array([[0.5, 0.5]])]
    values = [diversity.mutual_information(iter(parts))[0] for parts in (agreeing, opposed, unsure)]
    assert values == pytest.approx([0, np.log(2), 0], abs=1e-12)
    of_rows = diversity.mutual_information(np.array([[[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [0.0, 1.0]]]))
    np.testing.assert_allclose(of_rows, [0, np.log(2)], atol=1e-12)
