"""Fusion of members known by their predictions alone: one fixed network's embeddings, and those of fold networks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import PROJECT
from embedded_members import embedded
from given_predictions import empty_workspace, take_in, write

from utils.building import build_commands, ensembles, fusion_builder
from utils.building.ensembles import Crossfit
from utils.building.fitting import OutOfSampleRows
from utils.combiners.weighting import WeightedPool
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.numeric.metrics import log_loss
from utils.predictions.rows import Rows

pytestmark = pytest.mark.usefixtures("short_searches")

OVERRIDES = (
    *("device=cpu", "runs.fusion.enable=true", "runs.fusion.fusion_methods=[concat_mlp]"),
    *("runs.fusion.fusion_config.hidden_dims=[8]", "runs.fusion.fusion_config.epochs=6"),
)


def config(*overrides):
    return load_config(PROJECT / "configs" / "votes.yaml", overrides=[*OVERRIDES, *overrides])


@pytest.fixture
def workspace(tmp_path):
    return empty_workspace(tmp_path / "w")


def source(workspace):
    return json.loads((workspace.ensemble("fusion_concat_mlp") / "ensemble.json").read_text())["train_embeddings"]


def test_embeddings_of_one_fixed_network_are_taken_as_they_are(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=False)))
    build_commands.fusion_train(config("runs.fusion.train_embeddings=aligned"), workspace)
    found = source(workspace)
    assert found["chosen"] == "aligned"
    assert min(facts["agreement"] for facts in found["members"]["aligned"].values()) > 0.99


def test_embeddings_of_fold_networks_are_not_pooled(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=True)))
    with pytest.raises(UserError, match="Embeddings of several fold networks cannot be pooled"):
        build_commands.fusion_train(config("runs.fusion.train_embeddings=aligned"), workspace)
    build_commands.fusion_train(config(), workspace)
    found = source(workspace)
    assert found["chosen"] == "val"
    assert "cannot be pooled" in found["reason"]


def test_members_without_embeddings_are_named(workspace, tmp_path):
    def some(name, stem, given):
        return embedded(per_fold=False)(name, stem, given) if name == "bayes" else given

    take_in(workspace, write(tmp_path / "given", change=some))
    with pytest.raises(UserError, match=r"1 member\(s\) with embeddings.*no embeddings of forest, linear"):
        build_commands.fusion_train(config(), workspace)


def test_heads_on_val_rows_have_cross_fitted_predictions_on_train_rows_too(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=False)))
    build_commands.fusion_train(config("runs.fusion.train_embeddings=val"), workspace)
    found = source(workspace)
    assert (found["asked"], found["chosen"], found["gain_of_val"]) == ("val", "val", None)
    crossfit = ensembles.load_crossfit(workspace, "fusion_concat_mlp")
    assert {split: int((crossfit.split == split).sum()) for split in ("train", "val")} == {"train": 60, "val": 30}
    record = ensembles.record_of(workspace, "fusion_concat_mlp")
    assert {part["split"] for part in record["fitted_on"] if part["rows"] != "in_sample"} == {"val"}
    assert found["train_log_loss"]["val"] == pytest.approx(
        log_loss(crossfit.probabilities[crossfit.split == "train"], crossfit.labels[crossfit.split == "train"])
    )


def test_auto_compares_on_train_rows_and_says_the_interval(workspace, tmp_path):
    take_in(workspace, write(tmp_path / "given", change=embedded(per_fold=False)))
    build_commands.fusion_train(config(), workspace)
    found = source(workspace)
    low, _ = found["gain_of_val"]["ci95"]
    assert found["chosen"] == ("val" if low > 0 else "aligned")
    assert found["reason"].startswith("on train rows, which no selection has used, log-loss ")
    assert found["gain_of_val"]["mean"] == pytest.approx(
        found["train_log_loss"]["aligned"] - found["train_log_loss"]["val"]
    )


def crossfit_of(train: float, val: float) -> Crossfit:
    """Predictions whose true class has these probabilities, on average, on rows of train and val."""
    spread = np.random.default_rng(int(1000 * train)).uniform(-0.05, 0.05, 60)
    of_truth = np.repeat([train, val], [40, 20]) + spread
    probabilities = np.stack([of_truth, 1 - of_truth], axis=1).astype(np.float32)
    rows = np.arange(60)
    return Crossfit(
        probabilities, np.zeros(60, dtype=int), rows.astype(str), np.repeat(["train", "val"], [40, 20]), rows % 5
    )


@pytest.mark.parametrize(("train", "favoured"), [(0.6, False), (0.705, False), (0.9, True)])
def test_val_rows_do_not_choose_the_heads_that_are_fitted_on_them(train, favoured):
    # On val rows, which may have chosen the networks' epochs, heads fitted on them look perfect in each case.
    gain = fusion_builder.gain_of_val(crossfit_of(train, 0.94), crossfit_of(0.7, 0.5), None)
    assert gain.favours_val == favoured


def test_the_copy_that_answers_for_a_fold_has_read_none_of_its_labels():
    rng = np.random.default_rng(3)
    labels, split = rng.integers(0, 3, 80), np.repeat(["train", "val"], [40, 40])
    logits = (rng.normal(size=(2, 80, 3)) + 2 * np.eye(3)[labels]).astype(np.float32)
    names, ids = ("a", "b"), np.arange(80).astype(str)

    def probabilities(labels):
        rows = Rows(names, ("x", "y", "z"), split, ids, labels, logits, np.ones(80, dtype=bool))
        judged = OutOfSampleRows(rows, np.arange(80) % 5)
        return fusion_builder.crossfit_on(WeightedPool(kind="log_linear"), judged.of_split("val"), judged)

    changed = np.where(np.arange(80) % 5 == 1, (labels + 1) % 3, labels)
    before, after = probabilities(labels), probabilities(changed)
    inside = np.arange(80) % 5 == 1
    np.testing.assert_array_equal(before[inside], after[inside])
    assert (before[~inside] != after[~inside]).all(axis=1).any()
