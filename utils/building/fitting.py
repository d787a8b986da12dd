"""Fit one combiner and save it as an ensemble: out-of-sample rows, cross-fitted predictions, provenance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.baselines import Baselines, compare, measure
from utils.building.ensembles import Crossfit, Ensemble, Provenance, RowSet
from utils.combiners.protocol import Combiner, MemberFacts
from utils.core.artifacts import digest_of
from utils.core.config import Config
from utils.core.errors import LeakageError, UserError
from utils.numeric.metrics import accuracy, log_loss, log_loss_per_row
from utils.numeric.nested_cv import selects_by_row
from utils.predictions import catalog, fold_networks, training_data
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.folds import crossfit_folds
from utils.predictions.row_groups import row_groups
from utils.predictions.rows import Rows
from utils.predictions.store import IMPORT, Store

logger = logging.getLogger("disease_pipeline")

KINDS_OF_ROWS = {"train": "oof", "val": "held_out"}


@dataclass(frozen=True)
class OutOfSampleRows:
    """Out-of-sample predictions of some members, with the workspace's cross-fitting folds of the rows."""

    rows: Rows
    fold: np.ndarray
    """int64 (N,)"""
    groups: np.ndarray | None = None
    """int64 (N,): rows of one group are not independent; None if all rows are independent"""

    def of_split(self, split: str) -> OutOfSampleRows:
        """Return the rows of one split."""
        indices = np.flatnonzero(self.rows.split == split)
        groups = None if self.groups is None else self.groups[indices]
        return OutOfSampleRows(self.rows.take(indices), self.fold[indices], groups)


def out_of_sample_rows(
    store: Store, members: Sequence[Member], *, kind: str = "honest", inference: str = fold_networks.FULL
) -> OutOfSampleRows:
    """Return the rows on which every member has an out-of-sample prediction: out-of-fold on train, held out on val.

    If no member, or only some members have out-of-fold predictions, these are the val rows, with a warning. Derived
    members never have any, so that the warning names them only if other members do. `kind` is that of `rows_of_kind`;
    `inference` selects the networks that predict on val.
    """
    rows = fold_networks.out_of_sample(store, members, inference)
    without, derived = _without_train_rows(store, members)
    for member in without:
        is_imported = member.source == IMPORTED
        logger.warning(
            "%s %s", "No oof.npz of member" if is_imported else "No K-fold results for backbone", member.name
        )
    if without:
        source = source_of_oof(store, without)
        logger.warning(
            "only the val rows are out-of-sample for all members; out-of-fold predictions come from: %s", source
        )
    elif 0 < len(derived) < len(members):
        logger.warning(
            "only the val rows are out-of-sample for all members; derived ones have no others: %s", ", ".join(derived)
        )
    if len(np.unique(rows.labels)) < 2:
        raise UserError(
            f"all {len(rows.labels)} out-of-sample rows that the members share are of class "
            f"{rows.classes[rows.labels[0]]}; nothing can be learned from one class. Give predictions of the others, "
            "on train (out-of-fold) or val"
        )
    return rows_of_kind(store, members, with_folds(store, rows), kind)


def rows_of_kind(store: Store, members: Sequence[Member], rows: OutOfSampleRows, kind: str) -> OutOfSampleRows:
    """Return the rows of a kind: honest (all), val or oof. Raises LeakageError if there are none of this kind."""
    if kind == "honest":
        return rows
    split = {"val": "val", "oof": "train"}[kind]
    selected = rows.of_split(split)
    if len(selected.fold):
        return selected
    without, derived = _without_train_rows(store, members)
    remedies = [f"Make them: {source_of_oof(store, without)}"] if kind == "oof" and without else []
    remedies += [f"Leave out what is derived: {', '.join(derived)}"] if kind == "oof" and derived else []
    remedies += [f"Make them: val.npz and {IMPORT}"] if kind == "val" else []
    raise LeakageError(
        f"fit_rows: {kind} asks for {KINDS_OF_ROWS[split]} rows, which not all of {', '.join(rows.rows.members)} have. "
        f"{'. '.join(remedies)}; or set fit_rows to honest"
    )


def _without_train_rows(store: Store, members: Sequence[Member]) -> tuple[list[Member], list[str]]:
    """Return the members without out-of-sample train rows, and the names of derived ones, which cannot have any."""
    lacking = [member for member in members if not training_data.has_train_rows(store, member)]
    without = [member for member in lacking if member.source != "derived"]
    return without, [member.name for member in lacking if member.source == "derived"]


def with_folds(store: Store, rows: Rows) -> OutOfSampleRows:
    """Return rows of train and val with the workspace's folds and groups; warns about fewer than three folds.

    Raises UserError if all rows are in one fold.
    """
    folds = crossfit_folds(store)
    keys = list(zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
    fold = np.array([folds[key] for key in keys])
    count = len(np.unique(fold))
    if count < 2:
        raise UserError(
            f"all {len(fold)} out-of-sample rows that {', '.join(rows.members)} share are in one cross-fitting fold; "
            "two are needed. Give predictions of more samples, on train (out-of-fold) or val"
        )
    if selects_by_row(fold):
        logger.warning(
            "the %d out-of-sample rows are in %d cross-fitting folds: settings are selected on single rows held out, "
            "which rows of the same group may make too optimistic",
            *(len(fold), count),
        )
    return OutOfSampleRows(rows, fold, row_groups(store, keys))


def source_of_oof(store: Store, members: Sequence[Member]) -> str:
    """Return the command, or the import, that makes out-of-fold predictions of these members."""
    trained = [member for member in members if member.source != IMPORTED]
    imported = [f"oof.npz and {IMPORT}"] if len(trained) < len(members) else []
    return "; ".join([*([catalog.kfold_command(store.workspace, trained)] if trained else []), *imported])


def member_facts(store: Store, members: Sequence[Member], latencies: Mapping[str, float] | None = None) -> MemberFacts:
    """Return the facts about members that a combiner may use; `latencies` are {member: milliseconds per image}."""
    measured = latencies or {}
    nan = float("nan")
    return MemberFacts(
        names=tuple(member.name for member in members),
        recorded_accuracy=np.array(
            [nan if member.recorded_accuracy is None else member.recorded_accuracy for member in members]
        ),
        latency_ms=np.array([measured.get(member.name, nan) for member in members]),
        size_mb=np.array([_size_mb(store, member) for member in members]),
    )


@dataclass(frozen=True)
class Fitted:
    """A combiner fitted on all out-of-sample rows."""

    combiner: Combiner
    """Over all M members of the rows."""
    crossfit: Crossfit
    used: np.ndarray
    """bool (M,): whether the combiner needs the member"""
    entries: dict[str, Any]
    """Entries of `ensemble.json` on the fit."""
    baselines: Baselines | None = None
    """Baselines that it was compared with."""


def measure_baselines(store: Store, facts: MemberFacts, out_of_sample: OutOfSampleRows) -> Baselines:
    """Return `baselines.measure` of the members, in the order of `facts`, on out-of-sample rows."""
    rows = out_of_sample.rows
    return measure(
        store.workspace, store.config, facts, rows.logits, rows.labels, out_of_sample.fold, out_of_sample.groups
    )


def fit(recipe: Combiner, out_of_sample: OutOfSampleRows, *, baselines: Baselines | None = None) -> Fitted:
    """Cross-fit an unfitted combiner and fit it on all rows, compared with baselines; no file is read or written."""
    return evaluate_fit(
        recipe, ensembles.crossfit(recipe, out_of_sample.rows, out_of_sample.fold), out_of_sample, baselines
    )


def evaluate_fit(
    combiner: Combiner, crossfit: Crossfit, out_of_sample: OutOfSampleRows, baselines: Baselines | None = None
) -> Fitted:
    """Evaluate a fitted combiner by its cross-fitted predictions, compared with baselines on the same rows."""
    names = out_of_sample.rows.members
    comparison: dict[str, Any] = {}
    if baselines is not None:
        comparison = compare(baselines, log_loss_per_row(crossfit.probabilities, crossfit.labels))
        comparison["baselines_digest"] = baselines.digest
    mixture = {"uniform_weight": combiner.uniform_weight} if combiner.uniform_weight else {}
    entries = {**combiner.report(names), **mixture, **comparison, "crossfit": scores(crossfit)}
    return Fitted(combiner, crossfit, combiner.used(len(names)), entries, baselines)


def save(
    store: Store,
    name: str,
    method: str,
    fitted: Fitted,
    members: Sequence[Member],
    out_of_sample: OutOfSampleRows,
    *,
    extra_inputs: Any = None,
    prior_provenance: Sequence[Provenance] = (),
    notes: Mapping[str, Any] | None = None,
    post_fit: Callable[[Combiner, Crossfit], Mapping[str, Any]] | None = None,
) -> Ensemble:
    """Save a fit on all out-of-sample rows as an ensemble of the members that it needs.

    Args:
        fitted: A combiner over `members`, which are sorted by name.
        extra_inputs: Inputs of the ensemble besides members, images and settings, as JSON values for the record.
        prior_provenance: Rows that parts of the combiner, or its selection, were fitted or selected on before.
        notes: Further entries of `ensemble.json`.
        post_fit: Returns further entries of `ensemble.json`, given the fitted combiner over all members and its
            cross-fitted predictions.
    """
    rows, combiner = out_of_sample.rows, fitted.combiner
    fitted_on = Provenance(row_sets(rows) if combiner.learns else (), ())
    needed_members = [member for member, needed in zip(members, fitted.used, strict=True) if needed]
    # The copies of the recipe that make the cross-fitted predictions may need any of the candidates.
    unknown = training_data.unknown_names(store.catalog, rows.members)
    networks = replace(ensembles.network_provenance(store, needed_members), unknown_training_data=tuple(unknown))
    ensemble = Ensemble(
        name=name,
        method=method,
        members=tuple(member.name for member in needed_members),
        candidates=rows.members,
        classes=rows.classes,
        combiner=combiner.restricted(fitted.used),
        provenance=ensembles.merge_provenance([networks, fitted_on, *prior_provenance]),
        inputs_digest=inputs_digest(store.config, store, members, method, extra_inputs=extra_inputs),
        member_digests={member.name: fold_networks.digest(member, rows.inference) for member in members},
        seed=store.config.seed,
        inference=rows.inference,
        training_data=training_data.stated(store.catalog, rows.members),
    )
    record: dict[str, Any] = {
        **(notes or {}),
        **fitted.entries,
        **(post_fit(combiner, fitted.crossfit) if post_fit else {}),
        **({} if extra_inputs is None else {"depends_on": extra_inputs}),
        **({"overrides": list(recorded)} if (recorded := store.config.recorded_overrides) else {}),
        "config_digest": store.config.digest(*combiner.settings, "dataset.group_regex", "seed"),
    }
    ensembles.save(
        store.workspace, ensemble, fitted.crossfit, record, fitted.baselines.losses if fitted.baselines else None
    )
    logger.info("built %s from %d of %d members", name, len(ensemble.members), len(rows.members))
    return ensemble


def scores(crossfit: Crossfit) -> dict[str, Any]:
    """Return `{n, folds, selected_by, accuracy, log_loss}` of cross-fitted predictions.

    `selected_by` states what settings are selected on: held-out `folds`, or single `rows`, see `inner_folds`.
    """
    return {
        "n": len(crossfit.labels),
        "folds": len(np.unique(crossfit.fold)),
        "selected_by": "rows" if selects_by_row(crossfit.fold) else "folds",
        "accuracy": accuracy(crossfit.probabilities, crossfit.labels),
        "log_loss": log_loss(crossfit.probabilities, crossfit.labels),
    }


def inputs_digest(
    config: Config, store: Store, members: Sequence[Member], method: str, *, extra_inputs: Any = None
) -> str:
    """Return the digest of everything that an ensemble depends on; needs no image and no checkpoint.

    `extra_inputs` are JSON values besides members, images and settings, such as digests of other ensembles or measured
    latencies.
    """
    oof = {member.name: member.oof["sha256"] if member.oof else None for member in members}
    keys = {member.name: store.key(member, "val") for member in members}
    settings = ensembles.COMBINERS[method].settings
    recorded = [member.recorded_accuracy for member in members] if settings else None
    splits = [store.catalog.splits[split]["digest"] for split in KINDS_OF_ROWS]  # which decide the folds
    rule = config.digest(*settings, "dataset.group_regex", "seed")
    stated = training_data.stated(store.catalog, keys)
    return digest_of(
        [ensembles.VERSION, method, keys, oof, recorded, splits, rule, extra_inputs, *([stated] if stated else [])]
    )


def row_sets(rows: Rows) -> tuple[RowSet, ...]:
    """Return the rows for a provenance, one set per split; rows that a network was trained on are `in_sample`."""
    sets = []
    for split in np.unique(rows.split).tolist():
        inside = rows.split == split
        kind = KINDS_OF_ROWS[split] if rows.out_of_sample[inside].all() else "in_sample"
        sets.append(RowSet(split, kind, tuple(rows.sample_ids[inside].tolist())))
    return tuple(sets)


def _size_mb(store: Store, member: Member) -> float:
    if member.source == IMPORTED:
        return float("nan")
    path: Path = store.workspace.base / member.checkpoints[0]["path"]
    return path.stat().st_size / 1e6 if path.is_file() else float("nan")
