"""The second step of `evaluate`: compute records, ranking and label issues from the inputs; no file is accessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles, recommendation
from utils.core import engines, worker_processes
from utils.core.errors import ContaminatedError, LeakageError, UserError
from utils.evaluation import evaluated_rows, score_ranking, score_records
from utils.evaluation.evaluation_context import EvaluationContext
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.score_ranking import LabelIssueTable
from utils.evaluation.scoring import ScoredModel
from utils.numeric.means import unit_indices, unit_sums
from utils.numeric.metrics import log_loss_per_row, softmax
from utils.predictions import training_evidence
from utils.predictions.catalog import Problem
from utils.predictions.rows import UNKNOWN
from utils.predictions.training_evidence import Scores

SOFT_VOTING = "soft_voting_ensemble"
PEERS = {"soft_voting": SOFT_VOTING, "greedy_selection_ensemble": "greedy_selection_ensemble"}
"""{key in the ranking: ensemble that others are compared with}"""
MANY_MODELS = 10
"""Number of models from which their records take longer than starting processes that share the work"""
RECOMMENDED = ("name", "reason", "note", "evidence", "latency_ms", "not_compared")
"""Keys of the recommendation that the ranking copies under the same name"""


@dataclass(frozen=True)
class EvaluationResults:
    """Results that `evaluate` writes."""

    models: Mapping[str, ScoredModel]
    """{name: evaluated model}, in the order of `metrics`"""
    metrics: Mapping[str, dict[str, Any]]
    """{name: `metrics.json`}"""
    ranking: dict[str, Any] | None
    """`ranking.json`; None if a single model is evaluated"""
    label_issues: LabelIssueTable | None
    """Written with the ranking"""
    suspicions: Sequence[Problem] = ()
    """Evidence against the statements on members' training data"""


def compute(inputs: EvaluationInputs) -> EvaluationResults:
    """Score, compare and rank the models.

    Raises UserError if the model named in the settings cannot be evaluated, and ContaminatedError if it was fitted on
    evaluated rows and this is not allowed.
    """
    by_name = {model.name: model for model in inputs.models}
    name = inputs.settings.model_name
    if name is not None:
        _require(inputs, by_name, name)
    recommended = recommendation_of(inputs)
    models = [model for model in inputs.models if model.kind == "ensemble" or model.name in inputs.ranked]
    if name is not None:
        models = [by_name[name]]
    metrics = _metrics(inputs, models, references(inputs, recommended["best_single"]))
    suspicions = [
        problem for model in models if model.name in inputs.declared for problem in _suspicions(inputs, model)
    ]
    for problem in suspicions:
        notes = metrics[str(problem.member)]["notes"]
        notes["trained_on"] = "; ".join([*([notes["trained_on"]] if "trained_on" in notes else []), problem.message])
    scored = {model.name: model for model in models}
    if name is not None:
        return EvaluationResults(scored, metrics, None, None, suspicions)
    kinds = {model.name: model.kind for model in models}
    issues = score_ranking.label_issue_table(inputs, recommended["name"])
    columns = inputs.settings.columns
    ranking = score_ranking.rank(metrics, kinds, inputs.split, inputs.settings.metric, columns or ()) | {
        "recommended": {key: recommended[key] for key in RECOMMENDED},
        "recommended_fast": recommended["fast"],
        "peers": {"best_single": recommended["best_single"]}
        | {key: peer if peer in inputs.ensembles else None for key, peer in PEERS.items()},
        "label_issues": issues.summary,
        "left_out": dict(inputs.failures),
        "options": inputs.settings.ranking_options(),
        "inputs_digest": inputs.inputs_digest,
    }
    return EvaluationResults(scored, metrics, ranking, issues, suspicions)


def _metrics(
    inputs: EvaluationInputs, models: Sequence[ScoredModel], compared_with: Mapping[str, ScoredModel | None]
) -> dict[str, dict[str, Any]]:
    """Return {name: `metrics.json`} of the models; many models are divided among processes where they can be forked."""
    n_processes = 1
    if len(models) >= MANY_MODELS and worker_processes.can_fork():
        n_processes = min(engines.cores(), worker_processes.MAX_PROCESSES)
    records = engines.Local().map(
        _records,
        np.array_split(np.arange(len(models)), n_processes),
        shared=(inputs, models, compared_with),
        description="scores",
        n_processes=n_processes,
        are_long=True,
    )
    return {record["name"]: record for of_process in records for record in of_process}


def _records(
    inputs: EvaluationInputs,
    models: Sequence[ScoredModel],
    compared_with: Mapping[str, ScoredModel | None],
    indices: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the records of the models with these indices, which share bootstrap samples."""
    chosen = [models[index] for index in indices.tolist()]
    context = EvaluationContext(inputs, chosen, compared_with)
    return [score_records.metrics_record(model, context) for model in chosen]


def _suspicions(inputs: EvaluationInputs, model: ScoredModel) -> list[Problem]:
    """Return contradictions between a member's scores and the statement on its training data."""
    seen = {(part.split, sample_id) for part in model.provenance.fitted_on for sample_id in part.sample_ids}
    rows = inputs.rows
    unseen = np.array([(inputs.split, sample_id) not in seen for sample_id in rows.sample_ids.tolist()])
    scores_of_splits = {
        inputs.split: _scores(
            model.probabilities[unseen], rows.labels[unseen], None if inputs.groups is None else inputs.groups[unseen]
        )
    }
    out_of_fold = None
    for part in inputs.out_of_sample[model.name]:
        groups = inputs.groups_of((part.split, sample_id) for sample_id in part.sample_ids.tolist())
        scores = _scores(softmax(np.asarray(part.logits)), np.asarray(part.labels), groups)
        if part.split == "train" and inputs.members[model.name].oof is not None:
            out_of_fold = scores
        else:
            scores_of_splits.setdefault(part.split, scores)
    held_out = {split: scores for split, scores in scores_of_splits.items() if scores is not None}
    return training_evidence.problems(model.name, held_out, out_of_fold)


def _scores(probabilities: np.ndarray, labels: np.ndarray, groups: np.ndarray | None) -> Scores | None:
    """Return scores of the labelled rows, with mean losses per group if there are groups (N,); None without any."""
    labelled = labels != UNKNOWN
    if not labelled.any():
        return None
    probabilities, labels = probabilities[labelled], labels[labelled]
    hits = int((probabilities.argmax(axis=1) == labels).sum())
    losses = log_loss_per_row(probabilities, labels)
    if groups is None:
        return Scores(len(labels), hits, losses)
    unit_of_row = unit_indices(len(labels), groups[labelled])
    group_losses = unit_sums(losses, unit_of_row) / np.bincount(unit_of_row)
    return Scores(len(labels), hits, group_losses, len(group_losses))


def references(inputs: EvaluationInputs, best_single: str | None) -> dict[str, ScoredModel | None]:
    """Return {vs_best_single, vs_soft_voting: the model that others are compared with on the same rows}."""
    by_name = {model.name: model for model in inputs.models}
    return {
        "vs_best_single": None if best_single is None else by_name.get(best_single),
        "vs_soft_voting": by_name.get(SOFT_VOTING) or _plain_mean(inputs),
    }


def recommendation_of(inputs: EvaluationInputs) -> dict[str, Any]:
    """Return the recommendation; without a name if a single model is evaluated and no model has out-of-sample rows."""
    try:
        return recommendation.recommend_among(
            inputs.catalog,
            {member: inputs.out_of_sample[member] for member in inputs.candidates},
            [(entry.ensemble, inputs.crossfits[key]) for key, entry in inputs.ensembles.items()],
            inputs.earlier_groups,
            score_records.one_image_latencies(inputs),
        )
    except LeakageError:
        if inputs.settings.model_name is None:
            raise
        return {"name": None, "best_single": None}


def _require(inputs: EvaluationInputs, models: Mapping[str, ScoredModel], name: str) -> None:
    if name not in models:
        raise UserError(f"{name}: {inputs.failures.get(name, 'built from other checkpoints than the catalog holds')}")
    fitted = evaluated_rows.count_overlap(models[name].provenance.fitted_on, inputs.rows)
    if fitted and not inputs.settings.allow_contaminated:
        raise ContaminatedError(
            f"{name}: it was fitted on {fitted} of the {len(inputs.rows.labels)} rows of {inputs.split}, so its score "
            "would be too high. Use another split, or --allow-contaminated to evaluate it with that mark"
        )


def _plain_mean(inputs: EvaluationInputs) -> ScoredModel | None:
    """Return soft voting of the selected members, for use if this ensemble is not built; None without such members."""
    rows = inputs.rows
    names = tuple(name for name in inputs.selected if name in inputs.members)
    if not names:
        return None
    indices = [rows.members.index(name) for name in names]
    mean = softmax(rows.logits[indices]).mean(axis=0)
    return ScoredModel(SOFT_VOTING, "ensemble", names, mean, ensembles.Provenance((), ()))
