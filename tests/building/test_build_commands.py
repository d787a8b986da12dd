"""The table of builders, and the two commands that run several of them."""

from __future__ import annotations

import pytest
from given_predictions import CONFIG, empty_workspace, take_in, write

from utils.building import build_commands
from utils.building.build_commands import BUILDERS
from utils.commands import COMMANDS, PIPELINE_STAGES
from utils.core.config import Config
from utils.core.errors import UserError


def test_every_builder_belongs_to_a_command_and_to_a_section_that_pipeline_runs_it_for():
    sections = {command: set(places) for command, _, places in PIPELINE_STAGES}
    for command, builders in BUILDERS.items():
        assert command in COMMANDS
        assert {builder.config_key for builder in builders} == sections[command]


def test_every_section_of_a_builder_can_be_switched_on():
    for builder in (builder for builders in BUILDERS.values() for builder in builders):
        assert Config().at(f"{builder.config_key}.enable") in (True, False)


def test_build_ensemble_reports_what_it_built_and_then_keeps_it(tmp_path):
    workspace = empty_workspace(tmp_path / "base")
    take_in(workspace, write(tmp_path / "given"))
    first = build_commands.build_ensemble(CONFIG, workspace)
    assert set(first.document) == {"built", "up_to_date", "members", "folder"}
    assert first.document["members"] == ["bayes", "forest", "linear"]
    second = build_commands.build_ensemble(CONFIG, workspace)
    assert second.document["built"] == []
    assert second.document["up_to_date"] == first.document["built"]


def test_a_pick_without_pruning_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"pruning\.enable=true"):
        build_commands.build_ensemble(CONFIG, empty_workspace(tmp_path / "base"), pick="knee")
