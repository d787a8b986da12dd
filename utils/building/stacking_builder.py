"""The command `stack`: meta-learners on the members' out-of-fold outputs, compared with simpler combinations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.building import ensembles, family_fits, fitting, inference_choice
from utils.building.baselines import Baselines
from utils.building.builder_protocol import Build, Builder, Session, members_line, run, summary_line
from utils.building.fitting import Fitted, OutOfSampleRows
from utils.building.inference_choice import Measurement
from utils.combiners.fit_demand import FitDemand
from utils.combiners.protocol import MemberFacts
from utils.core import engines
from utils.core.config import Config, require_enabled
from utils.core.config_values import ALL
from utils.core.errors import LeakageError, UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.numeric.nested_cv import n_fits
from utils.predictions import catalog, fold_networks, training_data
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FOLDS, FULL
from utils.predictions.inspection import REFUSING
from utils.stacking_methods import COMBINERS

logger = logging.getLogger("disease_pipeline")

REFUSED = ("oof_refused", *REFUSING)
"""Codes of the problems for which discovery refuses out-of-fold predictions."""


def stack(config: Config, workspace: Workspace, *, strict: bool = False, force: bool = False) -> Result:
    """Fit the meta-learners that the configuration lists on out-of-sample rows.

    Members without out-of-fold predictions are left out with a warning, or refused if `strict`; if no member has them,
    the meta-learners are fitted and cross-fitted on val, with a warning. An ensemble with unchanged inputs is kept,
    unless `force`. Raises UserError without catalog or members.
    """
    builder = StackingBuilder(strict=strict)
    require_enabled(config, builder.config_key)
    outcome = run([builder], Session.open(config, workspace), force=force)
    if not outcome.states:
        raise UserError("; ".join(outcome.failures))
    names = [member.name for member in builder.members(outcome.session)]
    records = {name: ensembles.record_of(workspace, name) or {} for name in outcome.states}
    document = outcome.document() | {
        "members": names,
        "verdicts": {name: record["verdict"] for name, record in records.items()},
        "inference_members": {name: record["inference_members"] for name, record in records.items()},
    }
    lines = [*outcome.lines, members_line(names), f"written: {workspace.models}"]
    return Result("\n".join(lines), document, list(outcome.failures), "evaluate")


class StackingBuilder(Builder):
    """One ensemble per meta-learner, over the members that have out-of-fold predictions."""

    config_key = "runs.stacking"

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict

    def names(self, session: Session) -> list[str]:
        """Return one name per listed meta-learner that this version has."""
        settings = session.config.runs.stacking
        methods = [f"stacking_{learner}" for learner in settings.meta_learners] if settings.enable else []
        return [method for method in methods if method in COMBINERS]

    def members(self, session: Session) -> Sequence[Member]:
        """Return the members with out-of-sample train rows; all members if none has any."""
        store = session.store
        return [member for member in session.members if training_data.has_train_rows(store, member)] or session.members

    def check(self, session: Session) -> None:
        """Warn about members without out-of-fold predictions, or refuse them if strict."""
        _require_out_of_fold(session, strict=self.strict)

    def problems(self, session: Session) -> list[str]:
        """Return the listed meta-learners that this version does not have."""
        methods = [f"stacking_{learner}" for learner in session.config.runs.stacking.meta_learners]
        return [f"{name}: this version builds {', '.join(COMBINERS)}" for name in methods if name not in COMBINERS]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of members, images, settings and the fold networks that may replace the full networks."""
        members = self.members(session)
        extra_inputs = _extra_inputs(session.config, members, name)
        return fitting.inputs_digest(session.config, session.store, members, name, extra_inputs=extra_inputs)

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Select the networks of inference, then fit; a meta-learner whose library is missing is a failure."""
        config, store, members = session.config, session.store, self.members(session)
        session.ensure(members)
        facts = fitting.member_facts(store, members)
        measured = _measure_inference(session, members, facts)
        choices = {
            name: inference_choice.choose(
                config.runs.stacking.inference_members,
                measured,
                lacking=[member.name for member in _lacking(members)],
                feeds_fuser=_feeds_fuser(config, name),
            )
            for name in names
        }
        prepared = {
            inference: _prepare(session, members, facts, inference)
            for inference in dict.fromkeys(choice["chosen"] for choice in choices.values())
        }
        rows_of = {name: prepared[choices[name]["chosen"]][0] for name in names}
        demands = {
            name: COMBINERS[name].configured(config, facts).fit_demand(*rows.rows.logits.shape)
            for name, rows in rows_of.items()
        }
        refusals = {name: _refusal(config, name, demands[name], rows) for name, rows in rows_of.items()}
        failures = {name: f"{name}: {reason}" for name, reason in refusals.items() if reason is not None}
        # The longest first, so that the others fill the cores until it ends.
        by_duration = sorted(names, key=lambda name: -demands[name].seconds)
        tasks = [(name, choices[name]["chosen"]) for name in by_duration if name not in failures]
        for name, inference in tasks:
            n_rows = len(prepared[inference][0].fold)
            logger.info("fitting %s on %d out-of-sample rows of %d members", name, n_rows, len(members))
        results = family_fits.fit_each(
            _fit,
            tasks,
            shared=(config, facts, prepared),
            description="stackers",
            n_logits=next(iter(prepared.values()))[0].rows.logits.size,
            are_nested=True,
            n_bytes=max((demands[name].n_bytes for name, _ in tasks), default=0.0),
        )
        for (name, inference), fitted in zip(tasks, results, strict=True):
            try:
                if isinstance(fitted, UserError):
                    raise fitted
                fitting.save(
                    store,
                    name,
                    name,
                    fitted,
                    members,
                    prepared[inference][0],
                    extra_inputs=_extra_inputs(config, members, name),
                    notes={"inference_members": choices[name]},
                )
            except UserError as error:
                failures[name] = f"{name}: {error}"
        built = tuple(name for name in names if name not in failures)
        return Build(session, built, tuple(failures), tuple(failures.values()))

    def describe(self, session: Session, states: Mapping[str, str]) -> list[str]:
        """Return lines on each ensemble, its verdict and its networks, and once on the shift of members' confidence."""
        lines = []
        records = {name: ensembles.record_of(session.workspace, name) or {} for name in states}
        for name, record in records.items():
            lines += [summary_line(session.workspace, name, states[name]), f"    {record['verdict']}"]
            lines.append(f"    {inference_choice.summary_lines(record['inference_members'])[0]}")
        for record in list(records.values())[:1]:
            lines += inference_choice.summary_lines(record["inference_members"])[1:]
        return lines


def _fit(
    config: Config,
    facts: MemberFacts,
    prepared: Mapping[str, tuple[OutOfSampleRows, Baselines]],
    name_and_inference: tuple[str, str],
) -> Fitted:
    name, inference = name_and_inference
    rows, simple = prepared[inference]
    return fitting.fit(COMBINERS[name].configured(config, facts), rows, baselines=simple)


def _refusal(config: Config, name: str, demand: FitDemand, out_of_sample: OutOfSampleRows) -> str | None:
    """Return why a meta-learner cannot be fitted on this machine, as its fits take too much; None if it can."""
    reason = demand.refusal(n_fits(out_of_sample.fold) + 1, engines.cores())
    if reason is None:
        return None
    members, rows, classes = out_of_sample.rows.logits.shape
    others = [each for each in config.runs.stacking.meta_learners if f"stacking_{each}" != name]
    return (
        f"with {classes:,} classes, {members} members and {rows:,} rows {reason}. Leave it out: --set "
        f"runs.stacking.meta_learners=[{','.join(others)}]"
    )


def _measure_inference(session: Session, members: Sequence[Member], facts: MemberFacts) -> Measurement:
    """Compare full networks with the means of fold networks, if the latter may be selected.

    Raises UserError if the configuration requires fold networks and a member lacks them.
    """
    requested, lacking = session.config.runs.stacking.inference_members, _lacking(members)
    if requested == FOLDS and lacking:
        raise UserError(
            f"runs.stacking.inference_members is folds, and not every fold network is there of "
            f"{', '.join(member.name for member in lacking)}. "
            f"Make them: {catalog.kfold_command(session.workspace, lacking)}; or use the full networks: --set "
            "runs.stacking.inference_members=full"
        )
    full = session.rows(members)
    folds = None
    if requested != FULL and not lacking:
        fold_networks.ensure(session.store, members, ("val",), FOLDS)
        folds = session.rows(members, inference=FOLDS).rows
    return inference_choice.measure(session.config, facts, full.fold, full.rows, folds, full.groups)


def _prepare(
    session: Session, members: Sequence[Member], facts: MemberFacts, inference: str
) -> tuple[OutOfSampleRows, Baselines]:
    """Return the rows of the fit, with the networks of inference, and the baselines on them."""
    if inference != FULL:
        fold_networks.ensure(session.store, members, STREAMED_SPLITS, inference)
    fitted = session.rows(members, kind=session.config.runs.stacking.fit_rows, inference=inference)
    return fitted, fitting.measure_baselines(session.store, facts, fitted)


def _lacking(members: Sequence[Member]) -> list[Member]:
    """Return the members without a complete set of fold networks."""
    return [member for member in members if not fold_networks.stages(member)]


def _feeds_fuser(config: Config, method: str) -> bool:
    fuser = config.runs.meta_fuser
    return fuser.enable and (fuser.input_ensembles == ALL or method in fuser.input_ensembles)


def _extra_inputs(config: Config, members: Sequence[Member], method: str) -> list[Any]:
    """Return the extra inputs of a stacker: whether it is an input of the fuser, and its fold networks."""
    return [_feeds_fuser(config, method), [fold_networks.digest(member, FOLDS) for member in members]]


def _require_out_of_fold(session: Session, *, strict: bool) -> None:
    """Warn about members without out-of-fold predictions; raise UserError if `strict` or the section requires them."""
    members = session.members
    without = [member for member in members if not training_data.has_train_rows(session.store, member)]
    names = [member.name for member in without]
    if not without:
        return
    command = fitting.source_of_oof(session.store, without)
    for problem in session.catalog.problems:
        if problem.member in names and problem.code in REFUSED:
            logger.warning("%s: %s", problem.member, problem.message)
    if strict:
        raise UserError(
            f"No K-fold results for backbone {', '.join(names)}. Either make them: {command}; or exclude from "
            f"stacking: --set backbones.exclude=[{','.join(names)}]"
        )
    if len(without) < len(members):
        for member in without:
            if member.oof is not None:
                logger.warning(
                    "%s: left out: the weights that its training started from have seen train images (%s)",
                    *(member.name, member.pretrained_on),
                )
                continue
            logger.warning(
                "No K-fold results for backbone %s; it is left out. Either retrain with ENABLE_KFOLD_CV=True (%s), or "
                "add it to backbones.exclude",
                member.name,
                fitting.source_of_oof(session.store, [member]),
            )
        return
    if session.config.runs.stacking.fit_rows == "oof":
        raise LeakageError(
            f"runs.stacking.fit_rows is oof, and no member has out-of-fold predictions. Make them: {command}"
        )
    logger.warning(
        "no member has out-of-fold predictions: stacking is fitted and cross-fitted on val alone. Make them: %s",
        command,
    )
