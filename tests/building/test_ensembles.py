"""Saving, loading and cross-fitting ensembles, with hand-made rows and combiners."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from utils.building import ensembles
from utils.building.ensembles import Ensemble, Provenance, RowSet
from utils.combiners.calibrated_votes import CalibratedLogitAveraging
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.ensemble_methods import SoftVoting
from utils.numeric.metrics import softmax
from utils.predictions.rows import Rows

N = 30
IDS = np.array([f"a/{n:02d}.png" for n in range(N)])


@dataclass
class PriorOfLabels:
    """Answers every row with the class frequencies of the rows it was fitted on: it shows whose labels it has read."""

    learns: ClassVar[bool] = True
    frequencies: np.ndarray | None = None

    def fit(self, logits, labels, folds):
        self.frequencies = np.bincount(labels, minlength=logits.shape[2]) / len(labels)
        return self

    def predict_proba(self, logits):
        return np.tile(self.frequencies, (logits.shape[1], 1))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    split = np.array(["train"] * 20 + ["val"] * 10)
    logits = rng.normal(size=(2, N, 3)).astype(np.float32)
    return Rows(("a", "b"), ("x", "y", "z"), split, IDS, rng.integers(0, 3, N), logits, np.ones(N, dtype=bool))


@pytest.fixture
def folds(rows):
    return np.arange(len(rows.labels)) % 3


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))


def ensemble(rows, name="soft_voting_ensemble"):
    seen = Provenance(
        (RowSet("train", "in_sample", tuple(IDS[:20].tolist())), RowSet("val", "held_out", ("a/20.png",))),
        (RowSet("val", "held_out", tuple(IDS[20:].tolist())),),
    )
    digests = {"a": "1", "b": "2"}
    return Ensemble(
        name, "soft_voting", rows.members, rows.members, rows.classes, SoftVoting(), seen, "digest", digests, 42
    )


def test_a_cross_fitted_row_never_depends_on_a_label_of_its_fold(rows, folds):
    unseen = ensembles.crossfit(PriorOfLabels(), rows, folds)
    for fold in range(3):
        inside = unseen.fold == fold
        expected = np.bincount(rows.labels[~inside], minlength=3) / (~inside).sum()
        np.testing.assert_allclose(unseen.probabilities[inside], np.tile(expected, (inside.sum(), 1)), atol=1e-7)


def test_a_vote_answers_every_row_as_it_would_at_inference(rows, folds):
    unseen = ensembles.crossfit(SoftVoting(), rows, folds)
    np.testing.assert_allclose(unseen.probabilities, softmax(rows.logits).mean(axis=0), atol=1e-7)
    assert unseen.keys() == list(zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))


def test_an_ensemble_survives_the_disk(rows, folds, workspace):
    before = ensemble(rows)
    ensembles.save(workspace, before, ensembles.crossfit(SoftVoting(), rows, folds), {"crossfit": {"n": N}})
    after = ensembles.load(workspace, before.name)
    assert replace(after, combiner=before.combiner) == before
    assert ensembles.predict(after, rows).tobytes() == ensembles.predict(before, rows).tobytes()
    assert ensembles.names(workspace) == [before.name]
    assert ensembles.stored_digest(workspace, before.name) == "digest"
    unseen = ensembles.load_crossfit(workspace, before.name)
    assert unseen.keys() == list(zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
    assert unseen.probabilities.dtype == np.float32


def fitted(rows, folds):
    """An ensemble of a combiner that learns, and its cross-fitted predictions."""
    method, recipe = "logit_averaging_calibrated", CalibratedLogitAveraging()
    unseen = ensembles.crossfit(recipe, rows, folds)
    return replace(ensemble(rows, f"{method}_ensemble"), method=method, combiner=recipe), unseen


def test_predictions_of_copies_without_two_folds_survive_the_disk(rows, folds, workspace):
    one, unseen = fitted(rows, folds)
    unseen = replace(unseen, inner={fold: unseen.probabilities + fold for fold in range(3)})
    ensembles.save(workspace, one, unseen, {})
    again = ensembles.load_nested_crossfit(workspace, one)
    assert list(again.inner) == [0, 1, 2]
    for fold in range(3):
        np.testing.assert_array_equal(again.inner[fold], unseen.inner[fold])
    assert ensembles.load_crossfit(workspace, one.name).inner == {}


def test_a_rebuild_without_such_copies_leaves_no_file_of_them(rows, folds, workspace):
    one, unseen = fitted(rows, folds)
    ensembles.save(workspace, one, unseen, {})
    path = workspace.ensemble(one.name) / ensembles.INNER_CROSSFIT
    assert path.is_file()
    ensembles.save(workspace, one, replace(unseen, inner={}), {})
    assert not path.exists()
    assert ensembles.load_nested_crossfit(workspace, one).inner == {}


def test_a_vote_needs_no_file_for_them(rows, folds, workspace):
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    folder = workspace.ensemble("soft_voting_ensemble")
    assert not (folder / ensembles.INNER_CROSSFIT).exists()
    again = ensembles.load_nested_crossfit(workspace, ensemble(rows))
    assert all(inner is again.probabilities for inner in again.inner.values())
    assert list(again.inner) == [0, 1, 2]


def test_copies_of_other_rows_are_refused(rows, folds, workspace):
    one, unseen = fitted(rows, folds)
    ensembles.save(workspace, one, unseen, {})
    path = workspace.ensemble(one.name) / ensembles.INNER_CROSSFIT
    np.save(path, np.load(path)[:, 1:])
    with pytest.raises(UserError, match=r"inner_crossfit\.npy: its shape is \(3, 29, 3\), expected \(3, 30, 3\)"):
        ensembles.load_nested_crossfit(workspace, one)


def test_without_its_record_there_is_no_ensemble(rows, folds, workspace):
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    (workspace.ensemble("soft_voting_ensemble") / "ensemble.json").unlink()  # as when killed before the last write
    assert ensembles.names(workspace) == []
    with pytest.raises(UserError, match="no such ensemble"):
        ensembles.load(workspace, "soft_voting_ensemble")


def test_an_unknown_name_is_answered_with_the_nearest(rows, folds, workspace):
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    with pytest.raises(UserError, match="did you mean 'soft_voting_ensemble'"):
        ensembles.load(workspace, "soft_votingensemble")


@pytest.mark.parametrize("alter", [lambda ids: ids[:-1], lambda ids: np.array([*ids[:-1], "a/99.png"])])
def test_ids_that_are_not_those_of_the_record_are_refused(rows, folds, workspace, alter):
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    path = workspace.ensemble("soft_voting_ensemble") / "provenance.npz"
    with np.load(path) as arrays:
        changed = {name: alter(array) if "train" in name else array for name, array in arrays.items()}
    np.savez(path, **changed)
    with pytest.raises(UserError, match=r"its ids are not those of ensemble\.json"):
        ensembles.load(workspace, "soft_voting_ensemble")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"members": None}, "damaged, 'members' is null; expected a list"),
        ({"method": "no such method"}, "not the form of an ensemble"),
    ],
)
def test_a_record_of_another_form_is_named_with_the_command_that_mends_it(rows, folds, workspace, change, words):
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    path = workspace.ensemble("soft_voting_ensemble") / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"ensemble\.json: {words}.*build-ensemble --force"):
        ensembles.load(workspace, "soft_voting_ensemble")


def test_a_save_that_ends_half_way_leaves_no_ensemble_of_two_versions(rows, folds, workspace, monkeypatch):
    unseen = ensembles.crossfit(SoftVoting(), rows, folds)
    ensembles.save(workspace, ensemble(rows), unseen, {})
    monkeypatch.setattr(ensembles, "write_arrays", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensembles.save(workspace, ensemble(rows), unseen, {})
    assert ensembles.names(workspace) == []


def test_a_new_version_removes_predictions_of_the_old_one(rows, folds, workspace):
    stale = Path(workspace.ensemble("soft_voting_ensemble")) / "predictions_test.npz"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    ensembles.save(workspace, ensemble(rows), ensembles.crossfit(SoftVoting(), rows, folds), {})
    assert not stale.exists()


def test_other_members_or_classes_are_refused(rows):
    with pytest.raises(UserError, match="needs members a, b"):
        ensembles.predict(ensemble(rows), replace(rows, members=("a", "c")))
    with pytest.raises(UserError, match="on 3 classes"):
        ensembles.predict(ensemble(rows), replace(rows, classes=("x", "z", "y")))
