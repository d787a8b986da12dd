"""The command `meta-fuse`: a fuser on the cross-fitted predictions of the ensembles that the configuration names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.building import ensembles, fitting, fuser_inputs
from utils.building.builder_protocol import Build, Builder, Session, run, summary_line
from utils.building.voting_builder import VotingBuilder
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError, nearest_first
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.meta_methods import FUSERS, MetaFuserCombiner
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS

logger = logging.getLogger("disease_pipeline")

NAME = METHOD = "meta_fuser"
BUILD_SOME = "Build some: python ensemble_orchestrator.py build-ensemble"


def meta_fuse(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Fit the fuser on its inputs' cross-fitted predictions and on nothing else.

    Missing voting ensembles among the inputs are built first; for other missing inputs the command that builds them is
    named. A fuser with unchanged inputs is kept, unless `force`. Raises UserError without catalog or members, and with
    fewer than two inputs.
    """
    builder = MetaBuilder()
    require_enabled(config, builder.config_key)
    kind = config.runs.meta_fuser.fuser_type
    if kind not in FUSERS:
        raise UserError(
            f"{config.source}: runs.meta_fuser.fuser_type {kind}: unknown"
            f"{nearest_first(kind, FUSERS, 'This version builds')}"
        )
    session = _with_votes(Session.open(config, workspace))
    outcome = run([builder], session, force=force)
    record = ensembles.record_of(workspace, NAME) or {}
    selected = fuser_inputs.select(outcome.session)
    inputs = list(selected.records)
    lines = [*outcome.lines, f"inputs: {', '.join(inputs)}"]
    lines += [f"left out: {statement}" for statement in _stated(selected.left_out)]
    lines.append(f"written: {workspace.ensemble(NAME)}")
    document = outcome.document() | {
        "inputs": inputs,
        "input_weights": record.get("input_weights"),
        "left_out": selected.left_out,
        "verdict": record["verdict"],
    }
    return Result("\n".join(lines), document, list(outcome.failures), "evaluate")


class MetaBuilder(Builder):
    """Builder of the single ensemble of ensembles."""

    config_key = "runs.meta_fuser"

    def names(self, session: Session) -> list[str]:
        """Return the single name if the section is on."""
        return [NAME] if session.config.runs.meta_fuser.enable else []

    def check(self, session: Session) -> None:
        """Raise UserError if fewer than two inputs are left, or if one of their members is gone or has changed."""
        inputs = fuser_inputs.select(session)
        if len(inputs.records) < 2:
            raise UserError(
                f"{session.config.source}: runs.meta_fuser.input_ensembles leaves {len(inputs.records)} ensemble(s) to "
                f"fuse, two are needed. {'; '.join([*inputs.problems, *_stated(inputs.left_out)]) or BUILD_SOME}"
            )
        fuser_inputs.require_members(session, inputs)

    def problems(self, session: Session) -> list[str]:
        """Return the problems of listed inputs that are not built or cannot be inputs."""
        return fuser_inputs.select(session).problems

    def members(self, session: Session) -> Sequence[Member]:
        """Return the members of all inputs."""
        needed = {name for record in fuser_inputs.select(session).records.values() for name in record["members"]}
        return [session.catalog.members[name] for name in sorted(needed) if name in session.catalog.members]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of the inputs, their members, the images and the fuser's settings."""
        extra_inputs = depends_on(session.config, fuser_inputs.select(session).records)
        members = self.members(session)
        return fitting.inputs_digest(session.config, session.store, members, METHOD, extra_inputs=extra_inputs)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return that inputs, images or settings have changed, or the error of a damaged record; None if current."""
        try:
            is_equal = record["inputs_digest"] == self.inputs_digest(session, name)
        except UserError as error:  # the record of an input is damaged
            return str(error)
        return None if is_equal else "its inputs, images or settings have changed since the build"

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Fit the fuser on the rows on which all inputs have cross-fitted predictions."""
        config, store, members = session.config, session.store, self.members(session)
        selected = fuser_inputs.select(session)
        records = selected.records
        for statement in _stated(selected.left_out):
            logger.warning("left out of %s: %s", NAME, statement)
        inputs = {name: ensembles.load(session.workspace, name) for name in records}
        fold_networks.ensure(store, members, STREAMED_SPLITS, selected.inference)
        facts = fitting.member_facts(store, members)
        rows, parts = fuser_inputs.align(session, members, inputs)
        simple = fitting.measure_baselines(store, facts, rows)
        recipe = MetaFuserCombiner.over(config, facts, parts)
        logger.info("fitting %s (%s) on %s", NAME, config.runs.meta_fuser.fuser_type, ", ".join(inputs))
        fitting.save(
            store,
            NAME,
            METHOD,
            fitting.fit(recipe, rows, baselines=simple),
            members,
            rows,
            extra_inputs=depends_on(config, records),
            prior_provenance=[ensemble.provenance for ensemble in inputs.values()],
            notes={"inputs_left_out": selected.left_out},
        )
        return Build(session, (NAME,))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the lines on the ensemble, its verdict, and the inputs of a convex fuser with their weights."""
        record = ensembles.record_of(session.workspace, name) or {}
        lines = [summary_line(session.workspace, name, state), f"    {record['verdict']}"]
        if weights := record.get("input_weights"):
            used = sorted((entry for entry in weights.items() if entry[1] > 0), key=lambda entry: (-entry[1], entry[0]))
            shown = ", ".join(f"{weight:.3g} {name}" for name, weight in used)
            lines.append(f"    weights: {shown}; 0 for {len(weights) - len(used)} other inputs, which are not run")
        return lines


def _stated(left_out: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in left_out.items()]


def depends_on(config: Config, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the extra inputs of the fuser: digests of its ensembles, and the settings of its kind."""
    settings = FUSERS[config.runs.meta_fuser.fuser_type].settings
    digests = {name: record["inputs_digest"] for name, record in records.items()}
    return {"inputs": digests, "settings": config.digest(*settings)}


def _with_votes(session: Session) -> Session:
    """Build the missing voting ensembles among the inputs; return the session."""
    voting = VotingBuilder()
    listed = fuser_inputs.requested(session.config) or {}
    missing = [
        name for name in listed if voting.covers(session, name) and ensembles.record_of(session.workspace, name) is None
    ]
    return voting.build(session, missing).session if missing else session
