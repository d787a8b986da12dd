"""The fuser's inputs: which ensembles, why others are left out, what makes it stale."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT
from given_predictions import empty_workspace, logged, take_in, write

from utils.building import baselines, build_commands, ensembles, fuser_inputs, listing
from utils.building.builder_protocol import Session, state_of
from utils.building.meta_builder import MetaBuilder, meta_fuse
from utils.building.stacking_builder import stack
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.numeric import nested_cv
from utils.operations import upkeep

pytestmark = pytest.mark.usefixtures("short_searches")

ON = ("runs.meta_fuser.enable=true", "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging]")


def config(*overrides: str) -> Config:
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=(*ON, *overrides))


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> Workspace:
    """Shared: read it, never write into it."""
    workspace = empty_workspace(tmp_path_factory.mktemp("fused") / "base")
    take_in(workspace, write(tmp_path_factory.mktemp("given")))
    document = meta_fuse(config(), workspace).document
    assert document["inputs"] == ["logit_averaging_ensemble", "soft_voting_ensemble"]  # built on the way
    return workspace


@pytest.fixture
def own(fused, tmp_path) -> Workspace:
    return empty_workspace(Path(shutil.copytree(fused.base, tmp_path / "base")))


@pytest.fixture(scope="module")
def voted(fused, tmp_path_factory) -> Workspace:
    """After a build of the votes `BUILT`. Shared: read it, never write into it."""
    workspace = empty_workspace(Path(shutil.copytree(fused.base, tmp_path_factory.mktemp("voted") / "base")))
    build_commands.build_ensemble(config(*BUILT), workspace)
    return workspace


@pytest.fixture
def own_voted(voted, tmp_path) -> Workspace:
    return empty_workspace(Path(shutil.copytree(voted.base, tmp_path / "base")))


def state(workspace: Workspace, *overrides: str):
    return state_of(Session.open(config(*overrides), workspace), "meta_fuser", MetaBuilder())


def test_it_is_current_until_an_input_or_a_setting_changes(own):
    assert state(own).state == "current"
    assert state(own, "runs.meta_fuser.fuser_type=attention").state == "stale"
    build_commands.build_ensemble(config("seed=7"), own, force=True)
    assert state(own).state == "stale"


def test_clean_keeps_the_inputs_of_a_listed_fuser_and_removes_them_with_it(own):
    only_one = config("runs.score_ensemble.methods=[soft_voting]")
    assert listing.unlisted(own, only_one) == ["logit_averaging_ensemble"]
    assert listing.without_readers(own, ["logit_averaging_ensemble"]) == []
    upkeep.clean(only_one, own, confirm=True, unlisted=True)
    assert state(own).state == "current"
    off = config("runs.score_ensemble.methods=[soft_voting]", "runs.meta_fuser.enable=false")
    upkeep.clean(off, own, confirm=True, unlisted=True)
    assert ensembles.names(own) == ["soft_voting_ensemble"]


def test_a_stacker_on_equal_rows_reads_the_baselines_of_the_fuser(own, monkeypatch):
    monkeypatch.setattr(baselines, "_measured", {})
    monkeypatch.setattr(baselines, "_measure", lambda *_: pytest.fail("measured again"))
    stack(config("runs.stacking.enable=true", "runs.stacking.meta_learners=[lr]"), own)
    fuser, stacker = (ensembles.record_of(own, name) for name in ("meta_fuser", "stacking_lr"))
    assert fuser["baselines_digest"] == stacker["baselines_digest"]
    for name, compared in stacker["guards"].items():
        assert compared["log_loss"] == fuser["guards"][name]["log_loss"]
    files = [own.ensemble(name) / "baselines.npz" for name in ("meta_fuser", "stacking_lr")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_input_that_is_not_built_is_a_failure_with_its_command(fused):
    more = "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,stacking_lr]"
    problems = MetaBuilder().problems(Session.open(config(more), fused))
    assert [problem.partition(":")[0] for problem in problems] == ["stacking_lr"]
    assert "ensemble_orchestrator.py stack" in problems[0]


def test_one_input_is_refused(fused):
    with pytest.raises(UserError, match="leaves 1 ensemble"):
        MetaBuilder().check(Session.open(config("runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr]"), fused))


def test_a_member_that_left_the_catalog_stops_it(fused):
    session = Session.open(config(), fused)
    without = {name: member for name, member in session.catalog.members.items() if name != "bayes"}
    with pytest.raises(UserError, match="bayes is no longer in the catalog"):
        MetaBuilder().check(session.with_catalog(replace(session.catalog, members=without)))


def test_a_damaged_input_is_a_reason_and_not_damage_of_the_fuser(own):
    (own.ensemble("soft_voting_ensemble") / "ensemble.json").write_text("{")
    found = state(own)
    assert found.state == "stale"
    assert "soft_voting_ensemble" in found.reasons[0]


ON_VAL_ROWS = ("runs.score_ensemble.methods=[weighted]", "runs.score_ensemble.fit_rows=val")
THREE = "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,weighted]"


def test_an_input_on_few_rows_is_left_out_and_the_fuser_keeps_the_rows_of_the_others(own, caplog):
    build_commands.build_ensemble(config(*ON_VAL_ROWS), own)
    with logged(caplog):
        result = meta_fuse(config(THREE), own)
    assert result.document["inputs"] == ["logit_averaging_ensemble", "soft_voting_ensemble"]
    assert "weighted_ensemble: it has cross-fitted predictions on 30 rows, other inputs on up to 90" in caplog.text
    record = ensembles.record_of(own, "meta_fuser")
    assert record["crossfit"]["n"] == 90
    assert list(record["inputs_left_out"]) == ["weighted_ensemble"]
    assert state(own, THREE).state == "current"


def test_inputs_on_few_rows_that_leave_one_input_are_refused_with_the_reason(own):
    build_commands.build_ensemble(config(*ON_VAL_ROWS), own)
    two = "runs.meta_fuser.input_ensembles=[soft_voting,weighted]"
    with pytest.raises(UserError, match=r"leaves 1 ensemble.*weighted_ensemble: it has cross-fitted predictions on 30"):
        MetaBuilder().check(Session.open(config(two), own))


BUILT = ("runs.score_ensemble.methods=[soft_voting,logit_averaging,weighted,greedy_selection]",)
CONVEX = (*BUILT, "runs.meta_fuser.fuser_type=convex", "runs.meta_fuser.input_ensembles=all")


def test_all_takes_every_built_ensemble_of_the_configuration_and_a_convex_fuser_says_what_each_weighs(own_voted):
    result = meta_fuse(config(*CONVEX), own_voted)
    names = ["greedy_selection_ensemble", "logit_averaging_ensemble", "soft_voting_ensemble", "weighted_ensemble"]
    assert result.document["inputs"] == names
    assert result.document["left_out"] == {}
    assert sorted(result.document["input_weights"]) == names
    used = {name for name, weight in result.document["input_weights"].items() if weight > 0}
    ensemble = ensembles.load(own_voted, "meta_fuser")
    assert len(ensemble.combiner.inputs) == len(used) < len(names)
    assert f"; 0 for {len(names) - len(used)} other inputs" in result.text
    assert state(own_voted, *CONVEX).state == "current"
    assert ensembles.record_of(own_voted, "meta_fuser")["crossfit"]["n"] == 90
    build_commands.build_ensemble(config("runs.score_ensemble.methods=[hard_voting]"), own_voted)
    assert state(own_voted, *CONVEX).state == "current"  # it is not in the configuration
    five = "runs.score_ensemble.methods=[soft_voting,logit_averaging,weighted,greedy_selection,hard_voting]"
    assert state(own_voted, *CONVEX, five).state == "stale"


def test_with_enough_rows_inner_copies_are_those_of_neighbouring_folds(own, monkeypatch):
    monkeypatch.setattr(nested_cv, "ENOUGH_ROWS", 10)
    build_commands.build_ensemble(config(*BUILT), own, force=True)
    stacking = ("runs.stacking.enable=true", "runs.stacking.meta_learners=[lr]")
    stack(config(*BUILT, *stacking), own)
    result = meta_fuse(config(*CONVEX, *stacking), own)
    assert "stacking_lr" in result.document["inputs"]
    assert np.isfinite(ensembles.load_crossfit(own, "meta_fuser").probabilities).all()
    neighbours = {0: (4, 0, 1), 1: (0, 1, 2), 2: (1, 2, 3), 3: (2, 3, 4), 4: (3, 4, 0)}
    for name in ("stacking_lr", "greedy_selection_ensemble"):
        crossfit = ensembles.load_nested_crossfit(own, ensembles.load(own, name))
        for fold, known in neighbours.items():
            finite = np.isfinite(crossfit.inner[fold]).all(axis=1)
            np.testing.assert_array_equal(finite, np.isin(crossfit.fold, known))


def test_a_fuser_of_trees_takes_all_too(own_voted):
    result = meta_fuse(config(*CONVEX, "runs.meta_fuser.fuser_type=attention"), own_voted)
    assert len(result.document["inputs"]) == 4
    assert result.document["input_weights"] is None


def test_an_input_without_copies_without_two_folds_is_left_out_and_named(own_voted):
    path = own_voted.ensemble("weighted_ensemble") / "ensemble.json"
    record = json.loads(path.read_text())
    del record["inner_folds"]  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    result = meta_fuse(config(*CONVEX), own_voted)
    assert list(result.document["left_out"]) == ["weighted_ensemble"]
    assert "left out: weighted_ensemble: it has no predictions of copies" in result.text
    assert "build-ensemble --force" in result.text
    assert "weighted_ensemble" not in result.document["inputs"]
    other = meta_fuse(config(*CONVEX, "runs.meta_fuser.fuser_type=attention"), own_voted)
    assert "weighted_ensemble" in other.document["inputs"]


def test_all_leaves_out_an_ensemble_whose_member_is_gone(own_voted):
    session = Session.open(config(*CONVEX), own_voted)
    without = {name: member for name, member in session.catalog.members.items() if name != "bayes"}
    session = session.with_catalog(replace(session.catalog, members=without))
    chosen = fuser_inputs.select(session)
    assert "soft_voting_ensemble" in chosen.left_out
    assert "bayes is no longer in the catalog" in chosen.left_out["soft_voting_ensemble"]
    with pytest.raises(UserError, match=r"leaves \d ensemble.*bayes is no longer in the catalog"):
        MetaBuilder().check(session)


def test_all_of_nothing_says_what_to_build(own):
    for name in ensembles.names(own):
        shutil.rmtree(own.ensemble(name))
    with pytest.raises(UserError, match=r"leaves 0 ensemble.*build-ensemble"):
        meta_fuse(config(*CONVEX), own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": lambda fold: (fold + 1) % 5}, "soft_voting_ensemble: cross-fitted over other folds"),
        ({"sample_ids": lambda ids: np.char.add(ids, ".other")}, "no row on which all of"),
    ],
)
def test_inputs_of_other_folds_and_without_a_shared_row_are_refused(own, change, message):
    path = own.ensemble("soft_voting_ensemble") / "crossfit.npz"
    with np.load(path) as arrays:
        changed = {name: change.get(name, lambda array: array)(array) for name, array in arrays.items()}
    np.savez(path, **changed)
    with pytest.raises(UserError, match=message):
        meta_fuse(config("runs.meta_fuser.fuser_type=convex"), own, force=True)
