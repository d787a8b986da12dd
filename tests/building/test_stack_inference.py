"""`stack` with full networks and with the means of fold networks, by its command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from stored_predictions import CONFIG, workspace_at

from utils.building import ensembles
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.predictions import catalog, fold_networks
from utils.predictions.store import Store

pytestmark = pytest.mark.usefixtures("short_searches")

DEMO = (
    *("--config", "configs/votes.yaml", "--set", "runs.stacking.enable=true"),
    *("--set", "runs.stacking.meta_learners=[lr]"),
)
FOLDS = (*DEMO, "--set", "runs.stacking.inference_members=folds")


def test_what_was_fitted_for_fold_networks_is_answered_by_them(own_copy, orchestrator):
    done = orchestrator("stack", *FOLDS, "--json", workspace=own_copy)
    assert done.returncode == 0, done.stderr
    choice = json.loads(done.stdout)["inference_members"]["stacking_lr"]
    assert (choice["asked"], choice["chosen"]) == ("folds", "folds")
    assert set(choice["val_log_loss"]) == {"full", "folds"}
    for kinds in choice["shift"].values():
        assert {kind: found["n"] for kind, found in kinds.items()} == {"out_of_fold": 224, "full": 28, "folds": 28}
    workspace = workspace_at(own_copy)
    store = Store(load_config(CONFIG), workspace, catalog.read(workspace))
    ensemble = ensembles.load(workspace, "stacking_lr")
    members = [store.catalog.members[name] for name in ensemble.members]
    with np.load(workspace.ensemble("stacking_lr") / "crossfit.npz") as arrays:
        assert (arrays["split"] == "val").sum() == 28

    scored = orchestrator("evaluate", *FOLDS, "--model-name", "stacking_lr", workspace=own_copy)
    assert scored.returncode == 0, scored.stderr
    with np.load(workspace.ensemble("stacking_lr") / "predictions_test.npz") as arrays:
        found = dict(arrays)
    of_folds, of_full = (fold_networks.aligned(store, members, "test", kind) for kind in ("folds", "full"))
    rows = np.isin(of_folds.sample_ids, found["sample_ids"])
    np.testing.assert_allclose(found["probabilities"], ensembles.predict(ensemble, of_folds)[rows], atol=1e-6)
    with pytest.raises(UserError, match="needs its members' folds networks, got full"):
        ensembles.predict(ensemble, of_full)

    inputs = ("--set", "runs.meta_fuser.input_ensembles=[soft_voting,logit_averaging,stacking_lr]")
    quick = ("--set", "runs.meta_fuser.fuser_type=attention", "--set", "runs.meta_fuser.mlp_config.epochs=3")
    fused = orchestrator(
        "meta-fuse", *FOLDS, *inputs, *quick, "--set", "runs.meta_fuser.enable=true", workspace=own_copy
    )
    assert fused.returncode == 4, fused.stderr
    assert "stacking_lr: its members' fold networks answer" in fused.stderr

    (own_copy / "checkpoints" / "CustomConvNeXt_fold1.pth").unlink()
    orchestrator("discover", *DEMO, workspace=own_copy)
    refused = orchestrator("stack", *FOLDS, workspace=own_copy)
    assert refused.returncode == 1
    assert "not every fold network is there of CustomConvNeXt" in refused.stderr
    automatic = orchestrator("stack", *DEMO, "--json", workspace=own_copy)
    assert automatic.returncode == 0, automatic.stderr
    choice = json.loads(automatic.stdout)["inference_members"]["stacking_lr"]
    assert choice["chosen"] == "full"
    assert choice["reason"] == "no complete set of fold networks: CustomConvNeXt"
