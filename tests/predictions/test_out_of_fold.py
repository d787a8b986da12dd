"""Files of out-of-fold rows, which rows come from the same network, and when they are better than chance allows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from given_predictions import CLASSES, arrays, shuffled, without, write

from utils.core.errors import UserError
from utils.predictions import out_of_fold
from utils.predictions.image_splits import ImageSplit


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


GIVEN = arrays("oof", 1)
IDS = (*sorted(GIVEN["sample_ids"].tolist()), "cat/z.png")  # the last has no prediction


def images(contents=IDS):
    labels = np.array([CLASSES.index(name.partition("/")[0]) for name in IDS])
    return ImageSplit("train", CLASSES, IDS, labels, tuple(map(Path, IDS)), tuple(contents), "")


def read(tmp_path, given):
    folder = write(tmp_path, {"m": 1}, ("oof",), lambda name, stem, _: given)
    return out_of_fold.read(folder / "m" / "oof.npz", "m", images(), CLASSES, remedy="Mend it")


def probabilities(total):
    """Rows that sum to `total`."""
    values = np.exp(GIVEN["logits"])
    return without("logits")(GIVEN) | {"probabilities": total * values / values.sum(axis=1, keepdims=True)}


def test_columns_and_labels_are_matched_by_the_names_of_classes(tmp_path):
    found = read(tmp_path, shuffled(GIVEN, 3))
    order = np.argsort(found.sample_ids)
    expected = np.argsort(GIVEN["sample_ids"])
    for name, array in found.arrays().items():
        assert np.array_equal(array[order], GIVEN[name][expected]), name
    assert found.kind == "logits"
    assert found.accuracy == (GIVEN["logits"].argmax(axis=1) == GIVEN["labels"]).mean()
    assert np.array_equal(read(tmp_path, without("classes")(GIVEN)).logits, GIVEN["logits"])
    assert read(tmp_path, probabilities(1.009)).kind == "probabilities"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (GIVEN | {"classes": np.array(["ant", "bee", "dog"])}, "its classes are ant, bee, dog; the split has ant, bee"),
        (without("classes")(GIVEN) | {"logits": np.eye(4)[GIVEN["labels"]]}, "4 outputs; the split has 3 classes"),
        (GIVEN | {"sample_ids": np.char.replace(GIVEN["sample_ids"], "1000", "x")}, "1 rows are not train images, .*x"),
        (GIVEN | {"labels": (GIVEN["labels"] + 1) % 3}, "its labels are not those of the class folders"),
        (GIVEN | {"labels": np.where(GIVEN["labels"] == 2, -1, GIVEN["labels"])}, "its labels are not those of the"),
        (without("fold")(GIVEN), "no array fold"),
        (without("labels")(GIVEN), "no array labels"),
        (probabilities(1.011), "60 rows do not sum to 1 within 0.01"),
    ],
)
def test_what_does_not_fit_the_train_images_is_refused(tmp_path, given, words):
    with pytest.raises(UserError, match=rf"oof\.npz: out-of-fold predictions of m refused: .*{words}.*\. Mend it$"):
        read(tmp_path, given)


def test_copies_in_different_folds_are_found_by_content(tmp_path):
    found = read(tmp_path, GIVEN)
    fold_of = dict(zip(found.sample_ids.tolist(), found.fold.tolist(), strict=True))
    names = {fold: [name for name in IDS[:-1] if fold_of[name] == fold] for fold in range(3)}
    apart = [names[0][0], names[1][0], names[1][1]]
    contents = dict.fromkeys(names[2][:3], "same fold") | dict.fromkeys(apart, "apart")
    contents |= {names[0][5]: "unpredicted", IDS[-1]: "unpredicted"}
    train = images([contents.get(name, name) for name in IDS])
    assert out_of_fold.duplicates_across_folds(found, train) == sorted(apart)
    assert out_of_fold.duplicates_across_folds(found, images()) == []


@pytest.mark.parametrize(("largest", "scale"), [(0.5, 1), (1.0, 1), (128.0, 128)])
def test_logits_above_one_are_compared_relatively(largest, scale):
    logits = np.array([[largest, 0.0, -largest / 2]])
    tolerance = 2.0**-16
    for difference, count in ((tolerance * scale, 1), (1.1 * tolerance * scale, 0)):
        stored = logits + np.array([0, difference, 0])
        assert out_of_fold.count_equal_rows("logits", stored, logits, tolerance=tolerance) == (count, 1)


@pytest.mark.parametrize(
    ("kind", "rounding", "floor"),
    [("probabilities", 1e-4, 1e-11), ("half-precision probabilities", 3e-3, 1e-3)],
)
def test_probabilities_are_equal_up_to_rounding_above_the_floor(kind, rounding, floor):
    def count(second, difference, tolerance=1e-5):
        """Of one row of 100 classes in any order; 97 of them just above the floor, and one far below it."""
        others = floor * np.linspace(1.05, 2.5, 97)
        logits = np.array([[math.log(1 - second - others.sum()), math.log(second), *np.log(others), -60.0]])
        stored = logits + np.array([0, difference, *[0.0] * 97, 9.0])
        rng = np.random.default_rng(0)
        (found,) = {
            out_of_fold.count_equal_rows(kind, stored[:, order], logits[:, order], tolerance=tolerance)
            for order in (rng.permutation(100) for _ in range(20))
        }
        return found

    assert count(0.3, 0.9 * rounding) == (1, 1)
    assert count(0.3, 1.1 * rounding) == (0, 1)
    assert count(0.3, 1.1 * rounding, tolerance=2 * rounding) == (1, 1)
    assert count(2.8 * floor, 0) == (1, 1)
    assert count(2.6 * floor, 0) == (0, 0)  # less than a factor e above the floor
