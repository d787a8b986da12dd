"""Stackers and fusers on rows that are hard to learn from, without a library, and from damaged files."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from utils import stacking_methods
from utils.building import ensembles
from utils.building.ensembles import Ensemble, Provenance
from utils.combiners.protocol import MemberFacts, fit_crossfitted
from utils.core.config import validate
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.meta_methods import FUSERS, MetaFuserCombiner
from utils.numeric.metrics import accuracy
from utils.predictions.rows import MemberRows, Rows, align

pytestmark = pytest.mark.usefixtures("short_searches")

SHAPE = {"hidden_dims": [8], "epochs": 4, "lr": 0.01}
LEARNERS = [*sorted(stacking_methods.COMBINERS), *(f"meta_fuser {kind}" for kind in sorted(FUSERS))]


def recipe(what: str, members: int):
    method, _, fuser_type = what.partition(" ")
    runs = {
        "stacking": {"mlp_config": SHAPE, "xgb_config": {"n_estimators": 5}},
        "meta_fuser": {
            "mlp_config": SHAPE,
            "fuser_type": fuser_type or "mlp",
            "input_ensembles": ["soft_voting", "stacking_xgb"],
        },
    }
    known = MemberFacts(tuple("abcdef"[:members]), *(np.full(members, np.nan) for _ in range(3)))
    config = validate({"runs": runs}, source=Path("of the test"))
    return (MetaFuserCombiner if fuser_type else stacking_methods.COMBINERS[method]).configured(config, known)


def answered(what: str, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Cross-fitted probabilities, checked to be probabilities, as those of the fitted combiner are."""
    fitted = recipe(what, len(logits))
    unseen = fit_crossfitted(fitted, logits, labels, folds)
    for found in (unseen, fitted.predict_proba(logits)):
        assert found.shape == logits.shape[1:]
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    return unseen


def drawn(members: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = np.arange(rows) % classes
    logits = rng.normal(size=(members, rows, classes)).astype(np.float32)
    logits[:, np.arange(rows), labels] += 2
    return logits, labels, rng.integers(0, 3, rows)


@pytest.mark.parametrize("what", LEARNERS)
def test_a_class_that_stands_in_one_fold_alone_keeps_its_column(what):
    logits, labels, folds = drawn(2, 60, 3)
    folds = np.where(labels == 2, 0, 1 + np.arange(60) % 2)  # whoever answers fold 0 has never seen the last class
    found = answered(what, logits, labels, folds)
    assert found.shape == (60, 3)


@pytest.mark.parametrize("what", LEARNERS)
def test_the_middle_class_may_be_missing_everywhere(what):
    logits, labels, folds = drawn(2, 60, 3)
    found = answered(what, logits, np.where(labels == 1, 0, labels), folds)
    assert found[:, 1].mean() < found[:, [0, 2]].mean()


@pytest.mark.parametrize("what", LEARNERS)
def test_fewer_rows_than_classes_are_enough(what):
    logits, labels, _ = drawn(2, 6, 8)
    assert answered(what, logits, labels, np.arange(6) % 3).shape == (6, 8)


@pytest.mark.parametrize("what", LEARNERS)
def test_members_that_say_the_same_of_every_row_are_no_obstacle(what):
    _, labels, folds = drawn(2, 60, 3)
    found = answered(what, np.zeros((2, 60, 3), dtype=np.float32), labels, folds)
    for fold in range(3):
        assert np.ptp(found[folds == fold], axis=0).max() < 1e-5  # nothing tells the rows apart


@pytest.mark.parametrize("what", LEARNERS)
def test_one_member_is_enough(what):
    logits, labels, folds = drawn(1, 60, 3)
    assert accuracy(answered(what, logits, labels, folds), labels) > 0.5


def test_what_is_no_number_or_of_other_classes_reaches_no_stacker():
    logits, labels, _ = drawn(2, 6, 3)
    ids, honest = np.array([f"{n}" for n in range(6)]), np.ones(6, dtype=bool)
    a = MemberRows("val", ("x", "y", "z"), ids, labels, logits[0], honest)
    broken = logits[1].copy()
    broken[4, 1] = np.nan
    with pytest.raises(UserError, match=r"member b: 1 row\(s\) with NaN or infinity, first 4"):
        align({"a": [a], "b": [MemberRows("val", a.classes, ids, labels, broken, honest)]}, a.classes)
    with pytest.raises(UserError, match="member b: classes x, y, w; expected x, y, z"):
        align({"a": [a], "b": [MemberRows("val", ("x", "y", "w"), ids, labels, logits[1], honest)]}, a.classes)


def test_without_xgboost_its_learner_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(UserError, match=r"pip install -r requirements.txt; or leave xgb out of"):
        recipe("stacking_xgb", 2).fit(*drawn(2, 60, 3))
    answered("stacking_lr", *drawn(2, 60, 3))


# A saved booster -----------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))
    logits, labels, folds = drawn(2, 60, 3)
    ids, honest = np.array([f"{n:02d}" for n in range(60)]), np.ones(60, dtype=bool)
    rows = Rows(("a", "b"), ("x", "y", "z"), np.full(60, "val"), ids, labels, logits, honest)
    fitted = recipe("stacking_xgb", 2)
    unseen = ensembles.crossfit(fitted, rows, folds)
    digests = {"a": "1", "b": "2"}
    one = Ensemble(
        *("stacking_xgb", "stacking_xgb", rows.members, rows.members, rows.classes, fitted, Provenance((), ())),
        *("digest", digests, 42),
    )
    ensembles.save(workspace, one, unseen, {})
    again = ensembles.load(workspace, "stacking_xgb")
    np.testing.assert_array_equal(again.combiner.predict_proba(logits), fitted.predict_proba(logits))
    return workspace


@pytest.mark.parametrize(
    "change", [lambda text: text[:-20], lambda text: text.replace(b"0", b"1", 1), lambda text: b""]
)
def test_a_damaged_booster_is_refused_when_it_is_read_with_what_to_type(saved, change):
    path = saved.ensemble("stacking_xgb") / "booster.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"booster\.json: damaged.* ensemble_orchestrator\.py stack --force"):
        ensembles.load(saved, "stacking_xgb")


def test_a_missing_booster_is_named(saved):
    (saved.ensemble("stacking_xgb") / "booster.json").unlink()
    with pytest.raises(UserError, match=r"booster\.json: missing.* ensemble_orchestrator\.py stack --force"):
        ensembles.load(saved, "stacking_xgb")


def test_a_booster_of_another_version_is_refused_when_it_answers(saved):
    folder = saved.ensemble("stacking_xgb")
    booster = json.loads((folder / "booster.json").read_text())
    booster["version"] = [9, 0, 0]
    text = json.dumps(booster)
    (folder / "booster.json").write_text(text)
    record = json.loads((folder / "ensemble.json").read_text())
    record["texts"]["booster.json"]["sha256"] = sha256(text.encode()).hexdigest()  # as such a version would record it
    (folder / "ensemble.json").write_text(json.dumps(record))
    one = ensembles.load(saved, "stacking_xgb")
    with pytest.raises(UserError, match=r"booster\.json: written by XGBoost 9\.0\.0.* stack --force"):
        one.combiner.predict_proba(drawn(2, 60, 3)[0])
