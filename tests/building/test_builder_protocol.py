"""The driver and the rule of staleness, with a builder of one line per method, on imported predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import PROJECT
from given_predictions import CONFIG, empty_workspace, take_in, write

from utils.building import build_commands, builder_protocol, ensembles, fitting
from utils.building.builder_protocol import Build, Builder, Session, state_of
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.core.workspace import Workspace


@dataclass
class Votes(Builder):
    """Soft votes under several names; `broken` cannot be built, `excluded` have been tried in vain before."""

    requested: tuple[str, ...] = ("first", "second")
    broken: tuple[str, ...] = ()
    excluded: Mapping[str, str] = field(default_factory=dict)
    setting: int = 1
    calls: list[tuple[str, ...]] = field(default_factory=list)
    config_key = "runs.score_ensemble"

    def names(self, session: Session) -> list[str]:
        return list(self.requested)

    def left_out(self, session: Session) -> Mapping[str, str]:
        return self.excluded

    def inputs_digest(self, session: Session, name: str) -> str:
        members = self.members(session)
        return fitting.inputs_digest(session.config, session.store, members, "soft_voting", extra_inputs=self.setting)

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        self.calls.append(tuple(names))
        members = self.members(session)
        session.ensure(members)
        for name in (name for name in names if name not in self.broken):
            recipe = ensembles.COMBINERS["soft_voting"].configured(
                session.config, fitting.member_facts(session.store, members)
            )
            rows = session.rows(members)
            fitting.save(
                session.store, name, "soft_voting", fitting.fit(recipe, rows), members, rows, extra_inputs=self.setting
            )
        failed = tuple(name for name in names if name in self.broken)
        built = tuple(name for name in names if name not in failed)
        return Build(session, built, failed, tuple(f"{name}: broken" for name in failed))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = empty_workspace(tmp_path / "base")
    take_in(workspace, write(tmp_path / "given"))
    return workspace


def opened(workspace: Workspace) -> Session:
    return Session.open(CONFIG, workspace)


def test_what_is_missing_is_built_and_then_kept_unless_forced(workspace):
    builder = Votes()
    assert builder_protocol.run([builder], opened(workspace)).states == {"first": "built", "second": "built"}
    again = builder_protocol.run([builder], opened(workspace))
    assert again.states == {"first": "up to date", "second": "up to date"}
    assert again.document()["up_to_date"] == ["first", "second"]
    assert len(again.lines) == 2
    builder_protocol.run([builder], opened(workspace), force=True)
    assert builder.calls == [("first", "second"), ("first", "second")]


def test_a_changed_input_builds_what_depends_on_it_alone(workspace):
    builder_protocol.run([Votes()], opened(workspace))
    changed = Votes(requested=("second", "third"), setting=2)
    session = opened(workspace)
    assert state_of(session, "second", changed).state == "stale"
    assert state_of(session, "third", changed).state == "missing"
    assert state_of(session, "first", None).state == "current"  # by its members alone
    builder_protocol.run([changed], session)
    assert changed.calls == [("second", "third")]
    assert state_of(opened(workspace), "second", changed).state == "current"


def test_other_selected_members_make_it_stale_and_the_reason_names_both_selections(workspace):
    builder_protocol.run([Votes()], opened(workspace))
    session = opened(workspace)
    state = state_of(replace(session, members=session.members[:2]), "first", Votes())
    assert state.state == "stale"
    assert state.reasons == ("built from bayes, forest, linear; the configuration selects bayes, forest",)


def test_a_member_with_other_predictions_makes_it_stale(workspace, tmp_path):
    builder_protocol.run([Votes()], opened(workspace))
    take_in(workspace, write(tmp_path / "other", {"bayes": 7, "forest": 2, "linear": 3}))
    assert state_of(opened(workspace), "first", None).reasons == ("bayes has other predictions now",)


def test_a_failure_is_reported_and_the_others_go_on(workspace):
    outcome = builder_protocol.run([Votes(broken=("first",))], opened(workspace))
    assert outcome.states == {"second": "built"}
    assert outcome.failures == ("first: broken",)


def test_what_was_tried_in_vain_is_a_failure_again_and_tried_again_when_forced(workspace):
    builder = Votes(excluded={"first": "no budget"})
    outcome = builder_protocol.run([builder], opened(workspace))
    assert outcome.failures == ("first: no budget",)
    assert builder.calls == [("second",)]
    builder_protocol.run([builder], opened(workspace), force=True)
    assert builder.calls[-1] == ("first", "second")


def test_a_damaged_record_is_a_failure_with_its_file_until_forced(workspace):
    builder_protocol.run([Votes()], opened(workspace))
    record = workspace.ensemble("first") / "ensemble.json"
    record.write_text("{")
    assert state_of(opened(workspace), "first", Votes()).state == "damaged"
    outcome = builder_protocol.run([Votes()], opened(workspace))
    assert outcome.states == {"second": "up to date"}
    assert [str(record) in failure for failure in outcome.failures] == [True]
    assert builder_protocol.run([Votes()], opened(workspace), force=True).states["first"] == "built"


def test_a_session_is_immutable_and_one_with_another_catalog_shares_the_digests(workspace):
    session = opened(workspace)
    smaller = replace(session.catalog, members={"bayes": session.catalog.members["bayes"]})
    other = session.with_catalog(smaller)
    assert (list(other.catalog.members), len(session.catalog.members)) == (["bayes"], 3)
    assert other.store.digests is session.store.digests
    with pytest.raises(AttributeError):
        session.members = ()


def test_a_command_whose_sections_are_all_off_names_the_line_to_add(workspace):
    section = CONFIG.runs.score_ensemble.model_copy(update={"enable": False})
    runs = CONFIG.runs.model_copy(update={"score_ensemble": section})
    config = CONFIG.model_copy(update={"runs": runs})
    with pytest.raises(UserError, match=r"runs\.score_ensemble\.enable=true"):
        builder_protocol.enabled([Votes()], config)


def test_where_every_section_of_a_command_is_off_all_of_them_are_named():
    off = [f"runs.{section}.enable=false" for section in ("fusion", "cascade", "moe")]
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=off)
    expected = r"run again with --set runs\.fusion\.enable=true, runs\.cascade\.enable=true or runs\.moe\.enable=true"
    with pytest.raises(UserError, match=expected):
        builder_protocol.enabled(build_commands.BUILDERS["fusion-train"], config)
