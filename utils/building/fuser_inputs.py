"""The inputs of the fuser: its ensembles, the reasons why others are left out, and the rows that all inputs share."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import ensembles, listing
from utils.building.builder_protocol import Session
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble
from utils.building.fitting import OutOfSampleRows
from utils.combiners.protocol import NestedPredictions
from utils.core.config import Config
from utils.core.config_values import ALL
from utils.core.errors import UserError, did_you_mean
from utils.meta_methods import INPUT_METHODS, FuserInput
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.fold_networks import FULL

logger = logging.getLogger("disease_pipeline")

CONVEX = "convex"
MIN_ROWS_SHARE = 0.5
"""Of the rows of the largest input: an input with fewer rows would leave too few shared rows to fit the fuser on."""


@dataclass(frozen=True)
class Inputs:
    """The records of the fuser's input ensembles."""

    records: dict[str, Mapping[str, Any]]
    """{ensemble: its `ensemble.json`}, sorted by name"""
    problems: list[str]
    """Why other listed ensembles of the configuration cannot be inputs."""
    left_out: dict[str, str]
    """{ensemble: why it is left out}, for ensembles of a suitable method"""

    @property
    def inference(self) -> str:
        """Networks that predict for the members, the same for all inputs."""
        inference: str = next(iter(self.records.values()))["inference"]
        return inference


def requested(config: Config) -> dict[str, str] | None:
    """Return {ensemble: its name in the configuration, which may be a voting method}; None for all built ensembles."""
    names = config.runs.meta_fuser.input_ensembles
    return None if names == ALL else {ensembles.NAMES.get(name, name): name for name in names}


def select(session: Session) -> Inputs:
    """Return the inputs, from the records of the built ensembles only.

    A listed ensemble that is not built or cannot be an input is a problem. `all` selects every built ensemble that can
    be an input; those whose members are gone or have changed are left out.
    """
    listed = requested(session.config)
    problems: list[str] = []
    left_out: dict[str, str] = {}
    if listed is None:
        records, left_out = _all_built(session)
    else:
        records, problems = _listed(session, listed)
    if any(record["inference"] == FULL for record in records.values()):
        for name in [name for name, record in records.items() if record["inference"] != FULL]:
            del records[name]
            reason = (
                "its members' fold networks answer, and full networks for the other inputs. Build it again: "
                "python ensemble_orchestrator.py stack --set runs.stacking.inference_members=full"
            )
            if listed is None:
                left_out[name] = reason
            else:
                problems.append(f"{listed[name]}: {reason}")
    if session.config.runs.meta_fuser.fuser_type == CONVEX:
        left_out |= _without_inner_copies(records)
    left_out |= _with_few_rows({name: record for name, record in records.items() if name not in left_out})
    return Inputs({name: records[name] for name in sorted(records.keys() - left_out.keys())}, problems, left_out)


def require_members(session: Session, inputs: Inputs) -> None:
    """Raise UserError if a member of an input is gone or has another checkpoint now."""
    for record in inputs.records.values():
        if problem := _member_problem(session, record):
            raise UserError(f"{problem}; build the inputs again: python ensemble_orchestrator.py build-ensemble")


def align(
    session: Session, members: Sequence[Member], inputs: Mapping[str, Ensemble]
) -> tuple[OutOfSampleRows, list[FuserInput]]:
    """Return the out-of-sample rows on which all inputs have cross-fitted predictions, and the inputs on these rows.

    Raises UserError if they share no row, and for an input that was cross-fitted over other folds.
    """
    inference = next(iter(inputs.values())).inference
    out_of_sample = session.rows(members, inference=inference)
    rows = out_of_sample.rows
    keys = list(zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
    crossfits = {name: ensembles.load_nested_crossfit(session.workspace, ensemble) for name, ensemble in inputs.items()}
    index_of = {name: {key: index for index, key in enumerate(part.keys())} for name, part in crossfits.items()}
    shared = [row for row, key in enumerate(keys) if all(key in indices for indices in index_of.values())]
    if len(shared) < len(keys):
        logger.warning("%d of %d out-of-sample rows are not shared by all inputs", len(keys) - len(shared), len(keys))
    if not shared:
        raise UserError(
            f"no row on which all of {', '.join(inputs)} have cross-fitted predictions; give them the same fit_rows "
            "and build them again"
        )
    shared_rows, fold = rows.take(np.array(shared)), out_of_sample.fold[shared]
    parts = []
    for name, ensemble in inputs.items():
        crossfit = crossfits[name]
        input_rows = np.array([index_of[name][keys[row]] for row in shared])
        if not np.array_equal(crossfit.fold[input_rows], fold):
            raise UserError(
                f"{name}: cross-fitted over other folds than the workspace has now. Build it again: "
                f"{build_command(name)}"
            )
        indices = np.array([shared_rows.members.index(member) for member in ensemble.members])
        inner = {number: values[input_rows] for number, values in crossfit.inner.items()}
        predictions = NestedPredictions(crossfit.probabilities[input_rows], inner)
        parts.append(FuserInput(ensemble.method, ensemble.combiner, indices, predictions, name))
    groups = None if out_of_sample.groups is None else out_of_sample.groups[shared]
    return OutOfSampleRows(shared_rows, fold, groups), parts


def _listed(session: Session, names: Mapping[str, str]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Return the records of the listed ensembles, and the problems of the others."""
    available = [*ensembles.names(session.workspace), *ensembles.NAMES.values(), *INPUT_METHODS]
    records: dict[str, Mapping[str, Any]] = {}
    problems = []
    for name, typed in names.items():
        record = ensembles.record_of(session.workspace, name)
        if record is None:
            command = build_command(typed)
            near = did_you_mean(typed, available, ".") if typed not in available else "."
            problems.append(f"{typed}: not built{near} Build it: {command}")
        elif record["method"] not in INPUT_METHODS:
            problems.append(f"{typed}: {record['method']} cannot be an input; these can: {', '.join(INPUT_METHODS)}")
        else:
            records[name] = record
    return records, problems


def _all_built(session: Session) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Return the records of the built ensembles that the configuration requests and that can be inputs.

    The second value is {ensemble: reason} for those whose members have changed.
    """
    records: dict[str, Mapping[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in listing.listed(session.workspace, session.config):
        record = ensembles.record_of(session.workspace, name)
        if record is None or record["method"] not in INPUT_METHODS:
            continue
        if problem := _member_problem(session, record):
            left_out[name] = f"{problem}. Build it again: {build_command(name)}"
        else:
            records[name] = record
    return records, left_out


def _member_problem(session: Session, record: Mapping[str, Any]) -> str | None:
    """Return how a member has changed since the ensemble was built; None if none has."""
    for name in record["members"]:
        member = session.catalog.members.get(name)
        if member is None:
            return f"{name} is no longer in the catalog"
        if fold_networks.digest(member, record["inference"]) != record["member_digests"][name]:
            return f"{name} has another checkpoint now"
    return None


def _without_inner_copies(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return {input: why a convex fuser leaves it out} for inputs without predictions of copies without two folds."""
    return {
        name: "it has no predictions of copies that were fitted without two folds, which a convex fuser needs to be "
        "scored: an earlier version built it, it was trained end to end, or its rows have fewer than three folds. "
        f"Build it again: {build_command(name)} --force"
        for name, record in records.items()
        if not record.get("inner_folds")
    }


def _with_few_rows(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return {input: why it is left out} for inputs with fewer rows than `MIN_ROWS_SHARE` of the largest input's."""
    counts = {name: record["crossfit"]["n"] for name, record in records.items()}
    most = max(counts.values(), default=0)
    return {
        name: f"it has cross-fitted predictions on {count} rows, other inputs on up to {most}; the fuser needs "
        "rows that all inputs share. Build it on the same rows (fit_rows, train_embeddings), or take it out of "
        "runs.meta_fuser.input_ensembles"
        for name, count in sorted(counts.items())
        if count < MIN_ROWS_SHARE * most
    }
