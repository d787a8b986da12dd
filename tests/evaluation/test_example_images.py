"""Which images the report shows, against examples that can be done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from utils.building.ensembles import Crossfit
from utils.core.errors import UserError
from utils.evaluation.report import example_images
from utils.evaluation.report.example_images import ExampleImage, LabelledPredictions
from utils.predictions.rows import UNKNOWN, MemberRows


def rows(split: str, ids: list[str], labels: list[int], probabilities: list[list[float]]) -> MemberRows:
    logits = np.log(np.array(probabilities, dtype=np.float32))
    return MemberRows(split, ("a", "b"), np.array(ids), np.array(labels), logits, np.ones(len(ids), dtype=bool))


def test_the_surest_errors_come_first_and_ties_by_name():
    predictions = LabelledPredictions(
        np.array(["d", "c", "b", "a", "e"]),
        np.array([0, 1, 1, 1, 0]),
        np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.99, 0.01], [0.4, 0.6]]),
    )
    found = example_images.confident_errors("test", predictions, None, 3)
    assert [item.sample_id for item in found] == ["a", "b", "c"]
    assert (found[0].predicted, found[0].label, found[0].probability) == (0, 1, 0.99)
    assert found[0].label_probability == pytest.approx(0.01)


def test_disputed_rows_are_shown_by_disagreement_unless_they_are_shown_already():
    predictions = LabelledPredictions(np.array(["a", "b", "c"]), np.zeros(3, dtype=int), np.full((3, 2), 0.5))
    disagreement, disputed = np.array([0.5, 0.3, 0.2]), np.array([True, False, True])
    found = example_images.disagreements("test", predictions, disagreement, disputed, 5, {"a"})
    assert [(item.sample_id, item.disagreement) for item in found] == [("c", 0.2)]
    assert example_images.disagreements("test", predictions, None, disputed, 5, set()) == []


def test_a_row_is_disputed_where_two_members_are_sure_of_different_classes():
    ids = ["sure of two", "sure and unsure", "of one opinion", "third against first"]
    members = {
        "a": rows("test", ids, [0] * 4, [[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.8, 0.2]]),
        "b": rows("test", ids, [0] * 4, [[0.3, 0.7], [0.5, 0.5], [0.6, 0.4], [0.5, 0.5]]),
        "c": rows("test", ids, [0] * 4, [[0.6, 0.4], [0.5, 0.5], [0.7, 0.3], [0.1, 0.9]]),
    }
    assert example_images.is_disputed(members, np.array(ids)).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((20, 20, 20), (8, 6, 6)),
        ((2, 20, 20), (2, 12, 6)),
        ((2, 3, 20), (2, 3, 15)),
        ((20, 0, 0), (20, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_places_that_one_kind_leaves_go_to_the_others(counts, expected):
    found = {
        kind: [ExampleImage(kind, "test", str(number), 0, 1, 0.9, 0.1, None) for number in range(count)]
        for kind, count in zip(example_images.QUOTAS, counts, strict=True)
    }
    chosen = [item.kind for item in example_images.apply_quotas(found, 20)]
    assert tuple(map(chosen.count, example_images.QUOTAS)) == expected


def test_labelled_predictions_of_a_member_leave_out_unlabelled_and_other_rows():
    part = rows("test", ["1", "2", "3"], [0, UNKNOWN, 1], [[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    assert LabelledPredictions.of_member(part).sample_ids.tolist() == ["1", "3"]
    selected = LabelledPredictions.of_member(part, np.array(["3", "x"]))
    assert selected.sample_ids.tolist() == ["3"]
    np.testing.assert_allclose(selected.probabilities, [[0.2, 0.8]], atol=1e-6)


def test_likely_mislabelled_rows_come_from_cross_fitted_predictions_with_those_of_the_members():
    crossfit = Crossfit(
        np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]], dtype=np.float32),
        np.array([1, 0, 1]),
        np.array(["x", "y", "z"]),
        np.array(["val", "train", "train"]),
        np.zeros(3, dtype=np.int64),
    )
    members = {"a": [rows("val", ["x"], [1], [[0.8, 0.2]])], "b": [rows("train", ["y"], [0], [[0.3, 0.7]])]}
    chosen = example_images.choose("test", "votes", {}, None, members, crossfit)
    assert [(item.split, item.sample_id, item.predicted) for item in chosen] == [("val", "x", 0), ("train", "y", 1)]
    assert [[prediction.member for prediction in item.member_predictions] for item in chosen] == [["a"], ["b"]]
    assert chosen[0].member_predictions[0].probability == pytest.approx(0.8)


def test_an_evaluated_row_that_a_member_lacks_is_an_error_that_names_it():
    members = {name: rows("test", ["1"], [0], [[0.9, 0.1]]) for name in ("a", "b")}
    with pytest.raises(UserError, match=r"first 2$"):
        example_images.mutual_information(members, np.array(["1", "2"]))
    assert example_images.mutual_information({"a": members["a"]}, np.array(["2"])) is None
