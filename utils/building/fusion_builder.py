"""The section `runs.fusion` of `fusion-train`: heads on the members' embeddings, compared with baselines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.building import embedding_rows, end_to_end, ensembles, family_fits, fitting
from utils.building.baselines import Baselines
from utils.building.builder_protocol import Build, Builder, Session, summary_line
from utils.building.embedding_rows import EmbeddedRows
from utils.building.ensembles import Crossfit, Provenance
from utils.building.fitting import OutOfSampleRows
from utils.combiners.protocol import Combiner, MemberFacts
from utils.core.config import Config
from utils.core.errors import UserError
from utils.fusion_methods import COMBINERS
from utils.numeric.means import mean_interval
from utils.numeric.metrics import log_loss, log_loss_per_row
from utils.numeric.nested_cv import inner_folds
from utils.numeric.setting_paths import FIT_THREADS, torch_threads
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FOLDS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VAL, ALIGNED, IN_SAMPLE = "val", "aligned", "in_sample"


@dataclass(frozen=True)
class Basis:
    """Rows that heads are fitted on, rows that evaluate them, and the baselines on the latter."""

    fitted: OutOfSampleRows
    judged: OutOfSampleRows
    simple: Baselines
    facts: dict[str, Any]
    """Facts about the members' alignment."""


@dataclass(frozen=True)
class Fit:
    """A fitted fusion and its out-of-sample predictions."""

    recipe: Combiner
    crossfit: Crossfit

    def log_loss(self, split: str) -> float | None:
        """Return the log-loss on the rows of a split; None if there are no predictions for it."""
        rows = self.crossfit.split == split
        return log_loss(self.crossfit.probabilities[rows], self.crossfit.labels[rows]) if rows.any() else None


class FusionBuilder(Builder):
    """One ensemble per head of the section, on the embeddings of the members that have any."""

    config_key = "runs.fusion"

    def names(self, session: Session) -> list[str]:
        """Return one name per head."""
        section = session.config.runs.fusion
        return [f"fusion_{method}" for method in section.fusion_methods] if section.enable else []

    def members(self, session: Session) -> Sequence[Member]:
        """Return the members that have embeddings, as far as this is known before they are streamed."""
        return [member for member in session.members if not session.store.lacks_embeddings(member)]

    def check(self, session: Session) -> None:
        """Raise UserError if fewer than two members have embeddings, or if one has no network to train end to end."""
        if session.config.runs.fusion.end_to_end:
            end_to_end.require_networks(session.members)
        _require_two(session, self.members(session))

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of members, images, settings and the fold networks whose embeddings may be aligned."""
        members = self.members(session)
        extra_inputs = _fold_inputs(members)
        return fitting.inputs_digest(session.config, session.store, members, name, extra_inputs=extra_inputs)

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """Return why the ensemble is stale; with `end_to_end`, its networks are compared as well."""
        if session.config.runs.fusion.end_to_end:
            is_current = end_to_end.is_current(session.store, self.members(session), name, record)
            return None if is_current else "its networks, images or settings have changed since the build"
        return super().stale_reason(session, name, record)

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Fit the heads on embeddings of out-of-sample rows, or train them together with the networks."""
        _stream(session, self.members(session))
        members = self.members(session)
        lacking = [member.name for member in session.members if member not in members]
        if lacking:
            logger.warning("no embeddings, so left out of the fusion: %s", ", ".join(lacking))
        _require_two(session, members)
        if session.config.runs.fusion.end_to_end:
            return _train(session, members, names, force)
        return _fit_all(session, members, names)

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """Return the lines on the ensemble, its verdict, the rows of its fit, and the gain of end-to-end training."""
        record = ensembles.record_of(session.workspace, name) or {}
        source = record["train_embeddings"]
        lines = [summary_line(session.workspace, name, state), f"    {record['verdict']}"]
        lines.append(f"    train embeddings: {source['chosen']} ({source['reason']})")
        return lines + ([f"    {end_to_end.summary_line(record)}"] if "end_to_end" in record else [])


def _fold_inputs(members: Sequence[Member]) -> list[str]:
    return [fold_networks.digest(member, FOLDS) for member in members]


def _require_two(session: Session, members: Sequence[Member]) -> None:
    if len(members) < 2:
        lacking = [member.name for member in session.members if member not in members]
        raise UserError(
            f"{len(members)} member(s) with embeddings, and a fusion needs two"
            f"{': no embeddings of ' if lacking else ''}{', '.join(lacking)}. Name others in backbones.include, or "
            "write `embeddings` into their val.npz"
        )


def _stream(session: Session, members: Sequence[Member]) -> None:
    section, store = session.config.runs.fusion, session.store
    splits = (*STREAMED_SPLITS, *(("train",) if section.train_embeddings == IN_SAMPLE else ()))
    if not section.extract_embeddings:
        missing = [f"{m.name}/{split}" for m in members for split in splits if not store.is_stored(m, split)]
        if missing:
            raise UserError(
                f"{session.config.source}: runs.fusion.extract_embeddings is false, and {len(missing)} are not there, "
                f"first {missing[0]}. Extract them: --set runs.fusion.extract_embeddings=true"
            )
    session.ensure(members, splits)


def _train(session: Session, members: Sequence[Member], names: Sequence[str], force: bool) -> Build:
    """Train these fusions with their networks; an error of one is a failure and does not stop the others."""
    failures = {}
    for name in names:
        try:
            session = end_to_end.build(session, members, name, force)
        except UserError as error:
            failures[name] = f"{name}: {error}"
    built = tuple(name for name in names if name not in failures)
    return Build(session, built, tuple(failures), tuple(failures.values()))


def _fit_all(session: Session, members: Sequence[Member], names: Sequence[str]) -> Build:
    """Fit and save these fusions; an error of one is a failure and does not stop the others."""
    store = session.store
    facts = fitting.member_facts(store, members)
    requested = store.config.runs.fusion.train_embeddings
    bases, reason = _bases(store, members, facts, requested)
    for name in names:
        logger.info("fitting %s on the embeddings of %d members", name, len(members))
    tasks = [(name, kind) for name in names for kind in bases]
    results = family_fits.fit_each(
        _fit,
        tasks,
        shared=(store.config, facts, bases),
        description="fusions",
        n_logits=next(iter(bases.values())).judged.rows.logits.size,
        are_nested=True,
    )
    failures: dict[str, str] = {}
    for name in names:
        chosen, gain = next(iter(bases)), None
        try:
            fits: dict[str, Fit] = {}
            for kind, result in list(zip(bases, results, strict=False)):  # the next result of each kind
                if isinstance(result, UserError):
                    raise result
                fits[kind] = result
            if len(fits) > 1:
                gain = gain_of_val(fits[VAL].crossfit, fits[ALIGNED].crossfit, bases[ALIGNED].judged.groups)
                chosen = VAL if gain.favours_val else ALIGNED
                reason = gain.words
            _save(
                store, name, members, bases[chosen], fits[chosen], _source(requested, chosen, reason, fits, bases, gain)
            )
        except UserError as error:
            failures[name] = f"{name}: {error}"
    built = tuple(name for name in names if name not in failures)
    return Build(session, built, tuple(failures), tuple(failures.values()))


@dataclass(frozen=True)
class Gain:
    """Decrease of the log-loss on train rows of heads fitted on val rows, compared with heads fitted on all rows."""

    mean: float
    interval: tuple[float, float] | None
    """95%; None for too few rows or groups"""
    words: str

    @property
    def favours_val(self) -> bool:
        """Whether the interval is above 0."""
        return self.interval is not None and self.interval[0] > 0


def gain_of_val(val: Crossfit, aligned: Crossfit, groups: np.ndarray | None) -> Gain:
    """Compare predictions of heads fitted on val rows with those of heads fitted on all rows, both on the same rows.

    Val rows may have selected the epochs of the networks, so that scores on them are optimistic for heads fitted on
    them. The comparison therefore uses train rows, whose predictions are by networks and heads that were not fitted on
    them. `groups` (N,) are those of all rows.
    """
    is_train = val.split == "train"
    losses = [log_loss_per_row(part.probabilities[is_train], part.labels[is_train]) for part in (val, aligned)]
    gains = losses[1] - losses[0]
    interval = mean_interval(gains, None if groups is None else groups[is_train])
    shown = "too few for an interval" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
    words = (
        f"on train rows, which no selection has used, log-loss {losses[1].mean():.4f} with aligned and "
        f"{losses[0].mean():.4f} with val, difference {gains.mean():+.4f} {shown}"
    )
    return Gain(float(gains.mean()), interval, words)


def _source(
    requested: str,
    chosen: str,
    reason: str,
    fits: Mapping[str, Fit],
    bases: Mapping[str, Basis],
    gain: Gain | None,
) -> dict[str, Any]:
    """Return the entry of `ensemble.json` on the embeddings that a fusion was fitted on."""
    return {
        "asked": requested,
        "chosen": chosen,
        "reason": reason,
        "val_log_loss": {kind: fit.log_loss("val") for kind, fit in fits.items()},
        "train_log_loss": {kind: fit.log_loss("train") for kind, fit in fits.items()},
        "gain_of_val": None if gain is None else {"mean": gain.mean, "ci95": gain.interval},
        "members": {kind: basis.facts for kind, basis in bases.items() if basis.facts},
    }


def _bases(store: Store, members: Sequence[Member], facts: MemberFacts, requested: str) -> tuple[dict[str, Basis], str]:
    """Return the requested basis, or all that `auto` selects from, and the reason if there is only one."""
    if requested == IN_SAMPLE:
        logger.warning(
            "runs.fusion.train_embeddings is in_sample: heads are fitted on embeddings of images that the networks "
            "were trained on; val rows evaluate them"
        )
        return {IN_SAMPLE: _basis(store, facts, embedding_rows.in_sample(store, members), in_sample=True)}, "asked for"
    obstacle = embedding_rows.reason_not_aligned(store, members)
    if requested == ALIGNED and obstacle:
        raise UserError(f"runs.fusion.train_embeddings is aligned: {obstacle}; or use the val rows: {_use(VAL)}")
    try:
        if obstacle:
            raise UserError(obstacle)
        aligned = _basis(store, facts, embedding_rows.aligned(store, members))
    except UserError as error:
        if requested == ALIGNED:
            raise
        if requested != VAL:
            logger.warning("fusion is fitted on val rows alone: %s", error)
        val = _basis(store, facts, embedding_rows.of_val(store, members))
        return {VAL: val}, "asked for" if requested == VAL else f"train rows cannot be aligned: {error}"
    if requested == ALIGNED:
        return {ALIGNED: aligned}, "asked for"
    val_rows = aligned.fitted.of_split("val")
    # Train rows are evaluated too, so that every fusion has predictions on the rows that ensembles share.
    val = replace(aligned, fitted=val_rows, facts={})
    lacks = min(len(np.unique(val_rows.fold)), len(np.unique(val_rows.rows.labels))) < 2
    if lacks and requested == VAL:
        raise UserError(
            f"runs.fusion.train_embeddings is val: the {len(val_rows.fold)} val rows are of one class or of one "
            f"cross-fitting fold; use all rows: {_use(ALIGNED)}"
        )
    if requested == VAL:
        return {VAL: val}, "asked for"
    return ({ALIGNED: aligned}, "too few val rows") if lacks else ({VAL: val, ALIGNED: aligned}, "")


def _use(kind: str) -> str:
    return f"--set runs.fusion.train_embeddings={kind}"


def _basis(store: Store, facts: MemberFacts, embedded: EmbeddedRows, *, in_sample: bool = False) -> Basis:
    rows = embedded.rows
    if len(np.unique(rows.labels)) < 2:
        raise UserError(f"all {len(rows.labels)} rows are of class {rows.classes[rows.labels[0]]}; give others too")
    fitted = judged = fitting.with_folds(store, rows)
    if in_sample:
        fitted, judged = fitted.of_split("train"), judged.of_split("val")
    return Basis(fitted, judged, fitting.measure_baselines(store, facts, judged), embedded.facts)


def _fit(config: Config, facts: MemberFacts, bases: Mapping[str, Basis], name_and_kind: tuple[str, str]) -> Fit:
    name, kind = name_and_kind
    with torch_threads(FIT_THREADS):
        return _fit_on(bases[kind], COMBINERS[name].configured(config, facts))


def _fit_on(basis: Basis, recipe: Combiner) -> Fit:
    fitted, judged = basis.fitted, basis.judged
    if judged is fitted:
        return Fit(recipe, ensembles.crossfit(recipe, fitted.rows, fitted.fold))
    rows = judged.rows
    if set(fitted.rows.split) <= {"train"}:  # in_sample: val rows evaluate, which the heads are not fitted on
        recipe.fit(fitted.rows.outputs, fitted.rows.labels, fitted.fold)
        probabilities = recipe.predict_proba(rows.outputs)
    else:
        probabilities = crossfit_on(recipe, fitted, judged)
    probabilities = probabilities.astype(np.float32)
    return Fit(recipe, Crossfit(probabilities, rows.labels, rows.sample_ids, rows.split, judged.fold))


def crossfit_on(recipe: Combiner, fitted: OutOfSampleRows, judged: OutOfSampleRows) -> np.ndarray:
    """Fit an unfitted combiner on `fitted` rows, a subset of `judged` rows; return the latter's probabilities (N, C).

    A copy fitted without the rows of a fold predicts all judged rows of the fold.
    """
    outputs, labels = fitted.rows.outputs, fitted.rows.labels
    probabilities = np.empty((len(judged.fold), len(judged.rows.classes)))
    for fold in np.unique(judged.fold):
        outside, inside = fitted.fold != fold, judged.fold == fold
        copy = deepcopy(recipe).fit(outputs[:, outside], labels[outside], inner_folds(labels, fitted.fold, outside))
        probabilities[inside] = copy.predict_proba(judged.rows.outputs[:, inside])
    recipe.fit(outputs, labels, inner_folds(labels, fitted.fold, np.ones(len(labels), dtype=bool)))
    return probabilities


def _save(
    store: Store, name: str, members: Sequence[Member], basis: Basis, fit: Fit, source: Mapping[str, Any]
) -> None:
    # The rows of a left-out fold select when the training on the others stops.
    prior_provenance = [Provenance((), fitting.row_sets(basis.fitted.rows))]
    fitting.save(
        store,
        name,
        name,
        fitting.evaluate_fit(fit.recipe, fit.crossfit, basis.fitted, basis.simple),
        members,
        basis.fitted,
        extra_inputs=_fold_inputs(members),
        prior_provenance=prior_provenance,
        notes={"train_embeddings": source},
    )
