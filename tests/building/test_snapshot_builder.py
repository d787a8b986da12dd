"""The section that trains snapshots: what it saves, what it knows again, what a kill and a failure leave."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_python

from utils.building import build_commands, ensembles, snapshot_builder
from utils.building.builder_protocol import Session
from utils.building.snapshot_builder import SnapshotBuilder
from utils.core import subprocesses
from utils.core.config_file import load_config
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.numeric.metrics import softmax
from utils.operations import inventory
from utils.predictions import catalog

NAME = "CustomResNetMish"
PLACES = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment_models", "image_cache", "logs")
ASKED = (
    *(f"backbones.include=[{NAME}]", "runs.score_ensemble.methods=[soft_voting]", "device=cpu"),
    *("runs.snapshot_ensemble.enable=true", "runs.snapshot_ensemble.n_snapshots=2"),
    "runs.snapshot_ensemble.epochs_per_cycle=1",
)
COMMAND = ("--config", "configs/votes.yaml", *(word for value in ASKED for word in ("--set", value)))


def config(*overrides: str):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[*ASKED, *overrides])


def at(base: Path, output: Path | None = None) -> Workspace:
    places = [base / name for name in PLACES]
    if output:
        places[-2:] = [output / name for name in PLACES[-2:]]
    return Workspace(base, *places, output=output)


@pytest.fixture(scope="module")
def discovered(trained, tmp_path_factory) -> Path:
    """A copy of the trained workspace with its catalog. Shared: read it, never write into it."""
    base = tmp_path_factory.mktemp("discovered")
    shutil.copytree(trained, base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("Data", "CustomViTHybrid*"))
    discover.discover(config(), at(base))
    return base


@pytest.fixture(scope="module")
def made(discovered, tmp_path_factory, orchestrator):
    """After a build with two snapshots of one cycle each, and what the command printed. Shared: read it."""
    base = tmp_path_factory.mktemp("made")
    shutil.copytree(discovered, base, dirs_exist_ok=True)
    discover.discover(config(), at(base))  # digests are remembered by place
    done = orchestrator("build-ensemble", *COMMAND, "--json", workspace=base)
    assert done.returncode == 0, done.stderr
    return base, json.loads(done.stdout), done.stderr


@pytest.fixture
def copy(made, tmp_path) -> Workspace:
    """A copy to change, whose files are known."""
    workspace = at(Path(shutil.copytree(made[0], tmp_path / "w")))
    discover.discover(config(), workspace)
    return workspace


def digests(workspace: Workspace) -> dict[str, str]:
    """Snapshots and what is saved of their mean."""
    files = [
        *workspace.derived_checkpoints.glob("*_snapshot*.pth"),
        *(workspace.ensemble(snapshot_builder.NAME) / name for name in ("crossfit.npz", "provenance.npz")),
    ]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def snapshots_of(workspace: Workspace) -> list[str]:
    return [name for name in catalog.read(workspace).members if name.startswith(f"{NAME}_snapshot")]


def test_the_ensemble_is_the_plain_mean_of_the_networks_that_the_cycles_left(made):
    base, document, output = made
    workspace = at(base)
    assert document["built"] == ["snapshot_ensemble", "soft_voting_ensemble"]
    ensemble = ensembles.load(workspace, "snapshot_ensemble")
    assert ensemble.members == (f"{NAME}_snapshot4", f"{NAME}_snapshot5")  # 1 to 3 are late epochs of the final network
    arrays = [np.load(workspace.predictions(member, "val") / "logits.npy") for member in ensemble.members]
    ids = np.load(workspace.predictions(ensemble.members[0], "val") / "sample_ids.npy")
    unseen = ensembles.load_crossfit(workspace, "snapshot_ensemble")
    order = [ids.tolist().index(sample_id) for sample_id in unseen.sample_ids.tolist()]
    assert set(unseen.split.tolist()) == {"val"}
    np.testing.assert_allclose(unseen.probabilities, softmax(np.stack(arrays)[:, order]).mean(axis=0), atol=1e-6)
    assert not np.allclose(arrays[0], arrays[1])
    assert ensembles.load(workspace, "soft_voting_ensemble").members == (NAME,)
    assert "No K-fold results" not in output


def test_snapshots_are_derived_members_and_the_catalog_stays_current(made, orchestrator):
    base, _, _ = made
    found = catalog.read(at(base))
    for member in (found.members[f"{NAME}_snapshot{number}"] for number in (4, 5)):
        assert (member.source, member.parents, member.architecture, member.img_size) == ("derived", (NAME,), NAME, 32)
        assert member.recorded_accuracy is not None
    assert catalog.stale_files(at(base), found) == []
    assert inventory.take(config(), at(base)).catalog.state == "current"


def test_a_network_of_a_cycle_is_no_stage_of_the_backbone_s_own_training(made, copy):
    """It shares nothing with that one; neither the build nor a later discovery lists it there."""
    for workspace in (at(made[0]), copy):
        stages = [entry["stage"] for entry in catalog.read(workspace).members[NAME].checkpoints]
        assert stages[:2] == ["final", "finetune_best"]
        assert stages[-3:] == ["snapshot1", "snapshot2", "snapshot3"]


def test_how_long_it_takes_is_said_before_and_while_it_trains(made):
    output = made[2].splitlines()
    forecast = next(line for line in output if "training 2 snapshot(s) of 1 backbone(s), 1 epochs each: about " in line)
    finished = next(line for line in output if f"[1/1] {NAME} snapshots: val accuracies " in line)
    assert output.index(forecast) < output.index(finished)
    assert finished.endswith("about 0 s left")


def test_what_is_there_is_known_without_torch_and_without_a_training(made, tmp_path):
    base, _, _ = made
    code = (
        "import sys, subprocess, ensemble_orchestrator as o\n"
        "subprocess.Popen = None\n"
        "for command in ('build-ensemble', 'status'):\n"
        "    assert o.main([command, *sys.argv[1:]]) == 0\n"
        "    print('end of', command)\n"
        "assert not {'torch', 'sklearn', 'PIL', 'timm'} & set(sys.modules)"
    )
    done = run_python("-c", code, *COMMAND, "--workspace", str(base))
    assert done.returncode == 0, done.stderr
    of_build, of_status = done.stdout.split("end of build-ensemble")
    assert "snapshot_ensemble                    up to date" in of_build
    assert "current" in of_status


def test_force_builds_again_from_finished_trainings(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.checkpoints.glob("*.pth")}
    (copy.snapshots).unlink()
    result = build_commands.build_ensemble(config(), copy, force=True)
    assert "snapshot_ensemble" in result.document["built"]
    assert {path: path.stat().st_mtime_ns for path in copy.checkpoints.glob("*.pth")} == before


def test_another_number_of_cycles_is_other_work_and_the_old_snapshots_leave(copy):
    one = "runs.snapshot_ensemble.n_snapshots=1"
    state = inventory.take(config(one), copy).ensembles["snapshot_ensemble"]
    assert str(state) == "stale: its backbones, images or settings have changed since the build, or a snapshot is gone"
    assert build_commands.build_ensemble(config(one), copy).failures == []
    assert ensembles.load(copy, "snapshot_ensemble").members == (f"{NAME}_snapshot4",)
    assert snapshots_of(copy) == [f"{NAME}_snapshot{number}" for number in (1, 2, 3, 4)]
    found = inventory.take(config(one), copy)
    assert (found.catalog.state, found.ensembles["snapshot_ensemble"].state) == ("current", "current")


def test_a_snapshot_that_is_gone_is_made_again(copy):
    before = digests(copy)
    copy.checkpoint(NAME, "snapshot5").unlink()
    assert inventory.take(config(), copy).ensembles["snapshot_ensemble"].state == "stale"
    assert build_commands.build_ensemble(config(), copy).failures == []
    assert digests(copy) == before


def start(workspace: Workspace, *options: str) -> subprocess.Popen:
    """Begin a build that saves its progress after every epoch."""
    command = [sys.executable, str(PROJECT / "ensemble_orchestrator.py"), "build-ensemble", *COMMAND, *options]
    command += ["--workspace", str(workspace.base)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    environment["DBT_PROGRESS_SECONDS"] = "0"
    return subprocess.Popen(command, env=environment, cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_training_ends_with_the_build_that_asked_for_it(discovered, tmp_path):
    workspace = at(Path(shutil.copytree(discovered, tmp_path / "w")))
    discover.discover(config(), workspace)
    process = start(workspace, "--set", "runs.snapshot_ensemble.epochs_per_cycle=100000")
    wait_for((workspace.checkpoints / ".progress" / f"{NAME}_snapshots.pth").exists, process)
    trainers = children(process.pid)
    assert len(trainers) >= 2
    os.kill(process.pid, signal.SIGKILL)  # it alone: nobody tells the training
    process.wait()
    wait_for(lambda: not any(map(runs, trainers)))


def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(made, discovered, tmp_path, orchestrator):
    workspace = at(Path(shutil.copytree(discovered, tmp_path / "w")))
    discover.discover(config(), workspace)
    process = start(workspace)
    wait_for(workspace.checkpoint(NAME, "snapshot4").exists, process)
    trainers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(map(runs, trainers)))
    done = orchestrator("build-ensemble", *COMMAND, workspace=workspace.base)
    assert done.returncode == 0, done.stderr
    assert digests(workspace) == digests(at(made[0]))


def children(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [inner for child in found for inner in children(child)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_with_an_output_of_its_own_nothing_is_written_into_the_workspace(discovered, tmp_path):
    base = Path(shutil.copytree(discovered, tmp_path / "base"))
    (base / ".split_dataset.partialabc").mkdir()  # somebody splits
    before = {path: path.stat().st_mtime_ns for path in sorted(base.rglob("*"))}
    workspace = at(base, tmp_path / "out")
    discover.discover(config(), workspace)
    assert build_commands.build_ensemble(config(), workspace).failures == []
    assert {path: path.stat().st_mtime_ns for path in sorted(base.rglob("*"))} == before
    members = catalog.read(workspace).members
    path = tmp_path / "out" / "checkpoints" / f"{NAME}_snapshot4.pth"
    assert members[f"{NAME}_snapshot4"].checkpoints[0]["path"] == str(path)
    extra = torch.load(path, weights_only=True)["extra"]
    assert (extra["model_size"], extra["augment"]) == ("tiny", "no_flip")  # as the network in the workspace
    assert inventory.take(config(), workspace).ensembles["snapshot_ensemble"].state == "current"
    discover.discover(config(), workspace)  # which finds it there by itself
    assert catalog.read(workspace).members[f"{NAME}_snapshot4"] == members[f"{NAME}_snapshot4"]


def test_a_training_that_fails_is_named_and_the_mean_is_that_of_the_others(copy, monkeypatch):
    files = [f"{NAME}_snapshot{number}.pth" for number in (4, 5)]
    summary = {
        "failed": {"CustomConvNeXt snapshots": "its process died"},
        "results": {NAME: {"snapshots": {"files": files}}, "CustomConvNeXt": {}},
    }
    monkeypatch.setattr(subprocesses, "run_program", lambda *_: (4, json.dumps(summary), []))
    copy.snapshots.unlink()
    result = build_commands.build_ensemble(
        config("backbones.include=[CustomResNetMish, CustomConvNeXt]"), copy, force=True
    )
    assert result.failures == ["runs.snapshot_ensemble: CustomConvNeXt snapshots: its process died"]
    assert "; 2 snapshots of 1 backbone(s)" in result.text
    assert ensembles.load(copy, "snapshot_ensemble").members == (f"{NAME}_snapshot4", f"{NAME}_snapshot5")
    assert not copy.snapshots.exists()  # so that the next build tries again


def test_a_training_that_cannot_begin_is_told_with_its_last_words(copy, monkeypatch):
    copy.snapshots.unlink()
    monkeypatch.setattr(subprocesses, "run_program", lambda *_: (2, "", ["DBT_SEED: found 'x'"]))
    failure = build_commands.build_ensemble(config(), copy).failures[0]
    assert "training ended with code 2: DBT_SEED: found 'x'. To see more: " in failure
    assert f"--stages snapshots --backbones {NAME} --snapshots 2 --epochs-per-cycle 1" in failure


def test_what_a_program_says_is_passed_on_at_its_level(heard):
    code = (
        "import sys\n"
        "for line in ('12:00:00 | WARNING | careful', 'bare', '12:00:01 | INFO | 80 %s done'): "
        "print(line, file=sys.stderr)\n"
        "print('{}')\n"
        "sys.exit(4)"
    )
    found = subprocesses.run_program([sys.executable, "-c", code], dict(os.environ))
    assert found == (4, "{}\n", ["careful", "bare", "80 %s done"])
    output = [(record.levelname, record.getMessage()) for record in heard.records]
    assert ("WARNING", "careful") in output
    assert ("INFO", "80 %s done") in output


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", "0,1", ""),
        ("auto", "3", "3"),
        ("cuda", None, None),
        ("cuda:1", None, "1"),
        ("cuda:1", "5,7", "7"),
        ("cuda:2", "5,7", "2"),
    ],
)
def test_the_training_gets_the_device_of_the_configuration(device, visible, expected, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    store = SimpleNamespace(workspace=at(tmp_path), config=config(f"device={device}"))
    assert snapshot_builder._environment(store).get("CUDA_VISIBLE_DEVICES") == expected


def member(name: str, **changes: str) -> SimpleNamespace:
    return SimpleNamespace(**({"name": name, "architecture": name, "source": "trained", "views": ()} | changes))


def test_only_networks_of_base_back_under_their_own_names_are_trained_anew(tmp_path):
    kinds = [
        member("CustomConvNeXt"),
        member("CustomConvNeXt_snapshot4", architecture="CustomConvNeXt", source="derived"),
        member("leaf", architecture="timm:resnet18"),
        member("copy", architecture="CustomConvNeXt"),
        member("theirs", source="imported"),
    ]
    assert [found.name for found in snapshot_builder.parents_of(kinds)] == ["CustomConvNeXt"]
    store = SimpleNamespace(catalog=SimpleNamespace(members={}))
    problems = SnapshotBuilder().problems(Session(store, tuple(kinds[1:])))
    assert problems == ["runs.snapshot_ensemble: none of the selected members is a network that BASE-BACK can train"]
