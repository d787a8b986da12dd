"""`pipeline` killed at random moments and typed again: what is there at the end is what an undisturbed run leaves.

Four kills; `make crash` does forty (KILLS=40, SEED=...). The kills are seeded; a moment is a number of files that have
appeared, so that it means the same on a slow machine, and a short time after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, run_python
from equality import differences, unfinished

from utils.core import caches

KILLS, SEED = int(os.environ.get("KILLS", "4")), int(os.environ.get("SEED", "0"))
LINE = (
    *(str(PROJECT / "ensemble_orchestrator.py"), "pipeline", "--quiet", "--device", "cpu"),
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
def undisturbed(synthetic, tmp_path_factory) -> Path:
    """What a run leaves that nobody disturbs. The others take over the latencies that it measured."""
    folder = fresh(synthetic, tmp_path_factory.mktemp("undisturbed") / "w")
    done = run_python(*LINE, "--workspace", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def written(workspace: Path) -> int:
    """Files of ours that are there, unfinished ones too."""
    return sum(1 for name in ("ensembles", "metrics_output/ensembles") for _ in caches.walk_files(workspace / name))


def run_and_kill(workspace: Path, files: int, delay: float) -> int:
    """Start the pipeline and kill it with all its processes; its exit code."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    command = [sys.executable, *LINE, "--workspace", str(workspace)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
    while written(workspace) < files and process.poll() is None:
        time.sleep(0.003)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_pipeline_goes_on_to_the_same_end(number, undisturbed, synthetic, tmp_path):
    rng = random.Random(f"{SEED} {number}")
    most = written(undisturbed)
    files, delay = rng.randint(1, most), rng.uniform(0, 0.3)
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    code = run_and_kill(workspace, files, delay)
    done = run_python(*LINE, "--workspace", str(workspace))
    assert done.returncode == 0, done.stderr
    assert differences(workspace, undisturbed) == [], f"killed at file {files} of {most}, {delay:.3f} s later"
    assert unfinished(workspace) == []
    assert not (workspace / "ensembles" / ".lock").exists()
    print(
        f"\nkill {number + 1} of {KILLS}, seed {SEED}: at file {files} of {most}, ended with {code}; equal at the end"
    )


def test_files_from_tomorrow_do_no_harm(undisturbed, synthetic, tmp_path):
    """A clock that went back: everything that is there looks younger than what is made of it."""
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    later = time.time() + 86400
    for path in workspace.rglob("*"):
        os.utime(path, (later, later))
    done = run_python(*LINE, "--workspace", str(workspace))
    assert done.returncode == 0, done.stderr
    assert differences(workspace, undisturbed) == []


@pytest.mark.slow  # `make crash` runs it; tests/commands/test_cli.py stops a single command
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pipeline_that_is_stopped_says_how_to_go_on_and_ends_alike(sent, code, undisturbed, synthetic, tmp_path):
    workspace = fresh(synthetic, tmp_path / "w", undisturbed / "ensembles" / "latency.json")
    # A background job of a shell ignores SIGINT, and so would its children.
    code_of_child = (
        "import signal, runpy, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code_of_child, *LINE, "--workspace", str(workspace)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while written(workspace) < 10 and process.poll() is None:
        time.sleep(0.003)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert unfinished(workspace) == []
    assert not (workspace / "ensembles" / ".lock").exists()
    if sent == signal.SIGINT:
        assert "no file is incomplete, and the same command continues the work" in errors
    assert run_python(*LINE, "--workspace", str(workspace)).returncode == 0
    assert differences(workspace, undisturbed) == []


def test_of_two_pipelines_one_is_refused_by_name_of_the_other(undisturbed, tmp_path):
    workspace = Path(shutil.copytree(undisturbed, tmp_path / "w"))
    from utils.core import locks

    with locks.writer_lock(workspace / "ensembles" / ".lock", "pipeline"):
        done = run_python(*LINE, "--workspace", str(workspace))
    assert done.returncode == 1
    assert f"being written by `pipeline`, process {os.getpid()} on host" in done.stderr
    lock = workspace / "ensembles" / ".lock"
    owner = json.loads(json.dumps(vars(locks.this_process("stack"))))
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.write_text(json.dumps(owner | {"pid": dead.pid}))
    assert run_python(*LINE, "--workspace", str(workspace)).returncode == 0  # a dead owner's lock is taken over
    assert not lock.exists()
