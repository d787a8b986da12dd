"""Boosters of XGBoost as torch modules: equal to the library on every row, or refused by name."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import tree_cases as cases

from utils.combiners.trees import booster_module, probabilities
from utils.core.errors import UserError

KEPT = sorted((Path(__file__).parent / "boosters").glob("*.json"))
"""Boosters with pruned nodes, rows and the library's answers, by one release each of XGBoost."""


def module_of(text: str | bytes, classes: int, layout: str | None = None):
    return booster_module(text, classes=classes, source="booster.json", remedy="Stack again.", layout=layout)


def tree(*nodes: tuple) -> dict:
    """Nodes as (feature, threshold, left child, right child, missing goes left) or (value,)."""
    inner = [node if len(node) > 1 else (0, node[0], -1, -1, 0) for node in nodes]
    names = ("split_indices", "split_conditions", "left_children", "right_children", "default_left")
    return dict(zip(names, map(list, zip(*inner, strict=True)), strict=True)) | {"split_type": [0] * len(nodes)}


def record(trees: list[dict], owners: list[int], *, base: str = "5E-1", classes: int = 2, features: int = 2) -> dict:
    """What XGBoost would write, less what nobody reads."""
    parameters = {"base_score": base, "num_class": str(classes), "num_feature": str(features)}
    model = {"gbtree_model_param": {"num_trees": str(len(trees))}, "tree_info": owners, "trees": trees}
    return {
        "learner": {
            "gradient_booster": {"model": model, "name": "gbtree"},
            "learner_model_param": parameters,
            "objective": {"name": "multi:softprob"},
        },
        "version": [3, 2, 0],
    }


def small() -> dict:
    """Class 0: feature 0 below 1.5, else feature 1 below -2; class 1: one leaf."""
    first = tree((0, 1.5, 1, 2, 1), (2.0,), (1, -2.0, 3, 4, 0), (-1.0,), (0.5,))
    return record([first, tree((1.0,))], [0, 1])


def scores(found: np.ndarray) -> np.ndarray:
    """Of class 0 before the soft-max, that of class 1 being 1."""
    return np.log(found[:, 0] / found[:, 1]) + 1


# By hand -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["perfect", "linked"])
def test_a_row_on_a_threshold_goes_right_and_a_missing_value_its_own_way(layout):
    below = np.nextafter(np.float32(1.5), np.float32(0))
    rows = np.array(
        [[1.5, -2], [below, -2], [1.5, -2.5], [np.nan, -9], [2, np.nan], [np.inf, np.inf], [-np.inf, 0]],
        dtype=np.float32,
    )
    found = probabilities(module_of(json.dumps(small()), 2, layout), rows)
    np.testing.assert_allclose(scores(found), [0.5, 2, -1, 2, 0.5, 0.5, 2], atol=1e-6)


@pytest.mark.parametrize("layout", ["perfect", "linked"])
def test_trees_without_a_split_are_the_same_everywhere(layout):
    text = json.dumps(record([tree((3.0,)), tree((1.0,))], [0, 1]))
    rows = np.array([[np.inf, np.nan], [0, 1]], dtype=np.float32)
    np.testing.assert_allclose(scores(probabilities(module_of(text, 2, layout), rows)), 3, atol=1e-6)


@pytest.mark.parametrize(("base", "expected"), [("7E-1", 3.0), ("[7E-1]", 3.0), ("[2E0,-1E0]", 6.0)])
def test_the_base_score_is_one_number_or_one_for_each_class(base, expected):
    text = json.dumps(record([tree((3.0,)), tree((1.0,))], [0, 1], base=base))
    found = probabilities(module_of(text, 2), np.zeros((1, 2), dtype=np.float32))
    np.testing.assert_allclose(scores(found), expected, atol=1e-6)


def test_trees_may_stand_in_any_order():
    text = json.dumps(record([tree((1.0,)), tree((3.0,)), tree((-1.0,)), tree((1.0,))], [1, 0, 0, 1]))
    found = probabilities(module_of(text, 2), np.zeros((1, 2), dtype=np.float32))
    np.testing.assert_allclose(scores(found), 1 + (3 - 1) - (1 + 1), atol=1e-6)


# Against the library -------------------------------------------------------------------------------------------------
def grown(features, labels, *, classes: int, rounds: int = 6, **settings):
    import xgboost

    plain = {"objective": "multi:softprob", "num_class": classes, "nthread": 1, "max_bin": 64, "tree_method": "hist"}
    return xgboost.train(plain | settings, xgboost.DMatrix(features, label=labels, nthread=1), rounds)


def answers(booster, rows: np.ndarray) -> np.ndarray:
    import xgboost

    booster.set_param({"nthread": 1})
    return booster.predict(xgboost.DMatrix(rows, nthread=1))


def text_of(booster) -> bytes:
    return bytes(booster.save_raw("json"))


def thresholds(booster) -> set[tuple[int, float]]:
    trees = json.loads(text_of(booster))["learner"]["gradient_booster"]["model"]["trees"]
    columns = ("split_indices", "split_conditions", "left_children")
    return {(f, v) for one in trees for f, v, left in zip(*(one[c] for c in columns), strict=True) if left >= 0}


def agrees(depth: int, classes: int, **settings) -> None:
    booster = grown(*cases.training_table(classes), classes=classes, max_depth=depth, **settings)
    rows = cases.unseen_rows(thresholds(booster))
    found = probabilities(module_of(text_of(booster), classes), rows)
    np.testing.assert_allclose(found, answers(booster, rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("depth", "classes"), cases.SOME)
def test_agrees_on_random_rows(depth, classes):
    agrees(depth, classes)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "classes"), list(product(cases.ALL_DEPTHS, cases.ALL_CLASSES)))
def test_agrees_at_every_depth_with_any_number_of_classes(depth, classes):
    agrees(depth, classes, rounds=20)


@pytest.mark.parametrize(
    "settings",
    [{"num_parallel_tree": 3}, {"base_score": 0.3}, {"tree_method": "exact", "gamma": 1.0}, {"tree_method": "approx"}],
    ids=["several trees a round", "base score", "pruned", "approx"],
)
def test_agrees_however_it_was_grown(settings):
    agrees(4, 3, **settings)


def test_the_rows_lie_on_thresholds_and_hold_missing_values():
    booster = grown(*cases.training_table(3), classes=3, max_depth=6)
    cuts = thresholds(booster)
    rows = cases.unseen_rows(cuts)
    equal = sum(int((rows[:, feature] == np.float32(value)).sum()) for feature, value in cuts)
    assert equal > 10_000
    assert np.isnan(rows).sum() > 10_000


@pytest.mark.parametrize("layout", ["perfect", "linked"])
def test_agrees_on_the_digits(layout):
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = digits.data.astype(np.float32)
    booster = grown(features[:700], digits.target[:700], classes=10, max_depth=6)
    found = probabilities(module_of(text_of(booster), 10, layout), features)
    assert len(found) == 1797
    np.testing.assert_allclose(found, answers(booster, features), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_agrees_at_full_size():
    features, labels = cases.training_table(13, rows=2000)
    booster = grown(features, labels, classes=13, max_depth=6, rounds=100, learning_rate=0.1)
    rows = cases.unseen_rows(thresholds(booster))
    found = probabilities(module_of(text_of(booster), 13), rows)
    np.testing.assert_allclose(found, answers(booster, rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_boosters_of_earlier_releases_are_read_without_the_library(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = np.array(kept["rows"], dtype=np.float32)
    found = probabilities(module_of(json.dumps(kept["booster"]), 3), rows)
    np.testing.assert_allclose(found, kept["probabilities"], rtol=0, atol=1e-6)


# Other runtimes ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def booster():
    return grown(*cases.training_table(5), classes=5, max_depth=6)


@pytest.mark.parametrize("layout", ["perfect", "linked"])
@pytest.mark.parametrize("runtime", cases.RUNTIMES)
def test_answers_alike_in_every_runtime(booster, runtime, layout):
    rows = cases.unseen_rows(thresholds(booster), rows=3000)
    run = runtime(module_of(text_of(booster), 5, layout))
    for size in (1, 3, 17, 3000):
        np.testing.assert_allclose(run(rows[:size]), answers(booster, rows[:size]), rtol=0, atol=1e-6)


def test_a_module_holds_buffers_and_nothing_to_train(booster):
    module = module_of(text_of(booster), 5)
    assert not list(module.parameters())
    other = module_of(text_of(booster), 5)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict())
    rows = torch.from_numpy(cases.unseen_rows(thresholds(booster), rows=50))
    assert torch.equal(module(rows), other(rows))


def test_probabilities_do_not_depend_on_the_rows_beside_them(booster):
    module, rows = module_of(text_of(booster), 5), cases.unseen_rows(thresholds(booster), rows=700)
    together = probabilities(module, rows)
    alone = np.concatenate([probabilities(module, rows[start : start + 100]) for start in range(0, 700, 100)])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-15)


# Refusals ------------------------------------------------------------------------------------------------------------
def changed(*place: str | int, value: object) -> str:
    found = small()
    target = found
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return json.dumps(found)


LEARNER = ("learner",)
PARAMETERS = (*LEARNER, "learner_model_param")
MODEL = (*LEARNER, "gradient_booster", "model")
FIRST = (*MODEL, "trees", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged, JSONDecodeError"),
        (json.dumps(small())[:-40], "damaged, JSONDecodeError"),
        (b"\xff\xfe\x00", "damaged, Unicode"),
        ("[" * 100_000, "damaged, RecursionError"),
        ("[]", "damaged, TypeError"),
        ("{}", "damaged, KeyError"),
        (changed("version", value=[2, 0, 3]), "written by XGBoost 2.0.3; expected .* XGBoost 2.1 or newer, below 4"),
        (changed("version", value=[4, 0, 0]), "written by XGBoost 4.0.0; expected .*, below 4"),
        (changed("version", value=["three"]), "damaged, ValueError"),
        (changed(*LEARNER, "objective", "name", value="binary:logistic"), "objective is 'binary:logistic', not"),
        (changed(*LEARNER, "gradient_booster", "name", value="dart"), "booster is 'dart', not 'gbtree'"),
        (changed(*PARAMETERS, "num_class", value="3"), "num_class is 3, not 2"),
        (changed(*PARAMETERS, "base_score", value="[1,2,3]"), r"base_score is \[1,2,3\]"),
        (changed(*PARAMETERS, "base_score", value="NaN"), "base_score is NaN"),
        (changed(*PARAMETERS, "num_feature", value="1"), "a feature is not one of 1"),
        (changed(*MODEL, "trees", value=[]), "num_trees is 2, not 0"),
        (changed(*MODEL, "tree_info", value=[0, 0]), "2 trees are not spread evenly over 2 classes"),
        (changed(*MODEL, "tree_info", value=[0, 2]), "2 trees are not spread evenly over 2 classes"),
        (changed(*MODEL, "tree_info", value=[0, -1]), "negative"),
        (changed(*FIRST, "left_children", value=[1, -1, 3, -1]), "has not one entry for each node"),
        (changed(*FIRST, "left_children", 0, value=5), "a child is not in its tree"),
        (changed(*FIRST, "right_children", 0, value=-1), "a child is not in its tree"),
        (changed(*FIRST, "left_children", 2, value=0), "a node has two parents"),
        (changed(*FIRST, "split_type", 0, value=1), "it splits by categories"),
        (changed(*FIRST, "split_indices", 0, value=2), "a feature is not one of 2"),
        (changed(*FIRST, "split_conditions", 3, value=float("inf")), "a number is not finite"),
        (changed(*FIRST, "split_conditions", 3, value=1e300), "a number is not finite"),
        (changed(*FIRST, "split_conditions", 3, value="x"), "could not convert"),
    ],
)
def test_what_is_no_such_booster_is_refused_by_name_with_the_remedy(text, words):
    with pytest.raises(UserError, match=rf"^booster\.json: .*{words}") as refused:
        module_of(text, 2)
    assert str(refused.value).endswith(". Stack again.")


def test_a_text_cut_anywhere_or_with_any_byte_changed_is_refused_or_read():
    text = json.dumps(small()).encode()
    rng = np.random.default_rng(1)
    read = refused = 0
    for place in range(0, len(text), 3):
        for broken in (text[:place], text[:place] + bytes([rng.integers(32, 127)]) + text[place + 1 :]):
            try:
                module_of(broken, 2)
                read += 1
            except UserError:
                refused += 1
    assert refused > read > 0
