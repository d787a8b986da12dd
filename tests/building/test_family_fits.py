"""Fits of several ensembles side by side in processes: equal bytes, and an error of one that stops no other."""

from __future__ import annotations

import os

import pytest
from conftest import PROJECT
from equality import differences
from given_predictions import empty_workspace, take_in, write

from utils.building import build_commands, family_fits, stacking_builder
from utils.combiners.fit_demand import FitDemand
from utils.combiners.logistic import LogisticLearner
from utils.core import engines, worker_processes
from utils.core.config_file import load_config
from utils.core.errors import UserError

pytestmark = pytest.mark.usefixtures("short_searches")

CONFIG = load_config(
    PROJECT / "configs" / "votes.yaml",
    overrides=[
        "runs.stacking.enable=true",
        "runs.stacking.meta_learners=[lr,xgb,mlp]",
        "runs.stacking.mlp_config.epochs=2",
        "runs.stacking.xgb_config.n_estimators=5",
        "runs.score_ensemble.methods=[soft_voting,weighted,greedy_selection]",
        "pruning.enable=true",
        "pruning.methods=[greedy_forward,greedy_backward]",
    ],
)


@pytest.fixture
def on_cores(monkeypatch):
    """Sets the number of cores; with several, every set of fits seems to be worth the start of workers."""

    def set_cores(number):
        monkeypatch.setattr(engines, "cores", lambda: number)
        monkeypatch.setattr(family_fits, "LONG_FIT", 0)
        monkeypatch.setitem(worker_processes.START_SECONDS, worker_processes.FORK, -1)

    return set_cores


def built(folder, forced=()):
    """A workspace with stackers, votes and prunings, some of which are built once more, alone."""
    workspace = empty_workspace(folder)
    take_in(workspace, write(folder.parent / f"given-{folder.name}"))
    build_commands.build_ensemble(CONFIG, workspace)
    stacking_builder.stack(CONFIG, workspace)
    for name in forced:
        (workspace.ensemble(name) / "ensemble.json").unlink()
        stacking_builder.stack(CONFIG, workspace)
    return workspace


def test_the_bytes_depend_neither_on_cores_nor_on_what_is_built_together(tmp_path, on_cores):
    on_cores(1)
    one = built(tmp_path / "one")
    on_cores(3)
    other = built(tmp_path / "other", forced=["stacking_lr", "stacking_mlp"])
    names = {path.parent.name for path in one.models.glob("*/ensemble.json")}
    assert {"stacking_lr", "stacking_xgb", "stacking_mlp", "weighted_ensemble", "pruned_greedy_forward"} <= names
    assert differences(one.models, other.models) == []


def process_or_refusal(value, item):
    if item == 1:
        raise UserError("item 1: refused")
    return value + item, os.getpid()


def test_a_refusal_is_a_result(on_cores):
    on_cores(2)
    found = list(
        family_fits.fit_each(process_or_refusal, range(4), shared=(10,), description="x", n_logits=1, are_nested=True)
    )
    assert [type(each) for each in found] == [tuple, UserError, tuple, tuple]
    assert [value for value, _ in (found[0], *found[2:])] == [10, 12, 13]
    assert str(found[1]) == "item 1: refused"


@pytest.mark.parametrize(("memory", "n_bytes", "expected"), [(1600, 0, 2), (320, 0, 1), (1600, 700, 1)])
def test_fits_that_run_at_a_time_have_half_of_the_memory(on_cores, monkeypatch, memory, n_bytes, expected):
    on_cores(3)
    monkeypatch.setattr(family_fits, "physical_memory", lambda: memory)
    numbers = []
    monkeypatch.setattr(engines.Local, "map", lambda *_, n_processes, **__: numbers.append(n_processes) or iter(()))
    sizes = {"n_logits": 5, "n_bytes": n_bytes}
    family_fits.fit_each(process_or_refusal, range(4), shared=(10,), description="x", are_nested=True, **sizes)
    assert numbers == [expected]


def test_a_stacker_that_would_take_all_memory_is_refused_and_the_others_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr(LogisticLearner, "demand", lambda *_: FitDemand(1e15, 0.0))
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given"))
    result = stacking_builder.stack(CONFIG, workspace)
    assert sorted(result.document["built"]) == ["stacking_mlp", "stacking_xgb"]
    (failure,) = result.failures
    assert failure.startswith("stacking_lr: with ")
    assert "a fit needs about 1000000 GB of memory" in failure
    assert failure.endswith("Leave it out: --set runs.stacking.meta_learners=[xgb,mlp]")
