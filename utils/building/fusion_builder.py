"""The section `runs.fusion` of `fusion-train`: heads on the members' embeddings, beside what is simpler."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.building import baselines, embedding_rows, end_to_end, ensembles, fitting
from utils.building.baselines import Baselines
from utils.building.embedding_rows import EmbeddedRows
from utils.building.ensembles import Crossfit, Provenance
from utils.building.fitting import OutOfSampleRows
from utils.combiners.protocol import Combiner, MemberFacts
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.fusion_methods import COMBINERS
from utils.numeric.metrics import log_loss
from utils.predictions import extraction, fold_networks
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.fold_networks import FOLDS
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

CONFIG_KEY = "runs.fusion"
VAL, ALIGNED, IN_SAMPLE = "val", "aligned", "in_sample"


@dataclass(frozen=True)
class Basis:
    """Rows that heads may be fitted on, rows that judge them, and the simple combinations on the latter."""

    fitted: OutOfSampleRows
    judged: OutOfSampleRows
    simple: Baselines
    facts: dict[str, Any]
    """Of the members' alignment."""


@dataclass(frozen=True)
class Fit:
    """A fitted fusion and its predictions on rows that it did not see."""

    recipe: Combiner
    crossfit: Crossfit

    @property
    def val_log_loss(self) -> float:
        """On the val rows, which every basis has."""
        rows = self.crossfit.split == "val"
        return log_loss(self.crossfit.probabilities[rows], self.crossfit.labels[rows])


def fusion(store: Store, members: Sequence[Member], force: bool) -> Result:
    """Fit the heads that the section lists on embeddings of honest rows; what is there is kept, unless `force`.

    Members without embeddings are left out with a warning. Raises UserError where fewer than two are left, and for
    rows that the section asks for and cannot have.
    """
    config = store.config
    wanted = names(config)
    if config.runs.fusion.end_to_end:
        end_to_end.require_networks(members)
    members = _with_embeddings(store, members)
    fresh = [name for name in wanted if force or not is_current(store, members, name)]
    failures = []
    if fresh:
        _stream(store, members)
        members = _with_embeddings(store, members, told=True)
        trains = config.runs.fusion.end_to_end
        failures = _trained(store, members, fresh, force) if trains else _fitted(store, members, fresh)
    left_out = {failure.partition(":")[0] for failure in failures}
    built = [name for name in fresh if name not in left_out]
    lines = []
    for name in (name for name in wanted if name not in left_out):
        record = ensembles.record_of(store.workspace, name) or {}
        source = record["train_embeddings"]
        lines.append(fitting.summary_line(store, name, "built" if name in built else "up to date"))
        lines += [f"    {record['verdict']}", f"    train embeddings: {source['chosen']} ({source['reason']})"]
        lines += [f"    {end_to_end.summary_line(record)}"] if "end_to_end" in record else []
    kept = [name for name in wanted if name not in fresh]
    return Result("\n".join(lines), {"built": built, "up_to_date": kept}, failures)


def names(config: Config) -> list[str]:
    """Ensembles that the section asks for."""
    return [f"fusion_{method}" for method in config.runs.fusion.fusion_methods] if config.runs.fusion.enable else []


def is_current(store: Store, members: Sequence[Member], name: str) -> bool:
    """Whether a saved fusion is what a build would make of these members; found without torch."""
    if store.config.runs.fusion.end_to_end:
        return end_to_end.is_current(store, members, name)
    wanted = fitting.inputs_digest(store.config, store, members, name, extra_inputs=_fold_inputs(members))
    return ensembles.stored_digest(store.workspace, name) == wanted


def _fold_inputs(members: Sequence[Member]) -> list[str]:
    return [fold_networks.digest(member, FOLDS) for member in members]


def _with_embeddings(store: Store, members: Sequence[Member], *, told: bool = False) -> list[Member]:
    """Those that have embeddings, as far as is known before they are streamed."""
    lacking = [member.name for member in members if store.lacks_embeddings(member)]
    if told and lacking:
        logger.warning("no embeddings, so left out of the fusion: %s", ", ".join(lacking))
    left = [member for member in members if member.name not in lacking]
    if len(left) < 2:
        raise UserError(
            f"{len(left)} member(s) with embeddings, and a fusion needs two{': no embeddings of ' if lacking else ''}"
            f"{', '.join(lacking)}. Name others in backbones.include, or write `embeddings` into their val.npz"
        )
    return left


def _stream(store: Store, members: Sequence[Member]) -> None:
    splits = (*STREAMED_SPLITS, *(("train",) if store.config.runs.fusion.train_embeddings == IN_SAMPLE else ()))
    if not store.config.runs.fusion.extract_embeddings:
        missing = [f"{m.name}/{split}" for m in members for split in splits if not store.is_stored(m, split)]
        if missing:
            raise UserError(
                f"{store.config.source}: runs.fusion.extract_embeddings is false, and {len(missing)} are not there, "
                f"first {missing[0]}. Extract them: --set runs.fusion.extract_embeddings=true"
            )
    extraction.ensure(store, members, splits)


def _trained(store: Store, members: Sequence[Member], fresh: Sequence[str], force: bool) -> list[str]:
    """Train and save these with their networks; what kept one from being trained, by its name."""
    failures = []
    for name in fresh:
        try:
            end_to_end.build(store, members, name, force)
        except UserError as error:
            failures.append(f"{name}: {error}")
    return failures


def _fitted(store: Store, members: Sequence[Member], fresh: Sequence[str]) -> list[str]:
    """Fit and save these; what kept one from being fitted, by its name."""
    known = fitting.member_facts(store, members)
    asked = store.config.runs.fusion.train_embeddings
    bases, reason = _bases(store, members, known, asked)
    failures = []
    for name in fresh:
        try:
            fits = {kind: _fit(store.config, known, name, basis) for kind, basis in bases.items()}
            losses = {kind: fit.val_log_loss for kind, fit in fits.items()}
            chosen = min(losses, key=lambda kind: (losses[kind], kind))
            if len(losses) > 1:
                other = next(kind for kind in losses if kind != chosen)
                reason = f"log-loss {losses[chosen]:.4f} on the val rows, {losses[other]:.4f} with {other}"
            _save(store, name, members, bases[chosen], fits[chosen], _source(asked, chosen, reason, losses, bases))
        except UserError as error:
            failures.append(f"{name}: {error}")
    return failures


def _source(
    asked: str, chosen: str, reason: str, losses: Mapping[str, float], bases: Mapping[str, Basis]
) -> dict[str, Any]:
    """What `ensemble.json` says of the embeddings that a fusion was fitted on."""
    members = {kind: basis.facts for kind, basis in bases.items() if basis.facts}
    return {"asked": asked, "chosen": chosen, "reason": reason, "val_log_loss": dict(losses), "members": members}


def _bases(store: Store, members: Sequence[Member], known: MemberFacts, asked: str) -> tuple[dict[str, Basis], str]:
    """The rows that are asked for, or all that `auto` chooses from, and why there is only one where there is."""
    if asked == IN_SAMPLE:
        logger.warning(
            "runs.fusion.train_embeddings is in_sample: heads are fitted on embeddings of images that the networks "
            "were trained on; val rows judge them"
        )
        return {IN_SAMPLE: _basis(store, known, embedding_rows.in_sample(store, members), in_sample=True)}, "asked for"
    without = embedding_rows.reason_not_aligned(store, members)
    if asked == ALIGNED and without:
        raise UserError(f"runs.fusion.train_embeddings is aligned: {without}; or use the val rows: {_use(VAL)}")
    found, reason = {}, "asked for"
    if asked != ALIGNED:
        found[VAL] = _basis(store, known, embedding_rows.of_val(store, members))
    if asked != VAL:
        try:
            if without:
                raise UserError(without)
            found[ALIGNED] = _basis(store, known, embedding_rows.aligned(store, members))
        except UserError as error:
            if asked == ALIGNED:
                raise
            logger.warning("fusion is fitted on val rows alone: %s", error)
            reason = f"train rows cannot be aligned: {error}"
    return found, reason


def _use(kind: str) -> str:
    return f"--set runs.fusion.train_embeddings={kind}"


def _basis(store: Store, known: MemberFacts, embedded: EmbeddedRows, *, in_sample: bool = False) -> Basis:
    rows = embedded.rows
    if len(np.unique(rows.labels)) < 2:
        raise UserError(f"all {len(rows.labels)} rows are of class {rows.classes[rows.labels[0]]}; give others too")
    fitted = judged = fitting.with_folds(store, rows)
    if in_sample:
        fitted, judged = fitted.of_split("train"), judged.of_split("val")
    simple = baselines.measure(store.config, known, judged.rows.logits, judged.rows.labels, judged.fold)
    return Basis(fitted, judged, simple, embedded.facts)


def _fit(config: Config, known: MemberFacts, name: str, basis: Basis) -> Fit:
    recipe = COMBINERS[name].configured(config, known)
    fitted, judged = basis.fitted, basis.judged
    logger.info("fitting %s on %d rows of %d members", name, len(fitted.fold), len(known.names))
    if judged is fitted:
        return Fit(recipe, ensembles.crossfit(recipe, fitted.rows, fitted.fold))
    recipe.fit(fitted.rows.outputs, fitted.rows.labels, fitted.fold)
    rows = judged.rows
    probabilities = recipe.predict_proba(rows.outputs).astype(np.float32)
    return Fit(recipe, Crossfit(probabilities, rows.labels, rows.sample_ids, rows.split, judged.fold))


def _save(
    store: Store, name: str, members: Sequence[Member], basis: Basis, fit: Fit, source: Mapping[str, Any]
) -> None:
    # rows of a fold that is left out stop the training on the others
    prior_provenance = [Provenance((), fitting.row_sets(basis.fitted.rows))]
    fitting.build(
        store,
        name,
        name,
        fit.recipe,
        members,
        basis.fitted,
        extra_inputs=_fold_inputs(members),
        prior_provenance=prior_provenance,
        baselines=basis.simple,
        notes={"train_embeddings": source},
        crossfit=fit.crossfit,
    )
