"""Where jobs run: in this process, and on the workers of a Ray cluster, one of which is killed."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT, needs_ray, run_python
from engine_jobs import (
    killed_in_a_worker,
    slow_with_process,
    started_at,
    trained,
    waits_in_a_worker,
    waits_to_be_alone,
    with_jobs_inside,
    with_process,
)
from given_predictions import write

from utils import commands
from utils.combiners.gate_learners import AttentionLearner
from utils.core import engines, worker_processes
from utils.core.errors import ConfigError, UserError
from utils.numeric import nested_cv, setting_paths

THREE = "runs.stacking.meta_learners=[lr,xgb,mlp]"
QUICK = ("runs.stacking.mlp_config.epochs=6", "runs.stacking.xgb_config.n_estimators=10")


# jobs for workers, which import this file --------------------------------------------------------------------------
def doubled(item):
    return 2 * item


def weighted(values, weights, item):
    return float((values * weights).sum()) + item


def refused(item):
    raise UserError(f"job {item}: refused")


def refused_later(item):
    return item if item < 2 else refused(item)


def warned(item):
    logging.getLogger("disease_pipeline").warning("job %d has something to say", item)
    return item


def killed_once(folder, item):
    """Job 2 ends its worker by SIGKILL, as running out of memory would, until it has been done once."""
    mark = Path(folder) / f"{item}.{os.getpid()}"
    mark.touch()
    if item == 2 and len(list(Path(folder).glob("2.*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def killed_always(item):
    os.kill(os.getpid(), signal.SIGKILL)


# in this process -----------------------------------------------------------------------------------------------------
def test_jobs_run_here_one_after_the_other_unless_told_otherwise():
    seen = []
    found = engines.Local().map(lambda item: seen.append(threading.get_ident()) or item, [3, 1, 2])
    assert next(found) == 3
    assert len(seen) == 1, "the second job waits until the first result is taken"
    assert list(found) == [1, 2]
    assert set(seen) == {threading.get_ident()}


def test_jobs_side_by_side_keep_their_order():
    def slow_first(shared, item):
        time.sleep(0.05 if item == 0 else 0)
        return shared + item, threading.get_ident()

    found = list(engines.Local().map(slow_first, range(4), shared=(10,), n_threads=2, threads_per_job=1))
    assert [value for value, _ in found] == [10, 11, 12, 13]
    assert threading.get_ident() not in {thread for _, thread in found}


@pytest.fixture(params=[worker_processes.FORK, worker_processes.SPAWN])
def start_method(request, monkeypatch):
    """Both ways to start workers."""
    monkeypatch.setattr(worker_processes, "start_method", lambda: request.param)
    return request.param


@pytest.fixture
def at_once(start_method, monkeypatch):
    """Every set of jobs seems to be worth the start of workers."""
    monkeypatch.setitem(worker_processes.START_SECONDS, start_method, -1)


def test_jobs_that_take_long_run_in_processes_and_keep_their_order(start_method):
    values = np.arange(400_000)
    found = list(engines.Local().map(slow_with_process, range(6), shared=(values,), n_processes=2, are_long=True))
    assert [value for value, _ in found] == [values.sum() + item for item in range(6)]
    processes = {process for _, process in found}
    assert os.getpid() in processes, "this process takes a part"
    assert len(processes) == 2


def test_jobs_that_do_not_take_long_stay_here():
    found = list(engines.Local().map(with_process, range(5), shared=(np.zeros(1),), n_processes=2))
    assert {process for _, process in found} == {os.getpid()}


def test_jobs_that_turn_out_to_take_long_are_shared():
    found = list(engines.Local().map(slow_with_process, range(6), shared=(np.zeros(1),), n_processes=2))
    processes = [process for _, process in found]
    assert processes[0] == os.getpid(), "the first one shows here how long it takes"
    assert len(set(processes)) == 2


def test_libraries_that_are_loaded_later_are_limited_too():
    code = """
import json
import numpy, threadpoolctl
from utils.core.worker_processes import limited
with limited(1):
    before = len(threadpoolctl.threadpool_info())
import scipy.linalg
with limited(1):
    print(json.dumps([before, [library["num_threads"] for library in threadpoolctl.threadpool_info()]]))
"""
    done = run_python("-c", code, environment={"OMP_NUM_THREADS": "2"})
    before, threads = json.loads(done.stdout)
    assert len(threads) > before > 0
    assert set(threads) == {1}


def test_jobs_beside_others_start_no_processes_and_share_the_cores(start_method):
    found = list(engines.Local().map(with_jobs_inside, range(4), n_processes=2, are_long=True))
    threads = max(1, engines.cores() // 2)
    assert {is_one for is_one, _ in found} == {True}
    assert found[1][1] == threads  # that of this process; one that ends late may be alone
    assert not worker_processes.is_within_job()
    assert worker_processes.n_side_by_side() == 1


@pytest.mark.parametrize("long", [0, 1], ids=["in a worker", "in this process"])
def test_the_last_job_has_the_cores_of_those_that_have_ended(start_method, monkeypatch, tmp_path, long):
    monkeypatch.setattr(engines, "cores", lambda: 4)
    shared = (long, tmp_path / "began")
    found = list(engines.Local().map(waits_to_be_alone, range(2), shared=shared, n_processes=2, are_long=True))
    before, after, threads = found[long]
    is_spawned = start_method == worker_processes.SPAWN and long == 0  # late, and with the cores of this machine
    assert after == 1
    assert before == 2 or is_spawned
    assert threads == 4 or is_spawned


def test_processes_take_items_by_the_start_order_and_results_are_in_order(start_method):
    order = [3, 1, 2, 0]
    found = list(engines.Local().map(started_at, range(4), n_processes=2, are_long=True, start_order=order))
    assert [item for item, _, _ in found] == [0, 1, 2, 3]
    here, in_worker = [], []
    for item, process, _ in sorted(found, key=lambda job: job[2]):
        (here if process == os.getpid() else in_worker).append(item)
    assert in_worker[0] == 3
    for items in (here, in_worker):
        assert items == [item for item in order if item in items]


def test_what_a_process_warns_of_and_raises_arrives_here(at_once, heard):
    assert list(engines.Local().map(warned, range(4), n_processes=2)) == [0, 1, 2, 3]
    assert [f"job {item} has something to say" in heard.text for item in range(4)] == [True] * 4
    with pytest.raises(UserError, match=r"job [23]: refused"):
        list(engines.Local().map(refused_later, range(4), n_processes=2))


def test_jobs_go_on_here_when_a_process_dies(tmp_path, at_once, heard):
    shared = (str(tmp_path), os.getpid())
    found = engines.Local().map(killed_in_a_worker, range(4), shared=shared, description="fits", n_processes=2)
    assert list(found) == [0, 1, 2, 3]
    assert "fits: a worker process died" in heard.text
    assert sorted(path.name for path in tmp_path.glob(f"*.{os.getpid()}")) == [f"{n}.{os.getpid()}" for n in range(4)]


def test_an_error_ends_jobs_that_are_running(tmp_path, start_method, caplog):
    shared = (str(tmp_path), os.getpid())
    with pytest.raises(UserError, match="refused here"):
        list(engines.Local().map(waits_in_a_worker, range(3), shared=shared, n_processes=2, are_long=True))
    (worker,) = (int(path.name) for path in tmp_path.iterdir())  # without what it was writing
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert [record.getMessage() for record in caplog.records if record.name == "concurrent.futures"] == []


def test_workers_train_after_their_parent_has_trained_on_several_threads(start_method):
    import torch

    with setting_paths.torch_threads(2):
        torch.randn(2000, 2000) @ torch.randn(2000, 2000)
        trained(0)
    with setting_paths.torch_threads(1):
        expected = [trained(item) for item in range(4)]
        found = list(engines.Local().map(trained, range(4), n_processes=2, are_long=True))
    assert [weights.tobytes() for weights in found] == [weights.tobytes() for weights in expected]


def test_fits_beside_each_other_give_the_bytes_of_one_after_the_other(at_once):
    rng = np.random.default_rng(0)
    labels, folds = rng.integers(0, 3, 60), np.arange(60) % 3
    logits = rng.normal(size=(2, 60, 3)).astype(np.float32) + 2 * np.eye(3, dtype=np.float32)[labels]
    learner = AttentionLearner(8, 4, 0.01, 0)
    here = nested_cv.cross_validate(learner, logits, labels, folds, n_jobs=1)
    beside = nested_cv.cross_validate(learner, logits, labels, folds, n_jobs=2)
    for name in ("setting_losses", "nested_crossfit"):
        assert getattr(here, name).tobytes() == getattr(beside, name).tobytes(), name
    assert here.held_out.probabilities.tobytes() == beside.held_out.probabilities.tobytes()


def test_one_engine_at_a_time():
    assert engines.current().name == "local"
    names = []

    def fail():
        with engines.using("ray", "auto"):
            names.append(engines.current().name)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert names == ["ray"]
    assert engines.current().name == "local"


def test_what_ray_prints_does_not_reach_stdout(capsys):
    with engines.using("ray"):
        print("a worker died")
    print("a result")
    assert capsys.readouterr() == ("a result\n", "a worker died\n")


def test_the_command_line_knows_the_engines():
    assert commands.COMMON_OPTIONS["--engine"]["choices"] == (engines.Local.name, engines.Ray.name)


def test_an_address_belongs_to_ray(tmp_path):
    message = "--address somewhere: requires --engine ray, but the engine is local"
    with pytest.raises(ConfigError, match=message), engines.using("local", "somewhere"):
        pass
    script = str(PROJECT / "ensemble_orchestrator.py")
    done = run_python(script, "status", "--workspace", str(tmp_path), "--address", "somewhere")
    assert done.returncode == 2
    assert "requires --engine ray" in done.stderr


def test_a_missing_ray_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with engines.using("ray"), pytest.raises(UserError, match=r"ray cannot be imported.*pip install 'ray>=2.40,<3'"):
        list(engines.current().map(doubled, [1]))


def test_without_jobs_nothing_is_started(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with engines.using("ray"):
        assert list(engines.current().map(doubled, [])) == []


def test_a_worker_sees_its_gpu_as_the_first():
    assert engines.Local().worker_device("cuda:1") == "cuda:1"
    assert engines.Ray().worker_device("cuda:1") == "cuda:0"
    assert engines.Ray().worker_device("cpu") == "cpu"


# on workers ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster():
    """Two workers, started here; the module's jobs are imported from this folder."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(PROJECT / "tests" / "support"), str(PROJECT / "tests")]
    )
    with pytest.MonkeyPatch.context() as patch, engines.using("ray"):
        patch.setattr(engines, "cores", lambda: 2)
        yield engines.current()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@needs_ray
@pytest.mark.filterwarnings("ignore")
class TestOnRay:
    def test_results_come_in_the_order_of_the_jobs(self, cluster):
        assert list(cluster.map(doubled, range(20), threads_per_job=1)) == list(range(0, 40, 2))

    def test_what_is_shared_arrives_as_it_is(self, cluster):
        rng = np.random.default_rng(0)
        values, weights = rng.normal(size=(2, 300, 50))
        here = list(engines.Local().map(weighted, [1, 2], shared=(values, weights), threads_per_job=1))
        assert list(cluster.map(weighted, [1, 2], shared=(values, weights), threads_per_job=1)) == here

    def test_a_killed_worker_is_replaced_and_its_job_run_again(self, cluster, tmp_path):
        found = list(cluster.map(killed_once, range(6), shared=(str(tmp_path),), threads_per_job=1))
        assert found == list(range(6))
        starts = [path.name.split(".")[0] for path in tmp_path.iterdir()]
        assert starts.count("2") == 2, "by two processes, the first of which is dead"

    def test_a_job_that_kills_every_worker_is_named(self, cluster, monkeypatch):
        monkeypatch.setattr(engines, "RETRIES", 1)
        with pytest.raises(UserError, match="heavy fits: its worker died 2 times"):
            list(cluster.map(killed_always, [1], description="heavy fits", threads_per_job=1))

    def test_an_error_of_a_job_is_raised_here(self, cluster):
        with pytest.raises(UserError, match=r"^job 7: refused$"):
            list(cluster.map(refused, [7], threads_per_job=1))

    def test_warnings_and_progress_are_heard_here(self, cluster, caplog):
        logger = logging.getLogger("disease_pipeline")
        logger.addHandler(caplog.handler)
        try:
            with caplog.at_level(logging.INFO, logger="disease_pipeline"):
                assert list(cluster.map(warned, [1, 2], description="some jobs", threads_per_job=1)) == [1, 2]
        finally:
            logger.removeHandler(caplog.handler)
        assert "job 2 has something to say" in caplog.messages
        assert any(message.startswith("[2/2] some jobs") for message in caplog.messages)

    def test_a_gpu_that_nobody_has_is_named(self, cluster):
        with pytest.raises(UserError, match="the cluster has no GPU"):
            list(cluster.map(doubled, [1], gpu=0.5))


def fitted(folder: Path) -> dict[str, bytes]:
    """What two engines must agree on: predictions and everything fitted, without what is measured."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".npy", ".npz", ".safetensors")]
    files += sorted(folder.rglob("booster.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
@needs_ray
def test_stacking_on_ray_gives_the_bytes_of_here(tmp_path, orchestrator):
    first = tmp_path / "here"
    first.mkdir()
    options = ("--config", "configs/votes.yaml", "--set", "runs.stacking.enable=true", "--set", THREE)
    options += tuple(word for value in QUICK for word in ("--set", value))
    done = orchestrator("import-predictions", "--from", str(write(tmp_path / "given")), workspace=first)
    assert done.returncode == 0, done.stderr
    second = shutil.copytree(first, tmp_path / "there")
    for workspace, engine in ((first, "local"), (second, "ray")):
        done = orchestrator("stack", *options, "--engine", engine, "--json", workspace=workspace, apart=True)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["built"]) == 3
    assert "fits of" in done.stderr
    found = fitted(first / "ensembles" / "models")
    assert len(found) > 6
    assert fitted(second / "ensembles" / "models") == found


@pytest.mark.slow
@needs_ray
def test_streaming_on_ray_gives_the_bytes_of_here(tmp_path, trained, orchestrator):
    found = []
    for engine in ("local", "ray"):
        workspace = shutil.copytree(trained, tmp_path / engine)
        for command in ("discover", "build-ensemble"):
            words = (command, "--config", "configs/votes.yaml", "--device", "cpu", "--engine", engine)
            done = orchestrator(*words, workspace=workspace, apart=True)
            assert done.returncode == 0, done.stderr
        found.append(fitted(workspace / "ensembles"))
    assert any(name.endswith("logits.npy") for name in found[0])
    assert found[1] == found[0]
