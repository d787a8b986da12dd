"""The command `evaluate`: score members and ensembles, rank them, recommend one and write the report.

It has three steps: gather (`evaluation_inputs`: files to typed inputs), compute (`evaluation_results`: records and
ranking, without files) and write (this module: records, then the page and the message).
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.building import listing
from utils.core.artifacts import read_record, write_arrays, write_json, write_text
from utils.core.config import Config
from utils.core.errors import ConfigError, UserError, did_you_mean
from utils.core.links import remove_file
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import (
    class_tables,
    evaluation_inputs,
    evaluation_results,
    leaderboard,
    recommended_names,
    score_plots,
    scoring,
)
from utils.evaluation.evaluation_inputs import EvaluationSettings, SavedEnsemble, UncertaintyOptions
from utils.evaluation.evaluation_records import RANKING
from utils.evaluation.evaluation_results import EvaluationResults
from utils.evaluation.report import example_maps, report_page, report_sources
from utils.evaluation.report.report_data import report_data
from utils.evaluation.report.report_sources import ReportSources
from utils.evaluation.scoring import ScoredModel
from utils.numeric.metrics import confusion_matrix
from utils.predictions import catalog, member_selection
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")


def evaluate(
    config: Config,
    workspace: Workspace,
    *,
    split: str = "test",
    model_name: str | None = None,
    allow_contaminated: bool = False,
    alpha: float = UncertaintyOptions.alpha,
    target_risk: float = UncertaintyOptions.target_risk,
    wanted_error: float | None = None,
    class_conditional: bool = False,
    metrics: Sequence[str] | None = None,
    plots: str | None = None,
    maps: bool = False,
    force: bool = False,
) -> Result:
    """Evaluate all members and ensembles, or `model_name` only, and write their records, plots, ranking and report.

    `model_name` may also be `recommended` or `recommended_fast`. `metrics` are the columns of the ranking's tables,
    keys of `leaderboard.HEADINGS`. `plots` is one of `score_plots.SELECTIONS`, `compared` by default; plots of models
    that are not selected are removed. `wanted_error` is the deprecated name of `target_risk`. With `maps`, the report
    shows class-activation maps. A single model gets no ranking and no report. Members or ensembles that cannot be
    evaluated, maps that cannot be made, and a report that cannot be written are failures of the result.

    Raises UserError without a catalog, for an unknown name, and if nothing, or not the named model, can be evaluated;
    ConfigError for options outside (0, 1), unknown metrics, and `maps` with a single model; ContaminatedError if the
    named model was fitted on evaluated rows, unless `allow_contaminated`.
    """
    options = uncertainty_options(alpha, target_risk, wanted_error, class_conditional)
    _require_known(metrics or ())
    if maps and model_name is not None:
        raise ConfigError("evaluate --maps: adds pictures to the report; expected without --model-name")
    store = Store(config, workspace, catalog.load(workspace))
    model_name = None if model_name is None else recommended_names.resolve(store, model_name)
    saved, apart = listed_ensembles(config, workspace, model_name)
    ensembles = {name: entry.ensemble for name, entry in saved.items()}
    selected = member_selection.select(store.catalog, config)
    members = scoring.members_to_score(store.catalog, selected, ensembles)
    if model_name is not None and model_name not in {*saved, *members}:
        raise recommended_names.unknown_name(model_name, saved, members)
    if not saved:
        logger.warning(
            "no ensemble %s; members alone are evaluated. Run build-ensemble first",
            "is in the configuration" if apart else "is built",
        )
    digest = scoring.inputs_digest(store, ensembles, members, split)
    stored = read_record(workspace.ranking(split), remedy="Remove it, then evaluate again", form=RANKING)
    settings = EvaluationSettings(
        split,
        model_name,
        allow_contaminated,
        config.runs.score_ensemble.optimization_metric,
        config.seed,
        options,
        None if metrics is None else tuple(dict.fromkeys(metrics)),
        plots or score_plots.COMPARED,
    )
    if model_name is None and not force and stored and _is_current(workspace, stored, digest, settings):
        result = _ranking_result(workspace, stored, split, "up to date", apart)
        records = {name: entry.record for name, entry in saved.items()}
        return _with_report_of_ranking(config, store, stored, records, result, split=split, maps=maps)
    inputs = evaluation_inputs.gather(store, saved, members, selected, settings, digest)
    results = evaluation_results.compute(inputs)
    for line in catalog.problem_lines(results.suspicions):
        logger.warning("%s", line.removeprefix("warning: "))
    _write_records(workspace, results, settings, inputs.rows.labels)
    store.digests.save()
    if model_name is not None:
        return _model_result(workspace, results, model_name, split)
    ranking = _write_ranking(workspace, results, split)
    result = _ranking_result(workspace, ranking, split, "written", apart)
    sources = report_sources.from_evaluation(workspace, inputs, results)
    return _write_report(config, sources, _with_maps(store, sources, result) if maps else result)


def _with_report_of_ranking(
    config: Config,
    store: Store,
    ranking: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    result: Result,
    *,
    split: str,
    maps: bool,
) -> Result:
    """Add the report to the result of a ranking that is up to date; it is written where it is not current."""
    workspace = store.workspace
    if not maps and report_page.is_current(config, workspace, split):
        return _with_report(result, workspace, split)
    try:
        sources = report_sources.read(store, split, ranking=ranking, records=records)
    except UserError as error:
        return replace(result, failures=[*result.failures, f"report: {error}"])
    if maps:
        result = _with_maps(store, sources, result)
        if report_page.is_current(config, workspace, split):
            return _with_report(result, workspace, split)
    return _write_report(config, sources, result)


def listed_ensembles(
    config: Config, workspace: Workspace, model_name: str | None
) -> tuple[dict[str, SavedEnsemble], list[str]]:
    """Return the saved ensembles that the configuration requests, or `model_name`, and the names of the others."""
    saved = evaluation_inputs.read_ensembles(workspace)
    apart = [name for name in listing.unlisted(workspace, config) if name != model_name]
    return {name: entry for name, entry in saved.items() if name not in apart}, apart


def uncertainty_options(
    alpha: float = UncertaintyOptions.alpha,
    target_risk: float = UncertaintyOptions.target_risk,
    wanted_error: float | None = None,
    class_conditional: bool = False,
) -> UncertaintyOptions:
    """Return the options of the command line. Raises ConfigError for fractions outside (0, 1)."""
    if wanted_error is not None:
        logger.warning("evaluate: --wanted-error is deprecated; use --target-risk %g instead", wanted_error)
        target_risk = wanted_error
    values = {"--alpha": alpha, "--target-risk": target_risk}
    wrong = [f"{option} {value:g}" for option, value in values.items() if not 0 < value < 1]
    if wrong:
        raise ConfigError(f"evaluate {' '.join(wrong)}: expected a fraction of rows between 0 and 1, such as 0.1")
    return UncertaintyOptions(alpha, target_risk, class_conditional)


def _require_known(metrics: Sequence[str]) -> None:
    """Raise one ConfigError for all metrics that no column can show."""
    known = leaderboard.HEADINGS
    unknown = [f"{name}{did_you_mean(name, known)}" for name in metrics if name not in known]
    if unknown:
        raise ConfigError(
            f"evaluate --metrics: no such metric {' '.join(unknown)}. Expected some of {', '.join(known)}"
        )


def _is_current(workspace: Workspace, ranking: Mapping[str, Any], digest: str, settings: EvaluationSettings) -> bool:
    """Return whether a ranking has the same inputs and options, and all its ensembles have stored predictions.

    A ranking that left something out is never current, since the cause may have been removed.
    """
    if ranking.get("inputs_digest") != digest or ranking.get("left_out"):
        return False
    if scoring.without_predictions(workspace, ranking, settings.split):
        return False
    return ranking.get("options") == settings.ranking_options()


def _write_records(
    workspace: Workspace, results: EvaluationResults, settings: EvaluationSettings, labels: np.ndarray
) -> None:
    """Write `metrics.json` of each model and the plots that the settings select; remove all other plots."""
    pictures: list[score_plots.Picture] = []
    split = settings.split
    if results.ranking is not None:
        shown = score_plots.shown_models(results.ranking, settings.plots)
    else:
        shown = set() if settings.plots == score_plots.NONE else set(results.models)
    for name, record in results.metrics.items():
        is_ensemble = results.models[name].kind == "ensemble"
        path_of = workspace.ensemble_metrics if is_ensemble else workspace.member_metrics
        path = path_of(name, split)
        _write_confusion_counts(workspace.confusion_counts(path), results.models[name], labels, record)
        for kind, texts in class_tables.texts(record).items():
            for suffix, text in texts.items():
                table = workspace.class_table(path, kind, suffix)
                write_text(table, text) if text else remove_file(table)
        write_json(path, record)
        folder = name if is_ensemble else f"members/{name}"
        kinds = score_plots.kinds_of(record) if name in shown else []
        for kind in score_plots.KINDS:
            plot = workspace.plot(folder, kind, split)
            if kind in kinds:
                pictures.append(score_plots.Picture(kind, record, plot))
            else:
                remove_file(plot)  # it would show scores of an earlier evaluation
    score_plots.draw_all(pictures)


def _write_confusion_counts(path: Path, model: ScoredModel, labels: np.ndarray, record: Mapping[str, Any]) -> None:
    """Write the positive counts of a confusion matrix that `metrics.json` omits: `true`, `predicted`, `count`."""
    if record["confusion_matrix"] is not None:
        remove_file(path)
        return
    counts = confusion_matrix(model.probabilities, labels)
    true, predicted = np.nonzero(counts)
    classes = np.array(list(record["per_class"]))
    write_arrays(path, {"true": true, "predicted": predicted, "count": counts[true, predicted], "classes": classes})


def _write_ranking(workspace: Workspace, results: EvaluationResults, split: str) -> dict[str, Any]:
    """Write the labels in doubt and the ranking; `ranking.json`, which decides whether it is current, comes last."""
    assert results.ranking is not None, "one model alone is not ranked"
    assert results.label_issues is not None
    write_text(workspace.label_issues("csv"), results.label_issues.csv)
    write_json(workspace.label_issues("json"), results.label_issues.record)
    for suffix, text_of in leaderboard.WRITERS.items():
        write_text(workspace.ranking_table(split, suffix), text_of(results.ranking))
    write_json(workspace.ranking(split), results.ranking)
    return results.ranking


def _with_maps(store: Store, sources: ReportSources, result: Result) -> Result:
    """Store the class-activation maps of the example images; return the result, with a failure if they fail."""
    try:
        example_maps.update(store, report_data(sources))
        store.digests.save()
    except UserError as error:
        return replace(result, failures=[*result.failures, f"maps: {error}"])
    return result


def _write_report(config: Config, sources: ReportSources, result: Result) -> Result:
    try:
        report_page.write(config, sources)
    except UserError as error:
        return replace(result, failures=[*result.failures, f"report: {error}"])
    return _with_report(result, sources.workspace, sources.split)


def _with_report(result: Result, workspace: Workspace, split: str) -> Result:
    path = workspace.report(split)
    return replace(result, text=f"{result.text}\nreport: {path}", document={**result.document, "report": str(path)})


def _ranking_result(
    workspace: Workspace, ranking: Mapping[str, Any], split: str, state: str, apart: Sequence[str]
) -> Result:
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = [leaderboard.as_text(ranking, styled=leaderboard.is_terminal(sys.stdout), columns=columns)]
    issues = ranking["label_issues"]
    if issues["in_doubt"]:
        rows = f"{issues['in_doubt']} of {issues['n']} out-of-sample rows"
        lines.append(f"labels in doubt: {rows}, by {issues['model']}: {workspace.label_issues('csv')}")
    if apart:
        lines.append(listing.note(apart))
    lines.append(f"{state}: {workspace.ranking(split)}")
    failures = [f"{name}: {reason}" for name, reason in sorted(ranking["left_out"].items())]
    return Result("\n".join(lines), {**ranking, "unlisted": list(apart)}, failures)


def _model_result(workspace: Workspace, results: EvaluationResults, name: str, split: str) -> Result:
    record = results.metrics[name]
    is_ensemble = results.models[name].kind == "ensemble"
    path_of = workspace.ensemble_metrics if is_ensemble else workspace.member_metrics
    marks = [mark for key, mark in leaderboard.MARKS.items() if record.get(key)]
    low, high = record["ci95"]["accuracy"]
    text = (
        f"{name} on {split}: accuracy {record['accuracy']:.4f} [{low:.4f}, {high:.4f}], F1 macro "
        f"{record['f1_macro']:.4f}, log-loss {record['log_loss']:.4f}, ECE {record['ece']:.4f}"
        f"{', ' + ', '.join(marks) if marks else ''}\n"
        f"written: {path_of(name, split)}"
    )
    return Result(text, record)
