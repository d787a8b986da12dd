"""The inventory lists what each command would keep up to date, and why something is stale."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import PROJECT
from given_predictions import empty_workspace, take_in, write

from utils.building import build_commands
from utils.core.config import Config
from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.operations import inventory

STACK = ("runs.stacking.enable=true", "runs.stacking.meta_learners=[lr]")


def config(*overrides: str) -> Config:
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=overrides)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = empty_workspace(tmp_path / "base")
    take_in(workspace, write(tmp_path / "given"))
    return workspace


def test_without_a_catalog_it_is_missing_and_nothing_is_requested(tmp_path):
    empty = inventory.take(config(), empty_workspace(tmp_path / "base"))
    assert (empty.catalog.state, empty.content, empty.requested) == ("missing", None, {})


def test_requested_ensembles_are_listed_by_command_and_missing_until_built(workspace):
    listing = inventory.take(config(*STACK), workspace)
    assert listing.requested["stack"] == ("stacking_lr",)
    assert {listing.ensembles[name].state for name in listing.requested["build-ensemble"]} == {"missing"}
    assert listing.requested["fusion-train"] == ()
    build_commands.build_ensemble(config(), workspace)
    later = inventory.take(config(*STACK), workspace)
    assert {later.ensembles[name].state for name in later.requested["build-ensemble"]} == {"current"}
    assert later.stale_ensembles() == {}


def test_every_family_is_judged_by_its_inputs(workspace):
    from utils.building.stacking_builder import stack

    stack(config(*STACK), workspace)
    assert inventory.take(config(*STACK), workspace).ensembles["stacking_lr"].state == "current"
    other = inventory.take(config(*STACK, "seed=7"), workspace)
    assert other.ensembles["stacking_lr"].state == "stale"
    assert "stacking_lr" in other.stale_ensembles()
    # Where the section is off nothing would build it, so that its members alone are compared.
    assert inventory.take(config("seed=7"), workspace).ensembles["stacking_lr"].state == "current"


def test_a_selection_without_a_member_is_a_problem_and_not_an_error(workspace):
    listing = inventory.take(config("backbones.include=[CustomConvNeXt]"), workspace)
    assert len(listing.problems) == 1
    assert listing.requested == {}
