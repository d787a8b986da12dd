"""Sources of a report: from an evaluation that has just run, or from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.building import ensembles
from utils.building.ensembles import Crossfit
from utils.core.artifacts import read_arrays, read_record
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.evaluation.evaluation_inputs import EvaluationInputs
from utils.evaluation.evaluation_records import METRICS, RANKING
from utils.evaluation.evaluation_results import EvaluationResults
from utils.evaluation.report.example_images import LabelledPredictions
from utils.predictions import fold_networks
from utils.predictions.catalog import Catalog, Member
from utils.predictions.rows import MemberRows
from utils.predictions.store import Store

AGAIN = "Remove it, then evaluate again"


@dataclass(frozen=True)
class ReportRecords:
    """The records of one split, and the model that the report is about."""

    workspace: Workspace
    catalog: Catalog
    split: str
    ranking: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    """{model: `metrics.json`}, in the order of the ranking"""
    focus: str
    """The model that the report is about: the recommended one"""
    records: Mapping[str, Mapping[str, Any]]
    """{ensemble: `ensemble.json`} of the ensembles among `metrics`, in their order"""
    members: tuple[Member, ...]
    """Members of the focus, or all ranked members if the focus is a member"""
    predictions: LabelledPredictions | None
    """Predictions of the focus on the evaluated rows"""


@dataclass(frozen=True)
class ReportSources(ReportRecords):
    """Records and arrays of a report; a part that cannot be read is None, with the reason in `notes`."""

    member_rows: Mapping[str, MemberRows] | None
    """{member: its rows of the split by the networks that predict for it in the focus}"""
    out_of_sample: Mapping[str, Sequence[MemberRows]] | None
    """{member: its out-of-sample rows}"""
    crossfit: Crossfit | None
    """Cross-fitted predictions of the focus, if it is an ensemble"""
    notes: list[str] = field(default_factory=list)

    @property
    def inference(self) -> str:
        """Networks that predict for the members of the focus."""
        return str(self.records.get(self.focus, {}).get("inference", fold_networks.FULL))


def from_evaluation(workspace: Workspace, inputs: EvaluationInputs, results: EvaluationResults) -> ReportSources:
    """Return the sources of a report on an evaluation of all models; nothing is read."""
    assert results.ranking is not None, "one model alone has no report"
    # Keys are sorted as in the files, so that a report from the files is the same.
    ranking, stored = json.loads(json.dumps([results.ranking, results.metrics], sort_keys=True))
    metrics = {row["name"]: stored[row["name"]] for row in ranking["rows"]}
    focus = ranking["recommended"]["name"]
    if focus not in metrics:  # it is recommended by out-of-sample rows and has no rows of this split
        focus = next(iter(metrics))
    kinds = _kinds(ranking)
    records = {name: inputs.ensembles[name].record for name in metrics if kinds[name] == "ensemble"}
    members = _members(inputs.catalog, kinds, records, focus)
    rows, inference = inputs.rows, results.models[focus].inference
    member_rows = {
        member.name: inputs.fold_rows[member.name]
        if inference == fold_networks.FOLDS
        else MemberRows(
            inputs.split,
            rows.classes,
            rows.sample_ids,
            rows.labels,
            rows.logits[rows.members.index(member.name)],
            rows.out_of_sample,
        )
        for member in members
        if member.name in inputs.members
    }
    return ReportSources(
        workspace,
        inputs.catalog,
        inputs.split,
        ranking,
        metrics,
        focus,
        records,
        members,
        LabelledPredictions(rows.sample_ids, rows.labels, results.models[focus].probabilities),
        member_rows,
        {member.name: inputs.out_of_sample[member.name] for member in members if member.name in inputs.out_of_sample},
        inputs.crossfits.get(focus),
    )


def read(
    store: Store,
    split: str,
    *,
    ranking: Mapping[str, Any] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
) -> ReportSources:
    """Read the files of an evaluation, except a `ranking` and `ensemble.json` records that are already read.

    Raises UserError if the split is not evaluated.
    """
    workspace, notes = store.workspace, list[str]()
    if ranking is None:
        ranking = read_record(workspace.ranking(split), remedy=AGAIN, form=RANKING)
    if ranking is None:
        raise UserError(f"{workspace.ranking(split)}: nothing is evaluated yet. Run evaluate first")
    metrics = read_metrics(workspace, ranking, split)
    focus = ranking["recommended"]["name"]
    if focus not in metrics:  # it has no rows of this split, or its metrics were removed by hand
        focus = next(iter(metrics))
    kinds = _kinds(ranking)
    names = [name for name in metrics if kinds[name] == "ensemble"]
    if records is None:
        records = _read_records(workspace, names, notes)
    records = {name: records[name] for name in names if name in records}
    members = _members(store.catalog, kinds, records, focus)
    inference = records.get(focus, {}).get("inference", fold_networks.FULL)
    predictions, member_rows, out_of_sample, crossfit = None, None, None, None
    try:
        member_rows = {member.name: fold_networks.rows(store, member, split, inference) for member in members}
        if kinds[focus] == "ensemble":
            predictions = _of_ensemble(workspace, focus, split)
        else:
            evaluated = next((_of_ensemble(workspace, name, split).sample_ids for name in names), None)
            predictions = LabelledPredictions.of_member(member_rows[focus], evaluated)
    except (UserError, OSError) as error:
        notes.append(f"Single rows of {split} are not shown: {error}")
    try:
        out_of_sample = store.out_of_sample_parts(members)
    except (UserError, OSError) as error:
        notes.append(f"The contribution of each member is not shown: {error}")
    if (workspace.ensemble(focus) / "crossfit.npz").is_file():
        try:
            crossfit = ensembles.load_crossfit(workspace, focus)
        except (UserError, OSError) as error:
            notes.append(f"Labels in doubt are not shown: {error}")
    return ReportSources(
        workspace,
        store.catalog,
        split,
        ranking,
        metrics,
        focus,
        records,
        members,
        predictions,
        member_rows,
        out_of_sample,
        crossfit,
        notes,
    )


def read_metrics(workspace: Workspace, ranking: Mapping[str, Any], split: str) -> dict[str, dict[str, Any]]:
    """Read {model: `metrics.json`} of all ranked models that still have one. Raises UserError if none has."""
    metrics = {}
    for row in ranking["rows"]:
        path_of = workspace.ensemble_metrics if row["kind"] == "ensemble" else workspace.member_metrics
        record = read_record(path_of(row["name"], split), remedy=AGAIN, form=METRICS)
        if record is not None:
            metrics[row["name"]] = record
    if not metrics:
        raise UserError(f"{workspace.scores}: no metrics of {split} are there. Run evaluate --force")
    return metrics


def _kinds(ranking: Mapping[str, Any]) -> dict[str, str]:
    return {row["name"]: row["kind"] for row in ranking["rows"]}


def _members(
    catalog: Catalog, kinds: Mapping[str, str], records: Mapping[str, Mapping[str, Any]], focus: str
) -> tuple[Member, ...]:
    names = records.get(focus, {}).get("members") or [name for name, kind in kinds.items() if kind == "member"]
    return tuple(catalog.members[name] for name in sorted(names) if name in catalog.members)


def _read_records(workspace: Workspace, names: Sequence[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Read {ensemble: `ensemble.json`}; the reasons why others cannot be read are added to `notes`."""
    records = {}
    for name in names:
        try:
            records[name] = ensembles.record_of(workspace, name) or {}
        except UserError as error:
            notes.append(f"How {name} combines its members is not shown: {error}")
    return records


def _of_ensemble(workspace: Workspace, name: str, split: str) -> LabelledPredictions:
    arrays = read_arrays(workspace.ensemble_predictions(name, split), remedy=AGAIN)
    return LabelledPredictions(arrays["sample_ids"], arrays["labels"], arrays["probabilities"])
