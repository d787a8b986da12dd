"""`runs.fusion.end_to_end` by its command line: networks of its own, resumed after a kill, used like any ensemble."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, WITHOUT_TORCH, run_python
from given_predictions import empty_workspace, opened, take_in, write
from killing import digests, run_and_kill_repeatedly
from stored_predictions import workspace_at

from utils.building import end_to_end, ensembles
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.predictions import catalog
from utils.predictions.store import Store

NAME = "fusion_concat_mlp"
QUICK = (
    *("--config", "configs/votes.yaml", "--set", "runs.fusion.enable=true", "--set", "runs.fusion.end_to_end=true"),
    *("--set", "runs.fusion.fusion_methods=[concat_mlp]", "--set", "runs.fusion.fusion_config.hidden_dims=[16]"),
    *("--set", "runs.fusion.fusion_config.epochs=2", "--set", "runs.fusion.end_to_end_epochs=3"),
)


@pytest.fixture(scope="module")
def trained_further(tmp_path_factory, built, orchestrator) -> Path:
    """A built workspace after `fusion-train` end to end and `evaluate`. Shared: read it, never write into it."""
    workspace = Path(shutil.copytree(built, tmp_path_factory.mktemp("end_to_end") / "workspace"))
    for command in ("fusion-train", "evaluate"):
        done = orchestrator(command, *QUICK, workspace=workspace)
        assert done.returncode == 0, done.stderr
    return workspace


def record(workspace: Path) -> dict:
    return json.loads((workspace / "ensembles" / "models" / NAME / "ensemble.json").read_text())


def networks(workspace: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workspace / "ensembles" / "models" / NAME).glob("*.pth")}


def test_its_networks_are_derived_members_and_the_base_pipelines_stay_as_they_are(trained_further, built):
    assert digests(trained_further) == digests(built)
    members = json.loads((trained_further / "ensembles" / "ensemble_catalog.json").read_text())["members"]
    found = record(trained_further)
    assert found["members"] == [f"{NAME}_{name}" for name in ("CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid")]
    for name in found["members"]:
        assert members[name]["source"] == "derived"
        assert members[name]["parents"] == [name.removeprefix(f"{NAME}_")]
        assert members[name]["checkpoints"][0]["sha256"] == found["end_to_end"]["networks"][name]
    assert not (trained_further / "ensembles" / "end_to_end" / NAME).exists()


def test_the_loss_falls_and_the_record_says_what_was_seen(trained_further):
    found = record(trained_further)
    losses = [row["train_loss"] for row in found["end_to_end"]["history"][1:]]
    assert losses[-1] < 0.9 * losses[0]
    assert found["end_to_end"]["blocks"] == [["CustomConvNeXt", "CustomResNetMish", "CustomViTHybrid"]]
    assert all(size > 1e6 for size in found["end_to_end"]["step_bytes"].values())
    fitted = {(part["split"], part["rows"]) for part in found["fitted_on"]}
    assert fitted == {("train", "in_sample"), ("val", "held_out")}  # val: temperature and share
    assert ("val", "held_out") in {(part["split"], part["rows"]) for part in found["selected_on"]}
    assert found["crossfit"]["n"] == 28
    assert set(found["guards"]) > {"best_single", "soft_voting", "greedy_selection"}


def test_evaluate_scores_it_and_val_rows_cannot_recommend_it(trained_further):
    ranking = json.loads((trained_further / "metrics_output" / "ensembles" / "ranking.json").read_text())
    assert NAME in {row["name"] for row in ranking["rows"]}
    assert not {row["name"] for row in ranking["rows"]} & set(record(trained_further)["members"])
    workspace = workspace_at(trained_further)
    listed = catalog.read(workspace)
    chosen = {
        name: catalog.is_chosen_on_val(listed, ensembles.load(workspace, name).members)
        for name in (NAME, "soft_voting_ensemble")
    }
    assert chosen == {NAME: True, "soft_voting_ensemble": False}


def test_a_second_run_keeps_it_without_torch_and_another_setting_does_not(trained_further, tmp_path, orchestrator):
    own = Path(shutil.copytree(trained_further, tmp_path / "workspace"))
    kept = run_python("-c", WITHOUT_TORCH, "fusion-train", *QUICK, "--json", "--workspace", str(own))
    assert kept.returncode == 0, kept.stderr
    assert json.loads(kept.stdout)["up_to_date"] == [NAME]
    without = (*QUICK, "--set", "runs.fusion.end_to_end=false", "--json")
    plain = orchestrator("fusion-train", *without, workspace=own)
    assert json.loads(plain.stdout)["built"] == [NAME]
    assert "end_to_end" not in record(own)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("runs.fusion.seeds=1", True),
        ("runs.fusion.end_to_end_epochs=2", False),
        ("runs.fusion.fusion_config.lr=0.01", False),
        ("dataset.batch_size=16", False),
        ("seed=7", False),
    ],
)
def test_it_is_current_for_its_own_settings_alone(trained_further, override, expected):
    overrides = [word for word in QUICK if "=" in word]
    config = load_config(PROJECT / "configs" / "votes.yaml", overrides=[*overrides, override])
    found = catalog.read(workspace_at(trained_further))
    store = Store(config, workspace_at(trained_further), found)
    members = [member for member in found.members.values() if member.source == "trained"]
    record = ensembles.record_of(store.workspace, NAME)
    assert end_to_end.is_current(store, members, NAME, record) is expected


def test_a_network_that_changed_is_trained_again_and_goes_on_after_kills_to_equal_networks(
    trained_further, tmp_path, orchestrator
):
    own = Path(shutil.copytree(trained_further, tmp_path / "workspace"))
    (own / "ensembles" / "models" / NAME / "CustomViTHybrid.pth").write_bytes(b"of somebody else")
    orchestrator("discover", workspace=own)
    command = [
        sys.executable,
        str(PROJECT / "ensemble_orchestrator.py"),
        "fusion-train",
        *QUICK,
        "--workspace",
        str(own),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    watched = own / "ensembles" / "end_to_end" / NAME
    *_, was_killed = run_and_kill_repeatedly(2, command, environment, own, random.Random(3), watched)
    done = run_python(*command[1:], "--json")
    assert done.returncode == 0, done.stderr
    if was_killed:
        assert json.loads(done.stdout)["built"] == [NAME]
        assert "resumed at epoch" in done.stderr
    assert networks(own) == networks(trained_further)
    assert record(own)["end_to_end"] == record(trained_further)["end_to_end"]


def test_predictions_alone_cannot_be_trained(tmp_path):
    workspace = empty_workspace(tmp_path / "workspace")
    take_in(workspace, write(tmp_path / "given"))
    store = opened(workspace)
    with pytest.raises(UserError, match=r"imported predictions, no network .*backbones.exclude=.*end_to_end=false"):
        end_to_end.require_networks(list(store.catalog.members.values()))
