"""`stack` and `meta-fuse` by their command lines, on really trained networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("short_searches")

QUICK = (
    *("--set", "runs.stacking.enable=true", "--set", "runs.stacking.mlp_config.epochs=6"),
    *("--set", "runs.stacking.mlp_config.hidden_dims=[16]", "--set", "runs.stacking.meta_learners=[lr,mlp]"),
    *("--set", "runs.meta_fuser.enable=true", "--set", "runs.meta_fuser.fuser_type=attention"),
    *("--set", "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,stacking_lr]"),
    *("--set", "runs.meta_fuser.mlp_config.epochs=6", "--config", "configs/votes.yaml"),
)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory, built, orchestrator) -> Path:
    """A built workspace after `stack` and `meta-fuse`. Shared: read it, never write into it."""
    workspace = Path(shutil.copytree(built, tmp_path_factory.mktemp("stacked") / "workspace"))
    for command in ("stack", "meta-fuse"):
        done = orchestrator(command, *QUICK, workspace=workspace)
        assert done.returncode == 0, done.stderr
    return workspace


def record(workspace: Path, name: str) -> dict:
    return json.loads((workspace / "ensembles" / "models" / name / "ensemble.json").read_text())


def crossfit(workspace: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(workspace / "ensembles" / "models" / name / "crossfit.npz"))


@pytest.mark.parametrize("name", ["stacking_lr", "stacking_mlp", "meta_fuser"])
def test_each_is_saved_with_honest_rows_two_scores_and_a_verdict(stacked, name):
    found = record(stacked, name)
    rows = {(part["split"], part["rows"]) for part in found["fitted_on"]}
    assert rows == {("train", "in_sample"), ("train", "oof"), ("val", "held_out")}
    assert found["crossfit"]["n"] == sum(part["n"] for part in found["fitted_on"] if part["rows"] != "in_sample")
    assert set(found["guards"]) == {
        *("best_single", "soft_voting", "greedy_selection", "convex_weights", "log_linear_pool"),
    }
    assert found["verdict"]
    assert np.isfinite(crossfit(stacked, name)["probabilities"]).all()


def test_the_fuser_shares_the_folds_of_its_inputs(stacked):
    one, other = crossfit(stacked, "stacking_lr"), crossfit(stacked, "meta_fuser")
    np.testing.assert_array_equal(one["fold"], other["fold"])
    np.testing.assert_array_equal(one["sample_ids"], other["sample_ids"])
    assert record(stacked, "meta_fuser")["inputs"] == ["logit_averaging", "soft_voting", "stacking_lr"]


def test_a_second_run_keeps_them_and_a_changed_input_does_not(stacked, orchestrator, tmp_path):
    workspace = Path(shutil.copytree(stacked, tmp_path / "workspace"))
    again = orchestrator("stack", *QUICK, "--json", workspace=workspace)
    assert json.loads(again.stdout)["built"] == []
    fused = orchestrator("meta-fuse", *QUICK, "--json", workspace=workspace)
    assert json.loads(fused.stdout)["built"] == []
    changed = (*QUICK, "--set", "runs.stacking.fallback=false")
    again = orchestrator("stack", *changed, "--json", workspace=workspace)
    assert json.loads(again.stdout)["built"] == ["stacking_lr", "stacking_mlp"]
    fused = orchestrator("meta-fuse", *changed, "--json", workspace=workspace)
    assert json.loads(fused.stdout)["built"] == ["meta_fuser"]


def test_evaluate_scores_them_and_refuses_rows_they_were_fitted_on(stacked, orchestrator, tmp_path):
    workspace = Path(shutil.copytree(stacked, tmp_path / "workspace"))
    done = orchestrator("evaluate", *QUICK, "--json", workspace=workspace)
    assert done.returncode == 0, done.stderr
    names = {row["name"] for row in json.loads(done.stdout)["rows"]}
    assert {"stacking_lr", "stacking_mlp", "meta_fuser"} <= names
    for name in ("stacking_lr", "meta_fuser"):
        refused = orchestrator("evaluate", *QUICK, "--split", "val", "--model-name", name, workspace=workspace)
        assert refused.returncode == 3
        assert name in refused.stderr


def test_a_member_without_out_of_fold_predictions_is_left_out_or_refused(own_copy, orchestrator):
    (own_copy / "kfold_results" / "CustomViTHybrid_oof_predictions.npz").unlink()
    orchestrator("discover", workspace=own_copy)
    strict = orchestrator("stack", *QUICK, "--strict", workspace=own_copy)
    assert strict.returncode == 1
    for words in ("No K-fold results for backbone CustomViTHybrid", "--stages kfold", "backbones.exclude"):
        assert words in strict.stderr
    done = orchestrator("stack", *QUICK, "--set", "runs.stacking.meta_learners=[lr]", workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "No K-fold results for backbone CustomViTHybrid" in done.stderr
    assert record(own_copy, "stacking_lr")["members"] == ["CustomConvNeXt", "CustomResNetMish"]


def test_without_any_out_of_fold_predictions_val_is_all_there_is(own_copy, orchestrator):
    for path in (own_copy / "kfold_results").glob("*_oof_predictions.npz"):
        path.unlink()
    orchestrator("discover", workspace=own_copy)
    done = orchestrator("stack", *QUICK, "--set", "runs.stacking.meta_learners=[lr]", workspace=own_copy)
    assert done.returncode == 0, done.stderr
    assert "val alone" in done.stderr
    assert "--stages kfold" in done.stderr
    assert set(crossfit(own_copy, "stacking_lr")["split"].tolist()) == {"val"}
    refused = orchestrator("stack", *QUICK, "--set", "runs.stacking.fit_rows=oof", workspace=own_copy)
    assert refused.returncode == 3
    assert "runs.stacking.fit_rows" in refused.stderr


def test_missing_inputs_are_built_on_the_spot_or_named(own_copy, orchestrator):
    shutil.rmtree(own_copy / "ensembles" / "models")
    inputs = ("--set", "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,stacking_xgb]")
    done = orchestrator("meta-fuse", *QUICK, *inputs, workspace=own_copy)
    assert done.returncode == 4, done.stderr
    assert "stacking_xgb: not built" in done.stderr
    assert "ensemble_orchestrator.py stack" in done.stderr
    assert record(own_copy, "meta_fuser")["inputs"] == ["logit_averaging", "soft_voting"]
    alone = ("--set", "runs.meta_fuser.input_ensembles=[soft_voting,stacking_xbg]")
    refused = orchestrator("meta-fuse", *QUICK, *alone, workspace=own_copy)
    assert refused.returncode == 1
    assert "did you mean 'stacking_xgb'" in refused.stderr
