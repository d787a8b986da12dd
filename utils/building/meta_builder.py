"""The command `meta-fuse`: a fuser on the cross-fitted predictions of the ensembles that the configuration names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import baselines, ensembles, fitting
from utils.building.ensembles import Ensemble
from utils.building.fitting import OutOfSampleRows
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError, did_you_mean
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.meta_methods import FUSERS, INPUT_METHODS, FuserInput, MetaFuserCombiner
from utils.predictions import catalog, extraction, fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FULL
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

NAME = METHOD = "meta_fuser"


def meta_fuse(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Fit the fuser on its inputs' cross-fitted predictions and on nothing else.

    Inputs that vote and are not there are built on the spot; others are named with the command that makes them, and
    fewer than two are refused. What is there with equal inputs is kept, unless `force`. Raises UserError without
    catalog, members or inputs.
    """
    require_enabled(config, "runs.meta_fuser")
    kind = config.runs.meta_fuser.fuser_type
    if kind not in FUSERS:
        raise UserError(
            f"{config.source}: runs.meta_fuser.fuser_type {kind}: this version builds {', '.join(FUSERS)}"
            f"{did_you_mean(kind, FUSERS)}"
        )
    store = Store(config, workspace, discover.verified_catalog(config, workspace))
    selected = catalog.select(store.catalog, config)
    found, failures = _inputs(store, selected)
    members = _members(store, found)
    extra_inputs = depends_on(config, found)
    wanted = fitting.inputs_digest(config, store, members, METHOD, extra_inputs=extra_inputs)
    fresh = force or ensembles.stored_digest(workspace, NAME) != wanted
    if fresh:
        fold_networks.ensure(store, members, STREAMED_SPLITS, _inference(found))
        known = fitting.member_facts(store, members)
        rows, inputs = _aligned(store, members, found)
        simple = baselines.measure(config, known, rows.rows.logits, rows.rows.labels, rows.fold)
        recipe = MetaFuserCombiner.over(config, known, inputs)
        logger.info("fitting %s (%s) on %s", NAME, kind, ", ".join(found))
        prior_provenance = [one.provenance for one in found.values()]
        fitting.build(
            store,
            NAME,
            METHOD,
            recipe,
            members,
            rows,
            extra_inputs=extra_inputs,
            prior_provenance=prior_provenance,
            baselines=simple,
        )
    store.digests.save()
    record = ensembles.record_of(workspace, NAME) or {}
    lines = [
        fitting.summary_line(store, NAME, "built" if fresh else "up to date"),
        f"    {record['verdict']}",
        f"inputs: {', '.join(found)}",
        f"written: {workspace.ensemble(NAME)}",
    ]
    document = {
        "built": [NAME] if fresh else [],
        "up_to_date": [] if fresh else [NAME],
        "inputs": list(found),
        "verdict": record["verdict"],
        "folder": str(workspace.models),
    }
    return Result("\n".join(lines), document, failures, "evaluate")


def depends_on(config: Config, found: Mapping[str, Ensemble]) -> dict[str, Any]:
    """What the fuser depends on beside members and images: its inputs, and the settings of its own kind."""
    own = FUSERS[config.runs.meta_fuser.fuser_type].settings
    return {"inputs": {name: one.inputs_digest for name, one in found.items()}, "settings": config.digest(*own)}


def _inputs(store: Store, selected: Sequence[Member]) -> tuple[dict[str, Ensemble], list[str]]:
    """The inputs that are there or can be made at once, by the names of their ensembles, and what is missing."""
    asked = store.config.runs.meta_fuser.input_ensembles
    names = {ensembles.NAMES.get(name, name): name for name in asked}
    known = [*ensembles.names(store.workspace), *ensembles.NAMES.values(), *INPUT_METHODS]
    found, failures = {}, []
    for name, typed in names.items():
        record = ensembles.record_of(store.workspace, name)
        method = next((method for method, ensemble in ensembles.NAMES.items() if ensemble == name), None)
        if record is None and method is not None:
            recipe = ensembles.COMBINERS[method].configured(store.config, fitting.member_facts(store, selected))
            extraction.ensure(store, selected, STREAMED_SPLITS)
            kind = store.config.runs.score_ensemble.fit_rows if recipe.learns else "honest"
            fitting.build(store, name, method, recipe, selected, fitting.out_of_sample_rows(store, selected, kind=kind))
        elif record is None:
            failures.append(
                f"{typed}: not built. Build it: {ensembles.build_command(typed)}{did_you_mean(typed, known)}"
            )
            continue
        ensemble = ensembles.load(store.workspace, name)
        if ensemble.method not in INPUT_METHODS:
            failures.append(f"{typed}: {ensemble.method} cannot be an input; these can: {', '.join(INPUT_METHODS)}")
            continue
        found[name] = ensemble
    if any(one.inference == FULL for one in found.values()):
        for name in [name for name, one in found.items() if one.inference != FULL]:
            del found[name]
            failures.append(
                f"{names[name]}: its members' fold networks answer, and full networks for the other inputs. Build it "
                "again: python ensemble_orchestrator.py stack --set runs.stacking.inference_members=full"
            )
    if len(found) < 2:
        raise UserError(
            f"{store.config.source}: runs.meta_fuser.input_ensembles leaves {len(found)} ensemble(s) to fuse, two are "
            f"needed. {'; '.join(failures)}"
        )
    return dict(sorted(found.items())), failures


def _inference(found: Mapping[str, Ensemble]) -> str:
    """Which networks answer for the members of the inputs; it is the same for all."""
    return next(iter(found.values())).inference


def _members(store: Store, found: Mapping[str, Ensemble]) -> list[Member]:
    """The members of all inputs, by name. Raises UserError where one is gone or has another checkpoint now."""
    for ensemble in found.values():
        missing, changed = fold_networks.missing_and_changed(store.catalog.members, ensemble)
        for name in (*missing, *changed):
            state = "is no longer in the catalog" if name in missing else "has another checkpoint now"
            raise UserError(f"{name} {state}; build the inputs again: python ensemble_orchestrator.py build-ensemble")
    needed = {name for ensemble in found.values() for name in ensemble.members}
    return [store.catalog.members[name] for name in sorted(needed)]


def _aligned(
    store: Store, members: Sequence[Member], found: Mapping[str, Ensemble]
) -> tuple[OutOfSampleRows, list[FuserInput]]:
    """The honest rows that all inputs have cross-fitted predictions on, and the inputs with those predictions."""
    honest = fitting.out_of_sample_rows(store, members, inference=_inference(found))
    keys = list(zip(honest.rows.split.tolist(), honest.rows.sample_ids.tolist(), strict=True))
    crossfit = {name: ensembles.load_crossfit(store.workspace, name) for name in found}
    place_of = {name: {key: place for place, key in enumerate(one.keys())} for name, one in crossfit.items()}
    shared = [place for place, key in enumerate(keys) if all(key in places for places in place_of.values())]
    if len(shared) < len(keys):
        logger.warning("%d of %d honest rows are not shared by all inputs", len(keys) - len(shared), len(keys))
    if not shared:
        raise UserError(
            f"no row on which all of {', '.join(found)} have cross-fitted predictions; give them the same fit_rows and "
            "build them again"
        )
    rows = honest.rows.take(np.array(shared))
    inputs = []
    for name, one in found.items():
        own = [place_of[name][keys[place]] for place in shared]
        places = np.array([rows.members.index(member) for member in one.members])
        inputs.append(FuserInput(one.method, one.combiner, places, crossfit[name].probabilities[own]))
    return OutOfSampleRows(rows, honest.fold[shared]), inputs
