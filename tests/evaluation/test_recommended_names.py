"""`recommended` and `recommended_fast` in place of the name of a member or an ensemble."""

from __future__ import annotations

import json

import pytest
from given_predictions import CONFIG, empty_workspace, opened, take_in, write

from utils.building import build_commands
from utils.core.config_file import load_config
from utils.core.errors import UserError
from utils.evaluation import recommended_names
from utils.evaluation.evaluate import evaluate
from utils.exporting.export import export

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    found = empty_workspace(folder / "w")
    take_in(found, write(folder / "given"))
    build_commands.build_ensemble(CONFIG, found)
    return found


def test_names_stand_for_the_choices_of_the_evaluation(workspace):
    store = opened(workspace)
    with pytest.raises(UserError, match=r"ranking.json is missing; .*evaluate"):
        recommended_names.resolve(store, "recommended_fast")
    ranking = evaluate(CONFIG, workspace).document
    chosen = ranking["recommended"]
    assert recommended_names.resolve(store, "recommended") == chosen["name"]
    assert recommended_names.resolve(store, "bayes") == "bayes"
    assert chosen["evidence"]["after_selection"].keys() == {"log_loss", "log_loss_ci95", "accuracy"}
    assert (chosen["note"], chosen["latency_ms"]) == (None, None)
    assert ranking["recommended_fast"]["reason"] == "no latency is measured"
    with pytest.raises(UserError, match="no latency of a model near the recommended one is measured"):
        recommended_names.resolve(store, "recommended_fast")
    path = workspace.ranking("test")
    record = json.loads(path.read_text())
    record["recommended_fast"] = {"name": "linear", "reason": "", "evidence": None, "latency_ms": 1.0}
    path.write_text(json.dumps(record))
    assert recommended_names.resolve(store, "recommended_fast") == "linear"
    result = evaluate(CONFIG, workspace, model_name="recommended_fast")
    assert result.document["name"] == "linear"
    path.write_text(json.dumps(record | {"inputs_digest": "0"}))
    with pytest.raises(UserError, match="is of other members, ensembles or settings"):
        recommended_names.resolve(store, "recommended_fast")


def test_evaluate_and_export_take_the_name(workspace):
    name = recommended_names.recommended_name(opened(workspace))
    assert evaluate(CONFIG, workspace, model_name="recommended").document["name"] == name
    assert name.endswith("_ensemble")
    config = load_config(CONFIG.source, overrides=["exports.enable=true"])
    assert export(config, workspace, model_name="recommended", formats=["state_dict"]).document["name"] == name
