"""The command `stack`: meta-learners on the members' out-of-fold outputs, beside what is simpler."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from utils import catalog, ensembles, fitting, guards
from utils.catalog import Member
from utils.config import Config, require_enabled
from utils.errors import HonestyError, UserError
from utils.predictions import Store
from utils.results import Result
from utils.stacking_methods import COMBINERS
from utils.workspace import Workspace

logger = logging.getLogger("disease_pipeline")

STREAMED = ("val", "test")


def stack(config: Config, workspace: Workspace, *, strict: bool = False, force: bool = False) -> Result:
    """Fit the meta-learners that the configuration lists on honest rows.

    Members without out-of-fold predictions are left out with a warning, or refused when `strict`; where none has them,
    the meta-learners are fitted and cross-fitted on val, said in words. What is there with equal inputs is kept, unless
    `force`. Raises UserError without catalog or members.
    """
    require_enabled(config, "runs.stacking")
    found = catalog.load(workspace)
    store = Store(config, workspace, found)
    members = _with_out_of_fold(store, catalog.select(found, config), strict)
    methods = [f"stacking_{learner}" for learner in config.runs.stacking.meta_learners]
    unknown = [method for method in methods if method not in COMBINERS]
    failures = [f"{method}: this version builds {', '.join(COMBINERS)}" for method in unknown]
    wanted = [method for method in methods if method in COMBINERS]
    digests = {method: fitting.inputs_digest(config, store, members, method) for method in wanted}
    fresh = [m for m in wanted if force or ensembles.stored_digest(workspace, m) != digests[m]]
    if fresh:
        store.ensure(members, STREAMED)
        honest = fitting.honest_rows(store, members, kind=config.runs.stacking.fit_rows)
        known = fitting.facts(store, members)
        simple = guards.measure(config, known, honest.rows.logits, honest.rows.labels, honest.fold)
        for method in fresh:
            logger.info("fitting %s on %d honest rows of %d members", method, len(honest.fold), len(members))
            recipe = COMBINERS[method].configured(config, known)
            fitting.build(store, method, method, recipe, members, honest, beside=simple)
    store.digests.save()
    lines = []
    for method in wanted:
        verdict = ensembles.record_of(workspace, method)["verdict"]
        lines += [fitting.line(store, method, "built" if method in fresh else "up to date"), f"    {verdict}"]
    lines += [f"{len(members)} members: {', '.join(member.name for member in members)}", f"written: {workspace.models}"]
    document = {
        "built": sorted(fresh),
        "up_to_date": sorted(set(wanted) - set(fresh)),
        "members": [member.name for member in members],
        "verdicts": {method: ensembles.record_of(workspace, method)["verdict"] for method in wanted},
        "folder": str(workspace.models),
    }
    return Result("\n".join(lines), document, failures, "evaluate")


def _with_out_of_fold(store: Store, members: Sequence[Member], strict: bool) -> list[Member]:
    """The members that have out-of-fold predictions; all of them, with a warning, where none has."""
    without = [member for member in members if member.oof is None]
    names = [member.name for member in without]
    if not without:
        return list(members)
    command = fitting.source_of_oof(store, without)
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
        raise HonestyError(
            f"runs.stacking.fit_rows is oof, and no member has out-of-fold predictions. Make them: {command}"
        )
    logger.warning(
        "no member has out-of-fold predictions: stacking is fitted and cross-fitted on val alone. Make them: %s",
        command,
    )
    return list(members)
