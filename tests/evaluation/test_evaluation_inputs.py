"""What an evaluation reads, of predictions made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from given_predictions import CONFIG, NAMES, empty_workspace, opened, take_in, write

from utils.building import build_commands
from utils.core.errors import UserError
from utils.evaluation import evaluation_inputs, scoring
from utils.evaluation.evaluation_inputs import EvaluationSettings, UncertaintyOptions
from utils.predictions import member_selection


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Three imported members and three votes; read it only."""
    workspace = empty_workspace(tmp_path_factory.mktemp("inputs") / "w")
    take_in(workspace, write(workspace.base / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    return workspace


def gathered(workspace, split="test", model_name=None):
    store = opened(workspace)
    saved = evaluation_inputs.read_ensembles(workspace)
    ensembles = {name: entry.ensemble for name, entry in saved.items()}
    selected = member_selection.select(store.catalog, CONFIG)
    members = scoring.members_to_score(store.catalog, selected, ensembles)
    settings = EvaluationSettings(split, model_name, False, "f1_macro", CONFIG.seed, UncertaintyOptions())
    return evaluation_inputs.gather(store, saved, members, selected, settings, "digest")


def test_models_are_members_and_ensembles_on_the_same_rows(workspace):
    inputs = gathered(workspace)
    assert [model.name for model in inputs.models if model.kind == "member"] == sorted(NAMES)
    assert {model.name for model in inputs.models if model.kind == "ensemble"} == set(inputs.ensembles)
    assert {model.probabilities.shape for model in inputs.models} == {(30, 3)}
    assert set(inputs.rows.split.tolist()) == {"test"}
    assert inputs.failures == {}
    assert inputs.groups is None


def test_out_of_sample_rows_are_those_of_train_and_val(workspace):
    inputs = gathered(workspace)
    assert {name: [part.split for part in parts] for name, parts in inputs.out_of_sample.items()} == {
        name: ["train", "val"] for name in NAMES
    }
    assert inputs.val_rows("bayes").logits.shape == (30, 3)
    assert inputs.val_rows("unknown") is None
    assert inputs.crossfits.keys() == inputs.ensembles.keys()


def test_nothing_is_measured_of_imported_predictions(workspace):
    costs = gathered(workspace).costs
    assert (costs.latencies, costs.combiners, costs.sizes) == ({}, {}, {})


def test_predictions_of_ensembles_are_stored_and_then_read(workspace):
    first = {model.name: model.probabilities for model in gathered(workspace, "val").models}
    path = workspace.ensemble("soft_voting_ensemble") / "predictions_val.npz"
    written = path.stat().st_mtime_ns
    second = {model.name: model.probabilities for model in gathered(workspace, "val").models}
    assert path.stat().st_mtime_ns == written
    for name, probabilities in first.items():
        np.testing.assert_array_equal(second[name], probabilities)


def test_a_damaged_ensemble_is_an_error_that_names_its_file(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    path = workspace.ensemble("hard_voting_ensemble") / "provenance.npz"
    path.write_bytes(b"PK")
    with pytest.raises(UserError) as raised:
        evaluation_inputs.read_ensembles(workspace)
    assert str(path) in str(raised.value)
