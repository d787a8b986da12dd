"""Soups in workspaces of other kinds: an output of its own, links, networks of timm, ranking and cleaning up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from soup_runs import NAME, ROLES, brew, brewed_once, config
from stored_predictions import workspace_at

from utils.building import listing
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.evaluation.evaluate import evaluate
from utils.operations import upkeep
from utils.predictions import catalog


@pytest.fixture(scope="module")
def brewed(tmp_path_factory, trained):
    """Shared: read it, never write into it."""
    return brewed_once(tmp_path_factory, trained)


@pytest.fixture
def own(tmp_path, brewed):
    return workspace_at(shutil.copytree(brewed.base, tmp_path / "w"))


# where it is written --------------------------------------------------------------------------------------------------
def test_with_an_output_the_base_workspace_is_only_read(own, tmp_path):
    for path in own.checkpoints.glob("*_soup.pth"):
        path.unlink()
    shutil.rmtree(own.ensembles)
    before = {path: path.stat().st_mtime_ns for path in own.base.rglob("*")}
    output = tmp_path / "ours"
    places = (own.split_dir, own.checkpoints, own.metrics, own.kfold, own.deployment, output / "image_cache")
    workspace = Workspace(own.base, *places, output / "debug_logs", output)
    discover.discover(config(), workspace)
    brew(workspace, "runs.model_soup.methods=[greedy]")
    assert (output / "checkpoints" / f"{NAME}_greedy_soup.pth").is_file()
    assert {path: path.stat().st_mtime_ns for path in own.base.rglob("*")} == before
    discover.discover(config(), workspace)
    member = catalog.load(workspace).members[f"{NAME}_greedy_soup"]
    assert member.checkpoints[0]["path"] == str(output / "checkpoints" / f"{NAME}_greedy_soup.pth")
    assert brew(workspace, "runs.model_soup.methods=[greedy]").document["built"] == []
    assert f"{NAME}_greedy_soup" not in catalog.load(own_discovered(own)).members


def own_discovered(workspace):
    discover.discover(config(), workspace)
    return workspace


def test_nothing_is_written_behind_a_link(own, tmp_path):
    Path(own.checkpoints).rename(tmp_path / "elsewhere")
    own.checkpoints.symlink_to(tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    result = brew(own, force=True)
    assert "a symbolic link to" in result.failures[0]
    assert "--output DIR" in result.failures[0]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == before


# networks of timm -----------------------------------------------------------------------------------------------------
def test_checkpoints_of_a_declared_network_give_a_soup_that_stays_derived(own):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=4).state_dict()
    explained = {"backbone_name": "timm:test_resnet", "img_size": 32}
    for number, stage in enumerate(("final", "snapshot1", "snapshot2")):
        torch.manual_seed(number)
        other = {n: v + 0.01 * torch.randn(v.shape) if v.ndim > 1 else v for n, v in state.items()}
        torch.save({"model_state_dict": other, "extra": explained}, own.base / f"leaf_{stage}.pth")
    for stage in ("snapshot1", "snapshot2"):
        shutil.move(own.base / f"leaf_{stage}.pth", own.checkpoints)
    declaration = f"leaf=timm:test_resnet@{own.base / 'leaf_final.pth'}"
    discover.discover(config(), own, add=[declaration], trained_on=["train"])
    leaf = "backbones.include=[leaf]"
    assert "uniform_soup_leaf" in brew(own, leaf, "runs.model_soup.methods=[uniform]").document["built"]
    for _ in range(2):
        soup = catalog.load(own).members["leaf_uniform_soup"]
        assert (soup.source, soup.architecture, soup.img_size) == ("derived", "timm:test_resnet", 32)
        assert soup.network(own).source == "timm"
        assert brew(own, leaf, "runs.model_soup.methods=[uniform]").document["built"] == []
        discover.discover(config(), own)


# evaluate and clean ---------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("without_figures")
def test_a_soup_is_ranked_once_and_under_its_own_name_where_it_is_asked_for(own):
    def ranked(*overrides):
        rows = evaluate(config(*overrides), own).document["rows"]
        return {row["name"]: row["kind"] for row in rows}

    soups = {f"{role}_{NAME}": "ensemble" for role in ROLES}
    assert ranked() == {NAME: "member", "soft_voting_ensemble": "ensemble", **soups}
    own_name = f"{NAME}_greedy_soup"
    assert ranked(f"backbones.include=[{NAME}, {own_name}]")[own_name] == "member"
    alone = evaluate(config(), own, model_name=own_name)
    assert alone.document["name"] == own_name


def test_a_soup_of_an_excluded_backbone_is_not_in_the_configuration(brewed):
    soups = [f"{method}_{NAME}" for method in sorted(listing.SOUPS)]
    assert listing.unlisted(brewed, config()) == []
    without = config("backbones.include=all", f"backbones.exclude=[{NAME}]")
    assert listing.unlisted(brewed, without) == soups


def test_what_a_killed_build_left_among_the_checkpoints_is_cleaned_and_nothing_else(own):
    ours = own.checkpoints / f".{NAME}_uniform_soup.abcd1234.partial.pth"
    theirs = own.checkpoints / f".{NAME}_final.abcd1234.partial.pth"
    for path in (ours, theirs):
        path.write_bytes(b"half")
    before = {path.name for path in own.checkpoints.iterdir()}
    upkeep.clean(config(), own, temporary=True)
    assert before - {path.name for path in own.checkpoints.iterdir()} == {ours.name}
