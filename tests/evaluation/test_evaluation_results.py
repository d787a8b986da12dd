"""From inputs to records and ranking, without files."""

from __future__ import annotations

from dataclasses import replace

import pytest
from given_predictions import CONFIG, NAMES, empty_workspace, opened, take_in, write

from utils.building import build_commands
from utils.building.ensembles import Provenance, RowSet
from utils.core import engines, worker_processes
from utils.core.errors import ContaminatedError, UserError
from utils.evaluation import evaluation_inputs, evaluation_results, scoring
from utils.evaluation.evaluation_inputs import EvaluationSettings, UncertaintyOptions
from utils.predictions import member_selection


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Of three imported members and three votes, whose files are removed once they are read."""
    base = tmp_path_factory.mktemp("results")
    workspace = empty_workspace(base / "w")
    take_in(workspace, write(base / "given"))
    build_commands.build_ensemble(CONFIG, workspace)
    store = opened(workspace)
    saved = evaluation_inputs.read_ensembles(workspace)
    selected = member_selection.select(store.catalog, CONFIG)
    ensembles = {name: entry.ensemble for name, entry in saved.items()}
    members = scoring.members_to_score(store.catalog, selected, ensembles)
    settings = EvaluationSettings("test", None, False, "f1_macro", CONFIG.seed, UncertaintyOptions())
    gathered = evaluation_inputs.gather(store, saved, members, selected, settings, "digest")
    workspace.ensembles.rename(base / "elsewhere")
    return gathered


def asked_for(inputs, name, **settings):
    return replace(inputs, settings=replace(inputs.settings, model_name=name, **settings))


def test_all_models_are_ranked_without_a_file(inputs):
    results = evaluation_results.compute(inputs)
    assert results.metrics.keys() == {*NAMES, *inputs.ensembles}
    assert [row["name"] for row in results.ranking["rows"]] != []
    assert results.ranking["inputs_digest"] == "digest"
    assert results.ranking["label_issues"] == results.label_issues.summary
    assert results.metrics["bayes"]["vs_soft_voting"]["name"] == "soft_voting_ensemble"


@pytest.mark.skipif(worker_processes.start_method() != "fork", reason="models are divided among forks only")
@pytest.mark.parametrize("n_cores", [2, 50], ids=["several models in each", "a process without models"])
def test_many_models_are_divided_among_processes_with_equal_records(inputs, monkeypatch, n_cores):
    expected, processes = evaluation_results.compute(inputs), []
    run_jobs = worker_processes.run_jobs

    def counted(*arguments, **options):
        processes.append(options["n_processes"])
        return run_jobs(*arguments, **options)

    monkeypatch.setattr(worker_processes, "run_jobs", counted)
    monkeypatch.setattr(evaluation_results, "MANY_MODELS", len(expected.metrics))
    monkeypatch.setattr(engines, "cores", lambda: n_cores)
    found = evaluation_results.compute(inputs)
    assert processes == [min(n_cores, worker_processes.MAX_PROCESSES)]
    assert list(found.metrics) == list(expected.metrics)
    for name, record in found.metrics.items():
        assert record | {"created": None} == expected.metrics[name] | {"created": None}
    assert found.ranking["rows"] == expected.ranking["rows"]


def test_one_model_has_no_ranking(inputs):
    results = evaluation_results.compute(asked_for(inputs, "bayes"))
    assert list(results.metrics) == ["bayes"]
    assert (results.ranking, results.label_issues) == (None, None)


def test_a_model_that_cannot_be_evaluated_is_named_with_its_reason(inputs):
    failing = replace(asked_for(inputs, "lost"), failures={"lost": "no predictions"})
    with pytest.raises(UserError, match=r"^lost: no predictions$"):
        evaluation_results.compute(failing)


def test_a_model_that_was_fitted_on_evaluated_rows_is_refused_unless_that_is_allowed(inputs):
    ids = tuple(inputs.rows.sample_ids[:4].tolist())
    leaked = Provenance((RowSet("test", "held_out", ids),), ())
    models = [replace(model, provenance=leaked) if model.name == "bayes" else model for model in inputs.models]
    contaminated = replace(asked_for(inputs, "bayes"), models=models)
    with pytest.raises(ContaminatedError, match="4 of the 30 rows"):
        evaluation_results.compute(contaminated)
    allowed = evaluation_results.compute(asked_for(contaminated, "bayes", allow_contaminated=True))
    assert allowed.metrics["bayes"]["contaminated"]
    ranking = evaluation_results.compute(replace(contaminated, settings=inputs.settings)).ranking
    assert (ranking["rows"][-1]["name"], ranking["rows"][-1]["rank"]) == ("bayes", None)


def test_soft_voting_of_the_selected_members_is_compared_with_where_it_is_not_built(inputs):
    name = evaluation_results.SOFT_VOTING
    models = [model for model in inputs.models if model.name != name]
    ensembles = {key: entry for key, entry in inputs.ensembles.items() if key != name}
    results = evaluation_results.compute(replace(inputs, models=models, ensembles=ensembles))
    built = evaluation_results.compute(inputs)
    for key in ("delta_accuracy", "delta_log_loss"):
        without, with_it = (found.metrics["bayes"]["vs_soft_voting"][key] for found in (results, built))
        assert without == pytest.approx(with_it)
    assert results.ranking["peers"]["soft_voting"] is None
