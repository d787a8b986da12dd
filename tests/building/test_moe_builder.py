"""`fusion-train` with a mixture of experts and a cascade by its command line, on really trained networks."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from finished_workspace import at
from given_predictions import CONFIG, take_in, write

from utils.building import build_commands, ensembles
from utils.building.builder_protocol import Session, state_of
from utils.building.moe_builder import SparseBuilder
from utils.combiners.gates import SparseGate
from utils.combiners.routing import routed_members
from utils.core.config_file import load_config
from utils.inference.classifier import WorkspaceClassifier
from utils.moe_methods import CascadeCombiner, MixtureOfExperts
from utils.numeric.metrics import softmax
from utils.predictions import catalog, member_selection, streaming
from utils.predictions.store import Store

pytestmark = pytest.mark.usefixtures("short_searches")

ON = (
    "runs.moe.enable=true",
    "runs.stacking.fallback=false",
    "runs.moe.epochs=6",
    "runs.moe.gating_hidden_dim=8",
    "runs.cascade.enable=true",
)
QUICK = ("--config", "configs/votes.yaml", *(word for value in ON for word in ("--set", value)))


@pytest.fixture(scope="module")
def fused(tmp_path_factory, built, orchestrator) -> Path:
    """A built workspace after `fusion-train`. Shared: read it, never write into it."""
    workspace = Path(shutil.copytree(built, tmp_path_factory.mktemp("fused") / "workspace"))
    done = orchestrator("fusion-train", *QUICK, workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert "runs.moe.num_experts is 5; there are 3 members, all of which are experts" in done.stderr
    return workspace


def record(workspace: Path, name: str) -> dict:
    return json.loads((workspace / "ensembles" / "models" / name / "ensemble.json").read_text())


def opened(base: Path, *more: str) -> tuple[Store, list[catalog.Member]]:
    config = load_config(Path(__file__).resolve().parents[2] / "configs" / "votes.yaml", overrides=[*ON, *more])
    workspace = at(base)
    found = catalog.load(workspace)
    return Store(config, workspace, found), member_selection.select(found, config)


@pytest.mark.parametrize(("name", "others"), [("moe", {"cascade"}), ("cascade", set())])
def test_each_stands_beside_what_runs_more_and_less(fused, name, others):
    found = record(fused, name)
    assert set(found["beside"]) == {"itself", "all_experts", "best_single"} | others
    assert set(found["guards"]) >= {"best_single", "soft_voting", "log_linear_pool"}
    own, dense, single = (found["beside"][key] for key in ("itself", "all_experts", "best_single"))
    assert own["log_loss"] == found["crossfit"]["log_loss"]
    assert own["accuracy_gain"] == 0
    assert dense["accuracy_gain"] == pytest.approx(own["accuracy"] - dense["accuracy"])
    assert (dense["experts"], single["experts"]) == (3, 1)
    assert 1 <= own["experts"] <= 3
    assert found["timed"]["rows"] == 28
    for way in found["beside"].values():
        assert way["latency_ms"] > 0
        low, high = way["log_loss_gain_ci95"]
        assert low <= way["log_loss_gain"] <= high
    latencies = found["depends_on"]["latency_ms"]
    assert dense["expected_latency_ms"] == pytest.approx(sum(latencies.values()))
    assert single["expected_latency_ms"] == pytest.approx(latencies[found["best_single"]])


def by_predicted_class(logits: np.ndarray) -> MixtureOfExperts:
    """A gate that reads the first of three members: classes 0 and 1 need the second too, 2 and 3 the third."""
    picks = np.array([[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], dtype=np.float32)
    eye, zeros = np.eye(4, dtype=np.float32), np.zeros(4, dtype=np.float32)
    return MixtureOfExperts(model=SparseGate(np.arange(3), 0, 1, (eye, picks), (zeros, zeros[:3])))


def by_half(logits: np.ndarray) -> CascadeCombiner:
    """A cascade that half of the rows leave after the first of three members."""
    return CascadeCombiner(chain=np.arange(3), threshold=float(np.median(softmax(logits[0]).max(axis=1))))


@pytest.mark.parametrize("make", [by_predicted_class, by_half])
def test_images_are_answered_by_running_only_the_members_they_need(fused, make, monkeypatch):
    store, members = opened(fused)
    logits = np.stack([store.rows(member, "val").logits for member in members])
    combiner, images = make(logits), store.images("val")
    resident, rows = [], []
    opening, running = streaming.open_network, streaming.stream

    def one_at_a_time(spec, weights=None):
        assert all(reference() is None for reference in resident), "two networks in memory"
        network = opening(spec, weights)
        resident.append(weakref.ref(network))
        return network

    def counted(spec, splits, **options):
        rows.append(len(splits[0].sample_ids))
        return running(spec, splits, **options)

    monkeypatch.setattr(streaming, "open_network", one_at_a_time)
    monkeypatch.setattr(streaming, "stream", counted)
    asking = WorkspaceClassifier(store, "cascade")
    asking.ensemble, asking.members = replace(asking.ensemble, combiner=combiner), tuple(members)
    found = asking.predict_block(images.paths, lambda count: None)
    np.testing.assert_allclose(found.probabilities, combiner.predict_proba(logits), atol=1e-5)
    ran = routed_members(combiner, logits)
    np.testing.assert_array_equal(np.isnan(found.disagreement), ran.sum(axis=0) == 1)
    assert (len(rows), rows[0]) == (3, 28)
    assert 28 < sum(rows) == ran.sum() < 3 * 28


def test_a_second_run_keeps_them_and_a_changed_setting_does_not(fused, orchestrator, tmp_path):
    workspace = Path(shutil.copytree(fused, tmp_path / "workspace"))
    again = orchestrator("fusion-train", *QUICK, "--json", workspace=workspace)
    assert json.loads(again.stdout)["up_to_date"] == ["cascade", "moe"]
    store, members = opened(workspace, "runs.moe.top_k=1")

    def state(name: str) -> str:
        return state_of(Session(store, tuple(members)), name, SparseBuilder(name)).state

    assert (state("cascade"), state("moe")) == ("current", "stale")
    latencies = json.loads(store.workspace.latency.read_text())
    for entry in latencies["networks"].values():
        for measured in entry.values():
            measured["batches"]["batch_1"]["p50"] *= 2
    store.workspace.latency.write_text(json.dumps(latencies))
    assert state("cascade") == "stale"


def test_evaluate_scores_them_and_meta_fuse_takes_them(fused, orchestrator, tmp_path):
    workspace = Path(shutil.copytree(fused, tmp_path / "workspace"))
    inputs = ("runs.meta_fuser.enable=true", "runs.meta_fuser.input_ensembles=[moe,cascade]")
    more = ("runs.meta_fuser.fuser_type=attention", "runs.meta_fuser.mlp_config.epochs=4")
    sets = [word for value in (*inputs, *more) for word in ("--set", value)]
    done = orchestrator("meta-fuse", *QUICK, *sets, "--json", workspace=workspace)
    assert json.loads(done.stdout)["inputs"] == ["cascade", "moe"], done.stderr
    done = orchestrator("evaluate", *QUICK, "--json", workspace=workspace)
    assert {"moe", "cascade", "meta_fuser"} <= {row["name"] for row in json.loads(done.stdout)["rows"]}, done.stderr


def test_one_member_is_too_few_and_this_is_said(own_copy, orchestrator):
    alone = ("--set", "backbones.include=[CustomConvNeXt]")
    done = orchestrator("fusion-train", *QUICK, *alone, workspace=own_copy)
    assert done.returncode == 4
    for name in ("moe", "cascade"):
        assert f"{name}: chooses among members, and there is only CustomConvNeXt" in done.stderr
    assert not (own_copy / "ensembles" / "models" / "moe").exists()


def test_members_known_by_predictions_alone_are_mixed_without_times(tmp_path):
    workspace = at(tmp_path / "workspace")
    workspace.base.mkdir()
    take_in(workspace, write(tmp_path / "given"))
    config = load_config(CONFIG.source, overrides=list(ON))
    done = build_commands.fusion_train(config, workspace)
    assert done.document["built"] == ["cascade", "moe"]
    for name in ("moe", "cascade"):
        found = record(workspace.base, name)
        assert {way["latency_ms"] for way in found["beside"].values()} == {None}
        assert "predictions alone" in found["timed"]["reason"]
        ensemble = ensembles.load(workspace, name)
        own = ensembles.load_crossfit(workspace, name).probabilities
        assert own.shape == (90, 3)
        assert set(ensemble.members) <= set(found["candidates"])


def test_the_sections_are_off_unless_asked_for(built, tmp_path, orchestrator):
    own = shutil.copytree(built, tmp_path / "workspace")
    refused = orchestrator("fusion-train", "--config", "configs/votes.yaml", workspace=own)
    assert refused.returncode == 1
    assert "runs.fusion.enable=true" in refused.stderr
