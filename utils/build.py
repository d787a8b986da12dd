"""The commands that make ensembles: which members, which rows, honest or refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils import catalog, ensembles
from utils.artifacts import digest_of
from utils.catalog import Member
from utils.config import Config, require_enabled
from utils.ensembles import Ensemble, Provenance, RowSet
from utils.errors import UserError
from utils.metrics import accuracy, log_loss
from utils.predictions import Rows, Store, align, crossfit_folds
from utils.results import Result
from utils.workspace import Workspace

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same inputs would give another ensemble
STREAMED = ("val", "test")  # one pass serves the honest rows and the evaluation that follows


def build_ensemble(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Build the score-level ensembles that the configuration lists, from honest predictions.

    What is there with equal inputs is kept, unless `force`. Raises UserError without catalog or members; methods that
    this version does not build are failures of the result.
    """
    require_enabled(config, "runs.score_ensemble")
    found = catalog.load(workspace)
    members = catalog.select(found, config)
    store = Store(config, workspace, found)
    methods = list(config.runs.score_ensemble.methods)
    unknown = [method for method in methods if method not in ensembles.COMBINERS]
    failures = [f"{method}: this version builds {', '.join(ensembles.COMBINERS)}" for method in unknown]
    failures += _sections_without_builder(config)
    wanted = [method for method in methods if method in ensembles.COMBINERS]
    if not wanted:
        raise UserError(
            f"{config.source}: runs.score_ensemble.methods names nothing that can be built "
            f"({', '.join(methods) or 'empty'}); choose from {', '.join(ensembles.COMBINERS)}"
        )
    digests = {method: inputs_digest(config, store, members, method) for method in wanted}
    fresh = [
        method
        for method in wanted
        if force or ensembles.stored_digest(workspace, ensembles.NAMES[method]) != digests[method]
    ]
    lines, built = [], {}
    if fresh:
        store.ensure(members, STREAMED)
        honest = honest_rows(store, members)
        folds = crossfit_folds(store)
        for method in fresh:
            name = ensembles.NAMES[method]
            built[name] = _build(store, members, method, honest, folds, digests[method])
            logger.info("built %s from %d members", name, len(members))
        store.digests.save()
    for method in wanted:
        name = ensembles.NAMES[method]
        state = "built" if name in built else "up to date"
        unseen = ensembles.load_crossfit(workspace, name)
        scores = f"{accuracy(unseen.probabilities, unseen.labels):.4f}"
        loss = f"{log_loss(unseen.probabilities, unseen.labels):.4f}"
        lines.append(f"{name:27} {state:11} accuracy {scores}  log-loss {loss}  on {len(unseen.labels)} honest rows")
    lines.append(f"{len(members)} members: {', '.join(member.name for member in members)}")
    lines.append(f"written: {workspace.models}")
    lines.append("next: python ensemble_orchestrator.py evaluate")
    document = {
        "built": sorted(built),
        "up_to_date": sorted(ensembles.NAMES[method] for method in wanted if ensembles.NAMES[method] not in built),
        "members": [member.name for member in members],
        "folder": str(workspace.models),
    }
    return Result("\n".join(lines), document, failures)


def honest_rows(store: Store, members: Sequence[Member]) -> Rows:
    """The rows on which every member has an honest prediction: out-of-fold on train, held out on val.

    Where no member has out-of-fold predictions these are the val rows, said in words. Where some have, the others'
    lack is said and the val rows are what all share.
    """
    parts = store.honest_parts(members)
    without = [member.name for member in members if not any(part.split == "train" for part in parts[member.name])]
    for name in without:
        logger.warning("No K-fold results for backbone %s", name)
    if without:
        logger.warning(
            "only the val rows are honest for all members; out-of-fold predictions come from: %s",
            catalog.kfold_command(store.workspace, without),
        )
    return align(parts, store.catalog.classes)


def _build(
    store: Store,
    members: Sequence[Member],
    method: str,
    honest: Rows,
    folds: Mapping[tuple[str, str], int],
    digest: str,
) -> Ensemble:
    make = ensembles.COMBINERS[method]
    unseen = ensembles.crossfit(make, honest, folds)
    combiner = make().fit(honest.logits, honest.labels)
    seen = ensembles.network_provenance(store)
    if combiner.learns:
        seen = Provenance((*seen.fitted_on, *_row_sets(honest)), seen.selected_on)
    ensemble = Ensemble(
        name=ensembles.NAMES[method],
        method=method,
        members=honest.members,
        classes=honest.classes,
        combiner=combiner,
        provenance=seen,
        inputs_digest=digest,
        member_digests={member.name: member.digest for member in members},
        seed=store.config.seed,
    )
    record: dict[str, Any] = {
        "config_digest": store.config.digest("backbones", "runs.score_ensemble", "dataset.group_regex", "seed"),
        "crossfit": {
            "n": len(unseen.labels),
            "accuracy": accuracy(unseen.probabilities, unseen.labels),
            "log_loss": log_loss(unseen.probabilities, unseen.labels),
        },
    }
    ensembles.save(store.workspace, ensemble, unseen, record)
    return ensemble


def _row_sets(rows: Rows) -> tuple[RowSet, ...]:
    kinds = {"train": "oof", "val": "held_out"}
    return tuple(
        RowSet(split, kinds[split], tuple(rows.sample_ids[rows.split == split].tolist()))
        for split in np.unique(rows.split).tolist()
    )


def inputs_digest(config: Config, store: Store, members: Sequence[Member], method: str) -> str:
    """Everything an ensemble depends on; found without opening an image or a checkpoint."""
    oof = {member.name: member.oof["sha256"] if member.oof else None for member in members}
    keys = {member.name: store.key(member, "val") for member in members}
    rule = config.digest("dataset.group_regex", "seed")
    return digest_of([VERSION, method, keys, oof, store.catalog.splits["train"]["digest"], rule])


def _sections_without_builder(config: Config) -> list[str]:
    """Switched-on sections of this command that this version does not build."""
    sections = {
        "runs.model_soup": config.runs.model_soup.enable,
        "runs.snapshot_ensemble": config.runs.snapshot_ensemble.enable,
        "pruning": config.pruning.enable,
    }
    return [f"{place}: not built by this version" for place, enabled in sections.items() if enabled]
