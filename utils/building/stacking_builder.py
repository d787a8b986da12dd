"""The command `stack`: meta-learners on the members' out-of-fold outputs, beside what is simpler."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from utils.building import baselines, ensembles, fitting, inference_choice
from utils.building.baselines import Baselines
from utils.building.fitting import OutOfSampleRows
from utils.building.inference_choice import Measurement
from utils.combiners.protocol import MemberFacts
from utils.core.config import Config, require_enabled
from utils.core.errors import LeakageError, UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.predictions import catalog, extraction, fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FOLDS, FULL
from utils.predictions.inspection import REFUSING
from utils.predictions.store import Store
from utils.stacking_methods import COMBINERS

logger = logging.getLogger("disease_pipeline")

REFUSED = ("oof_refused", *REFUSING)
"""Codes of what discovery holds against out-of-fold predictions that it does not use."""


def stack(config: Config, workspace: Workspace, *, strict: bool = False, force: bool = False) -> Result:
    """Fit the meta-learners that the configuration lists on honest rows.

    Members without out-of-fold predictions are left out with a warning, or refused when `strict`; where none has them,
    the meta-learners are fitted and cross-fitted on val, said in words. What is there with equal inputs is kept, unless
    `force`. Raises UserError without catalog or members.
    """
    require_enabled(config, "runs.stacking")
    found = discover.verified_catalog(config, workspace)
    store = Store(config, workspace, found)
    members = _with_out_of_fold(store, catalog.select(found, config), strict)
    methods = [f"stacking_{learner}" for learner in config.runs.stacking.meta_learners]
    unknown = [method for method in methods if method not in COMBINERS]
    failures = [f"{method}: this version builds {', '.join(COMBINERS)}" for method in unknown]
    wanted = [method for method in methods if method in COMBINERS]
    extra_inputs = {method: _fold_inputs(config, members, method) for method in wanted}
    digests = {m: fitting.inputs_digest(config, store, members, m, extra_inputs=extra_inputs[m]) for m in wanted}
    fresh = [m for m in wanted if force or ensembles.stored_digest(workspace, m) != digests[m]]
    failed = _fitted(store, members, fresh, extra_inputs)
    failures += [f"{method}: {reason}" for method, reason in failed.items()]
    wanted, fresh = ([method for method in some if method not in failed] for some in (wanted, fresh))
    if not wanted:
        raise UserError("; ".join(failures))
    store.digests.save()
    records = {method: ensembles.record_of(workspace, method) or {} for method in wanted}
    lines = []
    for method, record in records.items():
        lines += [
            fitting.summary_line(store, method, "built" if method in fresh else "up to date"),
            f"    {record['verdict']}",
        ]
        lines.append(f"    {inference_choice.summary_lines(record['inference_members'])[0]}")
    for record in list(records.values())[:1]:
        lines += inference_choice.summary_lines(record["inference_members"])[1:]
    lines += [f"{len(members)} members: {', '.join(member.name for member in members)}", f"written: {workspace.models}"]
    document = {
        "built": sorted(fresh),
        "up_to_date": sorted(set(wanted) - set(fresh)),
        "members": [member.name for member in members],
        "verdicts": {method: record["verdict"] for method, record in records.items()},
        "inference_members": {method: record["inference_members"] for method, record in records.items()},
        "folder": str(workspace.models),
    }
    return Result("\n".join(lines), document, failures, "evaluate")


def _fitted(
    store: Store, members: Sequence[Member], fresh: Sequence[str], extra_inputs: Mapping[str, Any]
) -> dict[str, UserError]:
    """Fit and save these; {method: what kept it from being fitted}, such as a library that is not there."""
    if not fresh:
        return {}
    extraction.ensure(store, members, STREAMED_SPLITS)
    known = fitting.member_facts(store, members)
    measured = _measured(store, members, known)
    prepared: dict[str, tuple[OutOfSampleRows, Baselines]] = {}
    failed = {}
    for method in fresh:
        choice = inference_choice.choose(
            store.config.runs.stacking.inference_members,
            measured,
            lacking=_lacking(members),
            feeds_fuser=_feeds_fuser(store.config, method),
        )
        inference = choice["chosen"]
        if inference not in prepared:
            prepared[inference] = _prepared(store, members, known, inference)
        honest, simple = prepared[inference]
        logger.info("fitting %s on %d honest rows of %d members", method, len(honest.fold), len(members))
        recipe = COMBINERS[method].configured(store.config, known)
        notes = {"inference_members": choice}
        try:
            fitting.build(
                store,
                method,
                method,
                recipe,
                members,
                honest,
                extra_inputs=extra_inputs[method],
                baselines=simple,
                notes=notes,
            )
        except UserError as error:
            failed[method] = error
    return failed


def _measured(store: Store, members: Sequence[Member], known: MemberFacts) -> Measurement:
    """Full networks beside the means of fold networks, where these may be chosen.

    Raises UserError where fold networks are asked for and a member lacks them.
    """
    asked, lacking = store.config.runs.stacking.inference_members, _lacking(members)
    if asked == FOLDS and lacking:
        raise UserError(
            f"runs.stacking.inference_members is folds, and not every fold network is there of {', '.join(lacking)}. "
            f"Make them: {catalog.kfold_command(store.workspace, lacking)}; or use the full networks: --set "
            "runs.stacking.inference_members=full"
        )
    full = fitting.out_of_sample_rows(store, members)
    folds = None
    if asked != FULL and not lacking:
        fold_networks.ensure(store, members, ("val",), FOLDS)
        folds = fitting.out_of_sample_rows(store, members, inference=FOLDS).rows
    return inference_choice.measure(store.config, known, full.fold, full.rows, folds)


def _prepared(
    store: Store, members: Sequence[Member], known: MemberFacts, inference: str
) -> tuple[OutOfSampleRows, Baselines]:
    """The rows to fit on and the simple combinations on them, by the networks that are to answer."""
    fold_networks.ensure(store, members, STREAMED_SPLITS, inference)
    honest = fitting.out_of_sample_rows(store, members, kind=store.config.runs.stacking.fit_rows, inference=inference)
    return honest, baselines.measure(store.config, known, honest.rows.logits, honest.rows.labels, honest.fold)


def _lacking(members: Sequence[Member]) -> list[str]:
    """Members without a complete set of fold networks."""
    return [member.name for member in members if not fold_networks.stages(member)]


def _feeds_fuser(config: Config, method: str) -> bool:
    fuser = config.runs.meta_fuser
    return fuser.enable and method in fuser.input_ensembles


def _fold_inputs(config: Config, members: Sequence[Member], method: str) -> list[Any]:
    """What a stacker depends on beside what every ensemble does: whether it feeds the fuser, and the fold networks."""
    return [_feeds_fuser(config, method), [fold_networks.digest(member, FOLDS) for member in members]]


def _with_out_of_fold(store: Store, members: Sequence[Member], strict: bool) -> list[Member]:
    """The members that have out-of-fold predictions; all of them, with a warning, where none has."""
    without = [member for member in members if member.oof is None]
    names = [member.name for member in without]
    if not without:
        return list(members)
    command = fitting.source_of_oof(store, without)
    for problem in store.catalog.problems:
        if problem.member in names and problem.code in REFUSED:
            logger.warning("%s: %s", problem.member, problem.message)
    if strict:
        raise UserError(
            f"No K-fold results for backbone {', '.join(names)}. Either make them: {command}; or exclude from "
            f"stacking: --set backbones.exclude=[{','.join(names)}]"
        )
    if len(without) < len(members):
        for member in without:
            logger.warning(
                "No K-fold results for backbone %s; it is left out. Either retrain with ENABLE_KFOLD_CV=True (%s), or "
                "add it to backbones.exclude",
                member.name,
                fitting.source_of_oof(store, [member]),
            )
        return [member for member in members if member.oof is not None]
    if store.config.runs.stacking.fit_rows == "oof":
        raise LeakageError(
            f"runs.stacking.fit_rows is oof, and no member has out-of-fold predictions. Make them: {command}"
        )
    logger.warning(
        "no member has out-of-fold predictions: stacking is fitted and cross-fitted on val alone. Make them: %s",
        command,
    )
    return list(members)
