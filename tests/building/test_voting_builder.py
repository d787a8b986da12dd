"""Voting ensembles of imported predictions: names, failures, digests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from given_predictions import CONFIG, empty_workspace, take_in, write

from utils.building.builder_protocol import Session, run, state_of
from utils.building.voting_builder import VotingBuilder
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.core.errors import UserError


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    """Shared: read it, never build in it."""
    workspace = empty_workspace(tmp_path_factory.mktemp("voting") / "base")
    take_in(workspace, write(tmp_path_factory.mktemp("given")))
    return Session.open(CONFIG, workspace)


def with_methods(session: Session, *methods: str, seed: int = 42) -> Session:
    names = {"runs.score_ensemble.methods": ("soft_voting", "weighted", "no_such_method")}
    path = Path(__file__).resolve().parents[2] / "configs" / "votes.yaml"
    overrides = (f"runs.score_ensemble.methods=[{','.join(methods)}]", f"seed={seed}")
    config: Config = load_config(path, overrides=overrides, names=names)
    store = session.store.with_catalog(session.catalog)
    store.config = config
    return replace(session, store=store)


def test_names_are_those_of_the_methods_in_their_order_and_unknown_methods_are_failures(session):
    own = with_methods(session, "weighted", "no_such_method", "soft_voting")
    builder = VotingBuilder()
    assert builder.names(own) == ["weighted_ensemble", "soft_voting_ensemble"]
    assert [problem.partition(":")[0] for problem in builder.problems(own)] == ["no_such_method"]
    builder.check(own)


def test_nothing_that_can_be_built_is_an_error(session):
    with pytest.raises(UserError, match="choose from soft_voting"):
        VotingBuilder().check(with_methods(session, "no_such_method"))


def test_the_digest_depends_on_method_members_and_seed(session):
    builder = VotingBuilder()
    digest = builder.inputs_digest(session, "soft_voting_ensemble")
    assert digest == builder.inputs_digest(session, "soft_voting_ensemble")
    assert digest != builder.inputs_digest(session, "hard_voting_ensemble")
    assert digest != builder.inputs_digest(replace(session, members=session.members[:2]), "soft_voting_ensemble")
    assert digest != builder.inputs_digest(with_methods(session, "soft_voting", seed=7), "soft_voting_ensemble")


def test_a_saved_vote_is_judged_also_where_the_configuration_no_longer_lists_it(tmp_path):
    workspace = empty_workspace(tmp_path / "base")
    take_in(workspace, write(tmp_path / "given"))
    session = Session.open(CONFIG, workspace)
    run([VotingBuilder()], session)
    other = with_methods(session, "weighted", seed=7)
    assert VotingBuilder().covers(other, "soft_voting_ensemble")
    assert state_of(other, "soft_voting_ensemble", VotingBuilder()).state == "stale"
