"""What a report is made of, read from the files of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from given_predictions import CONFIG, NAMES, empty_workspace, opened, take_in, write

from utils.building import build_commands
from utils.core.artifacts import read_json, write_json
from utils.core.errors import UserError
from utils.evaluation.evaluate import evaluate
from utils.evaluation.report import report_sources

pytestmark = pytest.mark.usefixtures("few_folds", "without_figures")


@pytest.fixture
def workspace(tmp_path):
    workspace = empty_workspace(tmp_path / "w")
    take_in(workspace, write(tmp_path / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    return workspace


def test_a_split_that_is_not_evaluated_is_an_error(workspace):
    with pytest.raises(UserError, match="nothing is evaluated yet"):
        report_sources.read(opened(workspace), "test")


def test_sources_are_those_of_the_recommended_model(workspace):
    ranking = evaluate(CONFIG, workspace).document
    sources = report_sources.read(opened(workspace), "test")
    assert sources.focus == ranking["recommended"]["name"]
    assert list(sources.metrics) == [row["name"] for row in ranking["rows"]]
    assert sources.records.keys() == {row["name"] for row in ranking["rows"] if row["kind"] == "ensemble"}
    assert [member.name for member in sources.members] == sorted(NAMES)
    assert sources.member_rows.keys() == sources.out_of_sample.keys() == set(NAMES)
    assert sources.inference == "full"
    assert sources.notes == []


def test_a_recommended_model_without_metrics_gives_way_to_the_first(workspace):
    ranking = evaluate(CONFIG, workspace).document
    record = read_json(workspace.ranking("test"), remedy="")
    record["recommended"]["name"] = "removed"
    write_json(workspace.ranking("test"), record)
    assert report_sources.read(opened(workspace), "test").focus == ranking["rows"][0]["name"]


def test_a_member_has_predictions_on_the_rows_that_ensembles_were_evaluated_on(workspace):
    evaluate(CONFIG, workspace)
    record = read_json(workspace.ranking("test"), remedy="")
    record["recommended"]["name"] = "bayes"
    write_json(workspace.ranking("test"), record)
    sources = report_sources.read(opened(workspace), "test")
    with np.load(workspace.ensemble("soft_voting_ensemble") / "predictions_test.npz") as stored:
        assert sources.predictions.sample_ids.tolist() == stored["sample_ids"].tolist()
    assert sources.crossfit is None


def test_what_cannot_be_read_is_noted_and_the_rest_is_there(workspace):
    focus = evaluate(CONFIG, workspace).document["recommended"]["name"]
    (workspace.ensemble(focus) / "predictions_test.npz").unlink()
    (workspace.ensemble(focus) / "crossfit.npz").write_bytes(b"PK")
    sources = report_sources.read(opened(workspace), "test")
    assert (sources.predictions, sources.crossfit, len(sources.notes)) == (None, None, 2)
    assert sources.out_of_sample is not None


def test_without_any_metrics_there_is_no_report(workspace):
    evaluate(CONFIG, workspace)
    for path in workspace.scores.rglob("metrics.json"):
        path.unlink()
    with pytest.raises(UserError, match="evaluate --force"):
        report_sources.read(opened(workspace), "test")
