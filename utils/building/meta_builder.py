"""The command `meta-fuse`: a fuser on the cross-fitted predictions of the ensembles that the configuration names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import baselines, ensembles, fitting
from utils.building.builder_protocol import Build, Builder, Session, run, summary_line
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble
from utils.building.fitting import OutOfSampleRows
from utils.building.voting_builder import VotingBuilder
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError, did_you_mean
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.meta_methods import FUSERS, INPUT_METHODS, FuserInput, MetaFuserCombiner
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FULL

logger = logging.getLogger("disease_pipeline")

NAME = METHOD = "meta_fuser"
MIN_ROWS_SHARE = 0.5
"""Of the rows of the input that has most: an input with fewer would decide how few rows the fuser is fitted on."""


def meta_fuse(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Fit the fuser on its inputs' cross-fitted predictions and on nothing else.

    Inputs that vote and are missing are built first; of others the command that builds them is named, and fewer than
    two are refused. A fuser with equal inputs is kept, unless `force`. Raises UserError without catalog, members or
    inputs.
    """
    builder = MetaBuilder()
    require_enabled(config, builder.config_key)
    kind = config.runs.meta_fuser.fuser_type
    if kind not in FUSERS:
        raise UserError(
            f"{config.source}: runs.meta_fuser.fuser_type {kind}: this version builds {', '.join(FUSERS)}"
            f"{did_you_mean(kind, FUSERS)}"
        )
    session = _with_votes(Session.open(config, workspace))
    outcome = run([builder], session, force=force)
    record = ensembles.record_of(workspace, NAME) or {}
    inputs = list(_inputs(outcome.session).records)
    lines = [*outcome.lines, f"inputs: {', '.join(inputs)}", f"written: {workspace.ensemble(NAME)}"]
    document = outcome.document() | {"inputs": inputs, "verdict": record["verdict"]}
    return Result("\n".join(lines), document, list(outcome.failures), "evaluate")


class MetaBuilder(Builder):
    """The one ensemble of ensembles."""

    config_key = "runs.meta_fuser"

    def names(self, session: Session) -> list[str]:
        """The one name, where the section is on."""
        return [NAME] if session.config.runs.meta_fuser.enable else []

    def check(self, session: Session) -> None:
        """Raise UserError where fewer than two inputs are left, or a member of theirs is gone or has changed."""
        inputs = _inputs(session)
        if len(inputs.records) < 2:
            raise UserError(
                f"{session.config.source}: runs.meta_fuser.input_ensembles leaves {len(inputs.records)} ensemble(s) to "
                f"fuse, two are needed. {'; '.join([*inputs.problems, *inputs.few_rows.values()])}"
            )
        _require_members(session, inputs)

    def problems(self, session: Session) -> list[str]:
        """Inputs that are not built, or cannot be inputs."""
        return _inputs(session).problems

    def members(self, session: Session) -> Sequence[Member]:
        """The members of all inputs."""
        needed = {name for record in _inputs(session).records.values() for name in record["members"]}
        return [session.catalog.members[name] for name in sorted(needed) if name in session.catalog.members]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Of the inputs, their members, the images and the fuser's settings."""
        extra_inputs = depends_on(session.config, _inputs(session).records)
        members = self.members(session)
        return fitting.inputs_digest(session.config, session.store, members, METHOD, extra_inputs=extra_inputs)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Another input, or another setting."""
        try:
            is_equal = record["inputs_digest"] == self.inputs_digest(session, name)
        except UserError as error:  # the record of an input is damaged
            return str(error)
        return None if is_equal else "its inputs, images or settings have changed since the build"

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Fit the fuser on the rows on which all inputs have cross-fitted predictions."""
        config, store, members = session.config, session.store, self.members(session)
        chosen = _inputs(session)
        records = chosen.records
        for reason in chosen.few_rows.values():
            logger.warning("left out of %s: %s", NAME, reason)
        inputs = {name: ensembles.load(session.workspace, name) for name in records}
        fold_networks.ensure(store, members, STREAMED_SPLITS, _inference(records))
        facts = fitting.member_facts(store, members)
        rows, parts = _align(session, members, inputs)
        simple = baselines.measure(config, facts, rows.rows.logits, rows.rows.labels, rows.fold, rows.groups)
        recipe = MetaFuserCombiner.over(config, facts, parts)
        logger.info("fitting %s (%s) on %s", NAME, config.runs.meta_fuser.fuser_type, ", ".join(inputs))
        fitting.build(
            store,
            NAME,
            METHOD,
            recipe,
            members,
            rows,
            extra_inputs=depends_on(config, records),
            prior_provenance=[ensemble.provenance for ensemble in inputs.values()],
            baselines=simple,
            notes={"inputs_left_out": chosen.few_rows},
        )
        return Build(session, (NAME,))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """The ensemble and its verdict."""
        record = ensembles.record_of(session.workspace, name) or {}
        return [summary_line(session.workspace, name, state), f"    {record['verdict']}"]


@dataclass(frozen=True)
class Inputs:
    """The ensembles that the fuser takes, by their records."""

    records: dict[str, Mapping[str, Any]]
    """{ensemble: its `ensemble.json`}, sorted by name"""
    problems: list[str]
    """Why others that the configuration lists are left out."""
    few_rows: dict[str, str]
    """{ensemble: why it is left out}, of those with cross-fitted predictions on too few rows"""


def depends_on(config: Config, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Extra inputs of the fuser: the ensembles that it takes, and the settings of its kind."""
    settings = FUSERS[config.runs.meta_fuser.fuser_type].settings
    digests = {name: record["inputs_digest"] for name, record in records.items()}
    return {"inputs": digests, "settings": config.digest(*settings)}


def _requested(config: Config) -> dict[str, str]:
    """{ensemble: its name in the configuration, which may be that of a voting method}"""
    return {ensembles.NAMES.get(name, name): name for name in config.runs.meta_fuser.input_ensembles}


def _with_votes(session: Session) -> Session:
    """Build the inputs that vote and are missing."""
    voting = VotingBuilder()
    requested = _requested(session.config)
    missing = [
        name
        for name in requested
        if voting.covers(session, name) and ensembles.record_of(session.workspace, name) is None
    ]
    return voting.build(session, missing).session if missing else session


def _inputs(session: Session) -> Inputs:
    requested = _requested(session.config)
    available = [*ensembles.names(session.workspace), *ensembles.NAMES.values(), *INPUT_METHODS]
    records: dict[str, Mapping[str, Any]] = {}
    problems = []
    for name, typed in requested.items():
        record = ensembles.record_of(session.workspace, name)
        if record is None:
            command = build_command(typed)
            problems.append(f"{typed}: not built. Build it: {command}{did_you_mean(typed, available)}")
        elif record["method"] not in INPUT_METHODS:
            problems.append(f"{typed}: {record['method']} cannot be an input; these can: {', '.join(INPUT_METHODS)}")
        else:
            records[name] = record
    if any(record["inference"] == FULL for record in records.values()):
        for name in [name for name, record in records.items() if record["inference"] != FULL]:
            del records[name]
            problems.append(
                f"{requested[name]}: its members' fold networks answer, and full networks for the other inputs. Build "
                "it again: python ensemble_orchestrator.py stack --set runs.stacking.inference_members=full"
            )
    few_rows = _with_few_rows(records)
    return Inputs({name: records[name] for name in sorted(records.keys() - few_rows.keys())}, problems, few_rows)


def _with_few_rows(records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{input: why it is left out} of inputs on so few rows that the fuser would lose most of the others' rows."""
    counts = {name: record["crossfit"]["n"] for name, record in records.items()}
    most = max(counts.values(), default=0)
    return {
        name: f"{name} has cross-fitted predictions on {count} rows, other inputs on up to {most}; the fuser needs "
        "rows that all inputs share. Build it on the same rows (fit_rows, train_embeddings), or take it out of "
        "runs.meta_fuser.input_ensembles"
        for name, count in sorted(counts.items())
        if count < MIN_ROWS_SHARE * most
    }


def _inference(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Which networks answer for the members of the inputs; it is the same for all."""
    inference: str = next(iter(records.values()))["inference"]
    return inference


def _require_members(session: Session, inputs: Inputs) -> None:
    """Raise UserError where a member of an input is gone or has another checkpoint now."""
    for record in inputs.records.values():
        for name in record["members"]:
            member = session.catalog.members.get(name)
            digest = record["member_digests"][name]
            if member is None or fold_networks.digest(member, _inference(inputs.records)) != digest:
                state = "is no longer in the catalog" if member is None else "has another checkpoint now"
                raise UserError(
                    f"{name} {state}; build the inputs again: python ensemble_orchestrator.py build-ensemble"
                )


def _align(
    session: Session, members: Sequence[Member], inputs: Mapping[str, Ensemble]
) -> tuple[OutOfSampleRows, list[FuserInput]]:
    """The out-of-sample rows on which all inputs have cross-fitted predictions, and the inputs with these."""
    inference = next(iter(inputs.values())).inference
    out_of_sample = session.rows(members, inference=inference)
    rows = out_of_sample.rows
    keys = list(zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
    crossfits = {name: ensembles.load_crossfit(session.workspace, name) for name in inputs}
    index_of = {name: {key: index for index, key in enumerate(own.keys())} for name, own in crossfits.items()}
    shared = [row for row, key in enumerate(keys) if all(key in indices for indices in index_of.values())]
    if len(shared) < len(keys):
        logger.warning("%d of %d out-of-sample rows are not shared by all inputs", len(keys) - len(shared), len(keys))
    if not shared:
        raise UserError(
            f"no row on which all of {', '.join(inputs)} have cross-fitted predictions; give them the same fit_rows "
            "and build them again"
        )
    taken = rows.take(np.array(shared))
    parts = []
    for name, ensemble in inputs.items():
        of_input = [index_of[name][keys[row]] for row in shared]
        indices = np.array([taken.members.index(member) for member in ensemble.members])
        parts.append(FuserInput(ensemble.method, ensemble.combiner, indices, crossfits[name].probabilities[of_input]))
    groups = None if out_of_sample.groups is None else out_of_sample.groups[shared]
    return OutOfSampleRows(taken, out_of_sample.fold[shared], groups), parts
