"""What must not leak: in-sample predictions into a stacker, and labels into cross-fitted predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from short_fits import few_fits
from stored_predictions import CONFIG, workspace_at

from utils.building.ensembles import COMBINERS
from utils.combiners.protocol import MemberFacts, fit_crossfitted, fit_nested
from utils.core.config import validate
from utils.core.config_file import load_config
from utils.meta_methods import FUSERS
from utils.numeric.metrics import accuracy, log_loss
from utils.predictions import catalog, extraction
from utils.predictions.rows import MemberOutputs
from utils.predictions.store import Store

MEMBER = "CustomConvNeXt"
QUICK = (
    *("--set", "runs.stacking.enable=true"),
    "--set",
    "runs.stacking.meta_learners=[lr]",
    "--config",
    "configs/votes.yaml",
)

M, N, C = 3, 160, 4
FACTS = MemberFacts(("a", "b", "c"), np.full(M, 0.7), np.full(M, np.nan), np.full(M, np.nan))
DRAWS = 2


def test_memorised_train_rows_passed_off_as_out_of_fold_reach_no_stacker(own_copy, orchestrator):
    workspace = workspace_at(own_copy)
    member = catalog.read(workspace).members[MEMBER]
    store = Store(load_config(CONFIG, overrides=["device=cpu"]), workspace, catalog.read(workspace))
    extraction.ensure(store, [member], ("train",))
    in_sample = store.rows(member, "train")
    place = {str(sample_id): row for row, sample_id in enumerate(in_sample.sample_ids)}
    with np.load(workspace.base_oof(MEMBER)) as found:
        arrays = dict(found)
    rows = [place[sample_id] for sample_id in arrays["sample_ids"].tolist()]
    np.savez(workspace.base_oof(MEMBER), **(arrays | {"logits": np.array(in_sample.logits)[rows]}))
    for path in workspace.checkpoints.glob(f"{MEMBER}_fold*.pth"):
        path.unlink()  # whoever passes them off has no fold networks to show
    assert (
        orchestrator("discover", "--config", "configs/votes.yaml", workspace=own_copy).returncode == 0
    )  # runs nothing
    with few_fits():
        refused = orchestrator("stack", *QUICK, "--strict", workspace=own_copy)
        done = orchestrator("stack", *QUICK, workspace=own_copy)
    assert refused.returncode == 1
    assert "were not checked yet: discover --verify runs first" in refused.stderr
    assert f"No K-fold results for backbone {MEMBER}" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert "were not checked" not in done.stderr
    assert f"{MEMBER}: out-of-fold predictions refused: 224 of 224" in done.stderr
    record = json.loads((own_copy / "ensembles" / "models" / "stacking_lr" / "ensemble.json").read_text())
    assert record["members"] == ["CustomResNetMish", "CustomViTHybrid"]


def recipe(method: str, fuser_type: str):
    """Unfitted, without what would draw it to the uniform probabilities and so make the labels matter less."""
    shape = {"hidden_dims": [8], "epochs": 6, "lr": 0.01}
    runs = {
        "score_ensemble": {"temperature": "off"},
        "stacking": {"mlp_config": shape, "xgb_config": {"n_estimators": 10}, "fallback": False},
        "fusion": {"fusion_config": shape},
        "meta_fuser": {
            "mlp_config": shape,
            "fuser_type": fuser_type,
            "input_ensembles": ["soft_voting", "stacking_xgb"],
        },
    }
    config = validate({"runs": runs}, source=Path("of the test"))
    return COMBINERS[method].configured(config, FACTS)


EVERY = [(method, "xgb") for method in sorted(COMBINERS)] + [
    ("meta_fuser", kind) for kind in sorted(FUSERS) if kind != "xgb"
]


READ_LABELS_OF_ALL_FOLDS = [("meta_fuser", kind) for kind in sorted(FUSERS) if kind != "convex"]
"""Their inputs on other rows are by copies that have read the labels of the held-out fold (Wolpert 1992)."""


def outputs_for(unfitted, logits, rng):
    """The logits, with embeddings that tell what they tell where the combiner reads them."""
    if not unfitted.reads_embeddings:
        return logits
    return MemberOutputs(logits, tuple(logits @ rng.normal(size=(C, 6)).astype(np.float32)))


@pytest.mark.usefixtures("small_forests")
@pytest.mark.parametrize(("method", "fuser_type"), [entry for entry in EVERY if entry not in READ_LABELS_OF_ALL_FOLDS])
def test_cross_fitted_predictions_do_not_depend_on_the_labels_of_their_fold(method, fuser_type):
    """Other labels in one fold leave what is fitted without it as it is, and change what is fitted with it."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(N) % C)
    folds = rng.permutation(np.repeat(np.arange(5), (N // 2, *[N // 8] * 4)))  # fold 0 outweighs the others
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    logits[0, np.arange(N), labels] += 3
    inside = folds == 0
    others = labels.copy()
    others[inside] = logits[2, inside].argmax(axis=1)  # by these the last member is the best, by `labels` the first
    unfitted = recipe(method, fuser_type)
    outputs = outputs_for(unfitted, logits, rng)
    first, second = (fit_nested(recipe(method, fuser_type), outputs, given, folds) for given in (labels, others))
    np.testing.assert_array_equal(first.crossfit[inside], second.crossfit[inside])
    if first.inner:  # a convex fuser has no copies without two folds
        np.testing.assert_array_equal(first.inner[0], second.inner[0])
    if unfitted.learns:
        assert np.abs(first.crossfit[~inside] - second.crossfit[~inside]).max() > 0.01


@pytest.mark.parametrize(("method", "fuser_type"), READ_LABELS_OF_ALL_FOLDS)
def test_fusers_of_shuffled_labels_are_no_better_than_chance(method, fuser_type):
    """Over several draws, so that little of a leak hides in chance."""
    hits, losses = [], []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        labels = np.arange(N) % C
        logits = rng.normal(size=(M, N, C)).astype(np.float32)
        logits[:, np.arange(N), labels] += 2  # members that know the true labels, which the shuffled ones are not
        shuffled = rng.permutation(labels)
        unfitted = recipe(method, fuser_type)
        unseen = fit_crossfitted(unfitted, outputs_for(unfitted, logits, rng), shuffled, rng.integers(0, 5, N))
        hits.append(accuracy(unseen, shuffled))
        losses.append(log_loss(unseen, shuffled))
    assert np.mean(hits) < 1 / C + 3 * np.sqrt(1 / C * (1 - 1 / C) / (N * DRAWS))
    assert np.mean(losses) > np.log(C) - 0.02


def test_shuffled_labels_show_a_leak_where_there_is_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(M, N, C)).astype(np.float32)
    shuffled = rng.permutation(np.arange(N) % C)
    seen = recipe("stacking_xgb", "xgb").fit(logits, shuffled, rng.integers(0, 5, N)).predict_proba(logits)
    assert accuracy(seen, shuffled) > 1 / C + 3 * np.sqrt(1 / C * (1 - 1 / C) / (N * DRAWS))
