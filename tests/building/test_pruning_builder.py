"""The section `pruning` on a really trained workspace: built, kept, repeated, stale, and left out with the reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_python
from finished_workspace import CONFIG, at

from utils.building import latency, pruning_builder
from utils.building.build_commands import build_ensemble
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.operations import inventory

pytestmark = pytest.mark.usefixtures("short_searches")

METHODS = ("greedy_forward", "greedy_backward", "diversity_max", "clustering")
PRUNED = tuple(f"pruned_{method}" for method in METHODS)
ON = ("pruning.enable=true", "device=cpu", "pruning.cost_budget.max_latency_ms=null")  # a busy machine is slow


@pytest.fixture(scope="module")
def built_once(built, tmp_path_factory):
    """The built workspace after a build of all methods. Shared: read it, never write into it."""
    base = Path(shutil.copytree(built, tmp_path_factory.mktemp("pruned") / "workspace"))
    build(at(base))
    return base


@pytest.fixture
def pruned(built_once, tmp_path):
    return at(Path(shutil.copytree(built_once, tmp_path / "workspace")))


@pytest.fixture
def workspace(own_copy):
    return at(own_copy)


def build(workspace, *overrides, **options):
    return build_ensemble(load_config(CONFIG, overrides=(*ON, *overrides)), workspace, **options)


def states(workspace, *overrides):
    found = inventory.take(load_config(CONFIG, overrides=(*ON, *overrides)), workspace).ensembles
    return {name: found[name].state for name in PRUNED}


def record(workspace, name=PRUNED[0]):
    return json.loads((workspace.ensemble(name) / "ensemble.json").read_text())


def test_every_method_is_built_and_then_kept(workspace):
    assert set(states(workspace).values()) == {"missing"}
    workspace.latency.unlink()  # of the evaluation, which measures batches as well
    result = build(workspace)
    assert result.failures == []
    assert result.document["built"] == sorted(PRUNED)
    networks = json.loads(workspace.latency.read_text())["networks"]
    entries = [entry for of_network in networks.values() for entry in of_network.values()]
    assert all(entry["batches"].keys() == {"batch_1"} for entry in entries)
    measured = {entry["member"]: entry["batches"]["batch_1"]["p50"] for entry in entries}
    for name in PRUNED:
        found = record(workspace, name)
        assert found["depends_on"]["latency_ms"] == measured
        assert found["depends_on"]["device"] == "cpu"
        assert found["latency_ms"] == pytest.approx(sum(measured[member] for member in found["members"]))
        assert sorted(found["path"]) == found["members"]
        assert set(found["path"]) | set(found["dropped"]) == set(found["candidates"])
        assert f"    keeps {len(found['members'])} of 3: {', '.join(found['path'])}, " in result.text
    assert set(states(workspace).values()) == {"current"}
    again = build(workspace)
    assert again.document["built"] == []
    assert set(PRUNED) <= set(again.document["up_to_date"])


def test_what_is_built_is_found_without_torch_and_force_gives_the_same_bytes(own_copy, orchestrator):
    options = ("--config", str(CONFIG), *(word for value in ON for word in ("--set", value)))
    done = orchestrator("build-ensemble", *options, workspace=own_copy)
    assert done.returncode == 0, done.stderr
    files = [path for name in PRUNED for path in (own_copy / "ensembles" / "models" / name).iterdir()]
    before = {path: path.read_bytes() for path in [*files, own_copy / "ensembles" / "latency.json"]}
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "codes = [o.main([command, *sys.argv[1:]]) for command in ('build-ensemble', 'status')]\n"
        "assert codes == [0, 0], codes\n"
        "assert not {'torch', 'sklearn', 'scipy', 'PIL'} & set(sys.modules)"
    )
    kept = run_python("-c", code, *options, "--workspace", str(own_copy))
    assert kept.returncode == 0, kept.stderr
    assert kept.stdout.count(" up to date ") == 7
    forced = orchestrator("build-ensemble", "--force", *options, workspace=own_copy)
    assert forced.returncode == 0, forced.stderr
    assert "measured" not in forced.stderr
    assert before == {path: path.read_bytes() for path in before}


def test_other_latencies_settings_or_devices_make_it_stale(pruned):
    assert set(states(pruned, "pruning.pick=knee").values()) == {"stale"}
    assert set(states(pruned, "device=auto").values()) == {"stale"}
    assert states(pruned, "pruning.methods=[clustering]")["pruned_greedy_forward"] == "current"
    text = pruned.latency.read_text()
    slowest = max(record(pruned)["depends_on"]["latency_ms"].values())
    pruned.latency.write_text(text.replace(f'"p50": {slowest}', '"p50": 99.0'))
    assert set(states(pruned).values()) == {"stale"}
    assert build(pruned).document["built"] == sorted(PRUNED)
    assert max(record(pruned)["depends_on"]["latency_ms"].values()) == 99
    pruned.latency.unlink()
    assert set(states(pruned).values()) == {"stale"}


def test_a_budget_that_nothing_fits_is_a_failure_that_names_the_cheapest_and_the_others_go_on(pruned, orchestrator):
    sizes = record(pruned)["depends_on"]["size_mb"]
    smallest = min(sizes, key=sizes.get)
    result = build(pruned, "pruning.cost_budget.max_size_mb=0.1", force=True)
    assert [failure.partition(":")[0] for failure in result.failures] == list(PRUNED)
    assert result.failures[0] == (
        f"pruned_greedy_forward: no member is within the budget; the cheapest possible is {smallest} alone: "
        f"{sizes[smallest]:.4g} MB > 0.1 MB (pruning.cost_budget.max_size_mb). Raise the limit, or set it to null"
    )
    assert "soft_voting_ensemble" in result.document["built"]
    overrides = (*ON, "pruning.cost_budget.max_latency_ms=0.0001")
    options = [word for value in overrides for word in ("--set", value)]
    done = orchestrator("build-ensemble", "--config", str(CONFIG), *options, workspace=pruned.base)
    assert done.returncode == 4
    assert "left out: pruned_clustering: no member is within the budget; the cheapest possible is Custom" in done.stderr
    assert " ms > 0.0001 ms (pruning.cost_budget.max_latency_ms)" in done.stderr


def test_that_nothing_fits_is_known_the_next_time_without_torch_and_forgotten_when_something_does(own_copy, workspace):
    tight = ("pruning.methods=[clustering]", "pruning.cost_budget.max_size_mb=0.1")
    first = build(workspace, *tight)
    assert [failure.partition(":")[0] for failure in first.failures] == ["pruned_clustering"]
    assert re.search(r"pruned_clustering +left out$", first.text, re.MULTILINE)
    options = [word for value in (*ON, *tight) for word in ("--set", value)]
    code = (
        "import sys, ensemble_orchestrator as o\n"
        "code = o.main(['build-ensemble', *sys.argv[1:]])\n"
        "print(o.main(['status', *sys.argv[1:]]), *sorted({'torch', 'scipy', 'PIL'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    again = run_python("-c", code, "--config", str(CONFIG), "--workspace", str(own_copy), *options)
    assert again.returncode == 4
    assert again.stdout.splitlines()[-1] == "0"  # the code of status, and no library
    assert f"left out: {first.failures[0]}\n" in again.stderr
    assert re.search(r"pruned_clustering +left out, up to date$", again.stdout, re.MULTILINE)
    assert "pruned_clustering" not in inventory.take(load_config(CONFIG, overrides=(*ON, *tight)), workspace).ensembles
    assert build(workspace, *tight, force=True).failures == first.failures
    assert build(workspace, "pruning.methods=[clustering]").document["built"] == ["pruned_clustering"]
    assert json.loads(workspace.left_out.read_text()) == {}
    assert build(workspace, *tight).failures == first.failures


def test_a_budget_decides_who_is_kept(pruned):
    measured = record(pruned)["depends_on"]["size_mb"]
    smallest = min(measured, key=measured.get)
    result = build(pruned, f"pruning.cost_budget.max_size_mb={measured[smallest] + 1e-6}")
    assert result.failures == []
    for name in PRUNED:
        found = record(pruned, name)
        assert found["members"] == [smallest]
        assert all(reason.startswith("over the budget: ") for reason in found["dropped"].values())


def test_pick_on_the_command_line_takes_the_place_of_the_key(workspace):
    one = "pruning.methods=[greedy_forward]"
    build(workspace, one, pick="fastest")
    assert record(workspace)["pick"] == "fastest"
    found = inventory.take(load_config(CONFIG, overrides=(*ON, one, "pruning.pick=fastest")), workspace)
    assert found.ensembles[PRUNED[0]].state == "current"
    build(workspace, one, "pruning.pick=fastest", pick="knee")
    assert record(workspace)["pick"] == "knee"


def test_pick_where_pruning_is_off_names_the_line_to_add(workspace):
    with pytest.raises(UserError, match=r"pruning is disabled; run again with --set pruning\.enable=true"):
        build_ensemble(load_config(CONFIG), workspace, pick="knee")


def test_a_member_whose_costs_are_unknown_is_not_bound_and_that_is_said_once(workspace, heard, monkeypatch):
    original = latency.measure

    def without_one(store, members, **options):
        found = original(store, members, **options)
        del found["CustomViTHybrid"]
        return found

    monkeypatch.setattr(pruning_builder.latency, "measure", without_one)
    result = build(workspace, "pruning.cost_budget.max_latency_ms=0.0001")
    assert result.failures == []
    assert record(workspace)["members"] == ["CustomViTHybrid"]
    assert record(workspace)["depends_on"]["latency_ms"]["CustomViTHybrid"] is None
    assert record(workspace)["latency_ms"] is None
    messages = [message for message in heard.messages if "not known of" in message]
    assert messages == ["pruning.cost_budget.max_latency_ms: not known of CustomViTHybrid, which it does not bind"]


def test_a_target_beyond_the_members_is_said(workspace, heard):
    build(workspace, "pruning.methods=[greedy_forward]")
    assert "pruning.target_size is 7; there are 3 members to keep" in heard.messages


def test_rows_are_those_that_weights_are_fitted_on(workspace):
    build(workspace, "pruning.methods=[greedy_forward]")
    assert [part["rows"] for part in record(workspace)["fitted_on"]] == ["in_sample", "oof", "held_out"]
    build(workspace, "pruning.methods=[greedy_forward]", "runs.score_ensemble.fit_rows=val")
    assert [part["rows"] for part in record(workspace)["fitted_on"]] == ["in_sample", "held_out"]


def test_one_member_makes_an_ensemble_of_one(workspace):
    result = build(workspace, "backbones.include=[CustomConvNeXt]")
    assert result.failures == []
    for name in PRUNED:
        assert record(workspace, name)["members"] == ["CustomConvNeXt"]


def test_pruned_ensembles_are_evaluated_with_their_weights(pruned, orchestrator):
    overrides = [word for override in ON for word in ("--set", override)]
    done = orchestrator("evaluate", "--config", str(CONFIG), *overrides, workspace=pruned.base)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(pruned.ensemble_metrics("pruned_clustering", "test").read_text())
    kept = record(pruned, "pruned_clustering")["members"]
    assert metrics["members"] == kept
    assert {name for name, weight in metrics["weights"].items() if weight} == set(kept)
