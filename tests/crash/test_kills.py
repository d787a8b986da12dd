"""`pipeline` killed at random moments and typed again: what is there at the end is what an undisturbed run leaves.

Four kills, one after another in one workspace; `make crash` does forty-eight, each in a workspace of its own (KILLS=48,
SEED=...). The kills are seeded; a moment is a number of files that have appeared, so that it means the same on a slow
machine, and a short time after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from equality import differences, unfinished
from forked_commands import KILLED, Ended, Running
from in_process import run

from utils.core import caches, locks

KILLS, SEED = int(os.environ.get("KILLS", "4")), int(os.environ.get("SEED", "0"))
KILLS_OF_ONE = 1 if "KILLS" in os.environ else KILLS
LIMIT = 600.0  # seconds, on however busy a machine
LINE = (
    *("pipeline", "--quiet", "--device", "cpu"),
    *("--set", "dataset.num_workers=0", "--set", "backbones.include=[CustomConvNeXt,CustomResNetMish]"),
    *("--set", "runs.score_ensemble.methods=[soft_voting,weighted]", "--set", "pruning.methods=[greedy_forward]"),
    *("--set", "runs.stacking.meta_learners=[lr]", "--set", "runs.fusion.enable=false"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_lr]", "--set", "runs.meta_fuser.fuser_type=mlp"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=2", "--set", "distillation.enable=false"),
    *("--set", "exports.enable=false"),
)


def fresh(synthetic: Path, folder: Path, latency: Path | None = None) -> Path:
    """A trained workspace, with latencies that were measured before."""
    shutil.copytree(synthetic, folder)
    if latency is not None:
        (folder / "ensembles").mkdir()
        shutil.copy(latency, folder / "ensembles" / "latency.json")
    return folder


@pytest.fixture(scope="module")
def undisturbed(synthetic, few_folds, tmp_path_factory) -> Path:
    """What a run leaves that nobody disturbs. The others take over the latencies that it measured."""
    folder = fresh(synthetic, tmp_path_factory.mktemp("undisturbed") / "w")
    done = run(*LINE, workspace=folder)  # in this process, whose forks then need not import what it has imported
    assert done.code == 0, done.stderr
    return folder


def written(workspace: Path) -> int:
    """Files of ours that are there, unfinished ones too."""
    return sum(1 for name in ("ensembles", "metrics_output/ensembles") for _ in caches.walk_files(workspace / name))


def run_to_its_end(workspace: Path) -> Ended:
    """The pipeline in a process of its own."""
    return Running(LINE, workspace).wait(LIMIT)


def run_and_kill(workspace: Path, files: int, delay: float) -> int:
    """Start the pipeline and kill it with all its processes; its exit code."""
    running = Running(LINE, workspace)
    while written(workspace) < files and running.is_running():
        time.sleep(0.003)
    time.sleep(delay)
    if running.is_running():
        running.kill(signal.SIGKILL)
    ended = running.wait(LIMIT)
    assert ended.code in (0, KILLED), ended.stderr
    return ended.code


@pytest.mark.parametrize("number", range(KILLS // KILLS_OF_ONE))
def test_a_killed_pipeline_goes_on_to_the_same_end(number, undisturbed, synthetic, tmp_path):
    rng = random.Random(f"{SEED} {number}")
    most = written(undisturbed)
    moments = [(files, rng.uniform(0, 0.3)) for files in sorted(rng.randint(1, most) for _ in range(KILLS_OF_ONE))]
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    codes = [run_and_kill(workspace, *moment) for moment in moments]
    shown = ", ".join(f"{files} + {delay:.3f} s" for files, delay in moments)
    done = run_to_its_end(workspace)
    assert done.code == 0, done.stderr
    assert differences(workspace, undisturbed) == [], f"killed at files {shown} of {most}"
    assert unfinished(workspace) == []
    assert not (workspace / "ensembles" / ".lock").exists()
    print(f"\nworkspace {number + 1}, seed {SEED}: at files {shown} of {most}, ended with {codes}; equal at the end")


def test_files_from_tomorrow_do_no_harm(undisturbed, synthetic, tmp_path):
    """A clock that went back: everything that is there looks younger than what is made of it."""
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    later = time.time() + 86400
    for path in workspace.rglob("*"):
        os.utime(path, (later, later))
    done = run_to_its_end(workspace)
    assert done.code == 0, done.stderr
    assert differences(workspace, undisturbed) == []


@pytest.mark.slow  # `make crash` runs it; tests/commands/test_cli.py stops a single command
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pipeline_that_is_stopped_says_how_to_go_on_and_ends_alike(sent, code, undisturbed, synthetic, tmp_path):
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    running = Running(LINE, workspace)
    while written(workspace) < 10 and running.is_running():
        time.sleep(0.003)
    running.kill(sent)
    ended = running.wait(LIMIT)
    assert ended.code == code, ended.stderr
    assert unfinished(workspace) == []
    assert not (workspace / "ensembles" / ".lock").exists()
    if sent == signal.SIGINT:
        assert "no file is incomplete, and the same command continues the work" in ended.stderr
    assert run_to_its_end(workspace).code == 0
    assert differences(workspace, undisturbed) == []


def test_of_two_pipelines_one_is_refused_by_name_of_the_other(undisturbed, tmp_path):
    workspace = Path(shutil.copytree(undisturbed, tmp_path / "w"))
    lock = workspace / "ensembles" / ".lock"
    with locks.writer_lock(lock, "pipeline"):
        done = run_to_its_end(workspace)
    assert done.code == 1
    assert f"being written by `pipeline`, process {os.getpid()} on host" in done.stderr
    owner = json.loads(json.dumps(vars(locks.this_process("stack"))))
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.write_text(json.dumps(owner | {"pid": dead.pid}))
    assert run_to_its_end(workspace).code == 0  # a dead owner's lock is taken over
    assert not lock.exists()
