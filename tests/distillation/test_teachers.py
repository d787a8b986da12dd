"""Teachers of imported members: resolution of names, cross-fitted predictions and predictions of a split."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import NAMES, arrays, empty_workspace, opened, take_in, write

from utils.building.build_commands import build_ensemble
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.distillation import teachers
from utils.numeric.metrics import softmax
from utils.predictions.store import Store


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Three imported members and their soft vote. Shared: read it, never write into it."""
    folder = tmp_path_factory.mktemp("teachers")
    workspace = empty_workspace(folder / "workspace")
    take_in(workspace, write(folder / "given"))
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=["runs.score_ensemble.methods=[soft_voting]"])
    build_ensemble(config, workspace)
    return workspace


@pytest.fixture
def store(workspace) -> Store:
    return opened(workspace)


def resolve(store: Store, name: str) -> teachers.Teacher:
    return teachers.resolve(store, name, excluded_member="CustomMobileOne_distilled")


def test_a_teacher_is_an_ensemble_by_either_name_or_a_member(store):
    by_method, by_name, member = (resolve(store, name) for name in ("soft_voting", "soft_voting_ensemble", "forest"))
    assert by_method.name == by_name.name == "soft_voting_ensemble"
    assert not by_method.is_member
    assert member.is_member
    assert member.ensemble.members == ("forest",)
    assert teachers.inputs_digest(store, by_method) == teachers.inputs_digest(store, by_name)
    assert teachers.inputs_digest(store, by_method) != teachers.inputs_digest(store, member)


def test_best_excludes_the_students_member(store):
    recommended = resolve(store, teachers.BEST)
    assert recommended.name in {"soft_voting_ensemble", *NAMES}
    with pytest.raises(UserError, match="the student itself"):
        teachers.resolve(store, "soft_voting", excluded_member="forest")


@pytest.mark.parametrize(
    ("name", "remedy"), [("stacking_lr", "Build it"), ("soft_votin", "did you mean 'soft_voting'")]
)
def test_a_teacher_that_is_not_there_is_refused_with_a_remedy(store, name, remedy):
    with pytest.raises(UserError, match=remedy):
        resolve(store, name)


def test_members_with_imported_predictions_have_no_network(store):
    teacher = resolve(store, "soft_voting")
    assert teachers.members_without_network(store, teacher) == list(NAMES)
    assert teachers.size_mb(store, teacher) is None


def test_cross_fitted_predictions_of_a_soft_vote_are_the_mean_of_the_members(store):
    teacher = resolve(store, "soft_voting")
    parts = [arrays("oof", seed) for seed in (1, 2, 3)]
    ids = [*parts[0]["sample_ids"].tolist(), "of no row"]
    log_probs = teachers.crossfit_log_probabilities(store, teacher, "train", ids)
    assert log_probs.dtype == np.float32
    expected = np.mean([softmax(part["logits"]) for part in parts], axis=0)
    np.testing.assert_allclose(np.exp(log_probs[:-1]), expected, atol=1e-6)
    assert np.isnan(log_probs[-1]).all()


def test_cross_fitted_predictions_of_a_member_are_its_out_of_fold_rows(store):
    part = arrays("oof", 2)
    member = resolve(store, "forest")
    log_probs = teachers.crossfit_log_probabilities(store, member, "train", part["sample_ids"].tolist())
    np.testing.assert_allclose(np.exp(log_probs), softmax(part["logits"]), atol=1e-6)


def test_predictions_of_a_split_are_those_of_inference(store):
    rows, probabilities = teachers.predict_split(store, resolve(store, "soft_voting"), "test")
    by_id = {}
    for seed in (1, 2, 3):
        part = arrays("test", seed)
        for sample_id, row in zip(part["sample_ids"].tolist(), softmax(part["logits"]), strict=True):
            by_id[sample_id] = by_id.get(sample_id, 0) + row / 3
    np.testing.assert_allclose(probabilities, [by_id[key] for key in rows.sample_ids.tolist()], atol=1e-6)


def test_a_teacher_whose_member_has_changed_is_refused(store, workspace, tmp_path):
    shutil.copytree(workspace.base, tmp_path / "workspace")
    changed = empty_workspace(tmp_path / "workspace")
    path = changed.ensemble("soft_voting_ensemble") / "ensemble.json"
    record = json.loads(path.read_text())
    record["member_digests"]["forest"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"forest .*Build it again: .*--force"):
        resolve(opened(changed), "soft_voting")
