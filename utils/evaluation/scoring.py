"""What is scored and on which rows: members and saved ensembles with their answers to the rows of a split.

Whatever has no answers is left out by itself, with the reason; the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils import base_back
from utils.building import ensembles
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble, Provenance
from utils.core.artifacts import digest_of, read_arrays, write_arrays
from utils.core.errors import UserError
from utils.numeric import diversity
from utils.numeric.metrics import softmax
from utils.predictions import extraction, fold_networks
from utils.predictions.catalog import Catalog, Member
from utils.predictions.rows import UNKNOWN, Rows, align
from utils.predictions.store import IMPORT, Store

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # raised whenever the same inputs would give other records


@dataclass(frozen=True)
class ScoredModel:
    """One member or ensemble on the evaluated rows."""

    name: str
    kind: str
    """member or ensemble"""
    members: tuple[str, ...]
    probabilities: np.ndarray
    """float64 (N, C)"""
    provenance: Provenance
    disagreement: np.ndarray | None = None
    """Mutual information of its members' answers by row, (N,) in nats; None with one member."""
    inference: str = fold_networks.FULL


def members_to_score(found: Catalog, selected: Sequence[Member], saved: Mapping[str, Ensemble]) -> dict[str, Member]:
    """Members of the configuration and of every saved ensemble."""
    chosen = {member.name: member for member in selected}
    for ensemble in saved.values():
        chosen |= {name: found.members[name] for name in ensemble.members if name in found.members}
    return dict(sorted(chosen.items()))


def ranked_alone(store: Store, members: Mapping[str, Member]) -> dict[str, Member]:
    """Members with a rank of their own; a derived one that nobody names is ranked as the ensemble made of it."""
    named = store.config.backbones.selected
    return {name: member for name, member in members.items() if member.source != "derived" or name in named}


def inputs_digest(store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], split: str) -> str:
    """Everything a ranking depends on; found without opening an image or a checkpoint."""
    built_from = {name: ensemble.inputs_digest for name, ensemble in saved.items()}
    run_on = {name: store.key(member, split) for name, member in members.items()}
    own = sorted(ranked_alone(store, members))
    config = store.config
    rule = [config.runs.score_ensemble.optimization_metric, config.dataset.group_regex, config.seed]
    return digest_of([VERSION, split, built_from, run_on, own, rule])


def usable(found: Catalog, saved: Mapping[str, Ensemble]) -> tuple[dict[str, Ensemble], dict[str, str]]:
    """Saved ensembles whose members are there as they were, and why each other one cannot be scored.

    One that was built from other checkpoints is left out with a warning alone: it is old, and nothing is missing.
    """
    kept, failures = {}, {}
    for name, ensemble in saved.items():
        missing, changed = fold_networks.missing_and_changed(found.members, ensemble)
        if missing:
            failures[name] = (
                f"its member {', '.join(missing)} is no longer in the catalog. Put the checkpoint or the predictions "
                f"back and run discover, or build it without: {build_command(name)} --force"
            )
        elif changed:
            logger.warning("%s was built from other checkpoints than the catalog holds; build it again", name)
        else:
            kept[name] = ensemble
    return kept, failures


def each(members: Sequence[Member], action: Callable[[Sequence[Member]], object]) -> dict[str, str]:
    """Do something for all members together, else for one after another: {member: why it failed}.

    Raises the first one's UserError where it fails for all.
    """
    try:
        action(members)
        return {}
    except UserError:
        if len(members) < 2:
            raise
    errors: dict[str, UserError] = {}
    for member in members:
        try:
            action([member])
        except UserError as error:
            errors[member.name] = error
    if len(errors) == len(members):
        raise errors[members[0].name]
    return {name: str(error).removeprefix(f"member {name}: ") for name, error in errors.items()}


def answering(store: Store, members: Mapping[str, Member], split: str) -> tuple[dict[str, Member], dict[str, str]]:
    """Members with answers to the rows of a split, and why each other one has none. Streams what is missing.

    Raises UserError where no member has any.
    """

    def run(some: Sequence[Member]) -> None:
        extraction.ensure(store, some, sorted({"val", split}))

    def read(some: Sequence[Member]) -> None:
        for member in some:
            for name in {"val", split} if store.is_available(member, "val") else {split}:
                bad = np.flatnonzero(~np.isfinite(store.rows(member, name).logits).all(axis=1))
                if len(bad):
                    raise UserError(
                        f"member {member.name}: {len(bad)} row(s) of {name} with NaN or infinity, first "
                        f"{store.rows(member, name).sample_ids[bad[0]]}. Train it again, or leave it out by "
                        "backbones.exclude"
                    )

    failures = each(list(members.values()), run)
    there = [member for name, member in members.items() if name not in failures]
    failures |= each(there, read)
    return {name: member for name, member in members.items() if name not in failures}, failures


def evaluated_rows(store: Store, members: Mapping[str, Member], split: str) -> tuple[Rows, int]:
    """All members on the split, less rows without a label and rows whose content is that of a train or val image.

    Gives the rows and how many were left out as copies. Raises UserError where none is left.
    """
    rows = align({name: [store.rows(member, split)] for name, member in members.items()}, store.catalog.classes)
    copies = _copies(store, rows, split) if store.catalog.has_images else []
    for sample_id, twin in copies[:5]:
        logger.warning("evaluate: %s/%s is the same image as %s and is left out", split, sample_id, twin)
    if copies:
        logger.warning("evaluate: %d row(s) left out for every member and ensemble", len(copies))
    unknown = rows.labels == UNKNOWN
    if unknown.any():
        logger.warning("evaluate: %d of %d row(s) of %s are left out: no label", unknown.sum(), len(unknown), split)
    if unknown.all():
        raise UserError(f"{split}: no row has a label. Write labels into {split}.npz of any member, then: {IMPORT}")
    keep = ~np.isin(rows.sample_ids, [sample_id for sample_id, _ in copies]) & ~unknown
    if not keep.any():
        raise UserError(f"{split}: every image is also a train or val image. Split the images anew")
    return rows.take(np.flatnonzero(keep)), len(copies)


def _copies(store: Store, rows: Rows, split: str) -> list[tuple[str, str]]:
    """(sample id, train or val sample of the same content) of the evaluated rows that have one."""
    seen = {
        content: f"{other}/{sample_id}"
        for other in ("train", "val")
        if other != split
        for sample_id, content in zip(store.images(other).sample_ids, store.images(other).contents, strict=True)
    }
    images = store.images(split)
    content_of = dict(zip(images.sample_ids, images.contents, strict=True))
    return [(sample_id, seen[content_of[sample_id]]) for sample_id in rows.sample_ids if content_of[sample_id] in seen]


def groups(store: Store, rows: Rows, split: str) -> np.ndarray | None:
    """Group of each row (N,) by `dataset.group_regex` and equal images; None where every row stands alone."""
    ids = rows.sample_ids.tolist()
    contents = ids
    if store.catalog.has_images:
        images = store.images(split)
        content_of = dict(zip(images.sample_ids, images.contents, strict=True))
        contents = [content_of[sample_id] for sample_id in ids]
    rule = store.config.dataset.group_regex
    found: np.ndarray = base_back.load_bundled("samples").group_indices(ids, contents, rule)
    return found if len(np.unique(found)) < len(found) else None


def score_all(
    store: Store, saved: Mapping[str, Ensemble], members: Mapping[str, Member], rows: Rows, split: str
) -> tuple[list[ScoredModel], dict[str, str]]:
    """Everything that has answers to the rows, and why each ensemble that has none is left out."""
    networks = ensembles.network_provenance(store)
    scored = [
        ScoredModel(name, "member", (name,), softmax(rows.logits[rows.members.index(name)]), networks)
        for name in members
    ]
    failures = {}
    for name, ensemble in saved.items():
        absent = [member for member in ensemble.members if member not in members]
        if absent:
            failures[name] = f"its member {', '.join(absent)} has no answers to the rows of {split}"
            continue
        try:
            answers = _stored_predictions(store, ensemble, _answers(store, ensemble, rows, split), split)
        except UserError as error:
            failures[name] = str(error)
            continue
        probabilities, disagreement = answers["probabilities"], answers.get("mutual_information")
        facts = (name, "ensemble", ensemble.members, probabilities, ensemble.provenance, disagreement)
        scored.append(ScoredModel(*facts, inference=ensemble.inference))
    return scored, failures


def _answers(store: Store, ensemble: Ensemble, rows: Rows, split: str) -> Rows:
    """What the networks that answer for the ensemble's members give on the rows."""
    embeddings = ensemble.combiner.reads_embeddings
    if ensemble.inference == fold_networks.FULL and not embeddings:
        places = [rows.members.index(name) for name in ensemble.members]
        return replace(rows, members=ensemble.members, logits=rows.logits[places])
    members = [store.catalog.members[name] for name in ensemble.members]
    fold_networks.ensure(store, members, (split,), ensemble.inference)
    found = fold_networks.aligned(store, members, split, ensemble.inference, embeddings=embeddings)
    return found.take(np.flatnonzero(np.isin(found.sample_ids, rows.sample_ids)))


def _stored_predictions(store: Store, ensemble: Ensemble, rows: Rows, split: str) -> dict[str, np.ndarray]:
    """The ensemble's probabilities on the rows, kept as `predictions_<split>.npz` for whoever asks again.

    Beside them `mutual_information`, how much its members disagree on each row, where it has several.
    """
    path = store.workspace.ensemble(ensemble.name) / f"predictions_{split}.npz"
    members = [store.catalog.members[name] for name in ensemble.members]
    keys = [fold_networks.key(store, member, split, ensemble.inference) for member in members]
    key = digest_of([VERSION, ensemble.inputs_digest, keys, rows.sample_ids.tolist()])
    if path.is_file():
        arrays = read_arrays(path, remedy="Remove it, then evaluate again")
        if str(arrays["key"]) == key:
            return arrays
    found: dict[str, Any] = {"probabilities": ensembles.predict(ensemble, rows)}
    if len(ensemble.members) > 1:
        found["mutual_information"] = diversity.mutual_information(softmax(rows.logits))
    found |= {"labels": rows.labels, "sample_ids": rows.sample_ids, "classes": np.array(rows.classes)}
    write_arrays(path, found | {"key": np.array(key)})
    return found


def overlap(sets: Sequence[ensembles.RowSet], rows: Rows) -> int:
    """How many evaluated rows are among the given ones, by (split, sample id)."""
    known = {(part.split, sample_id) for part in sets for sample_id in part.sample_ids}
    return sum(key in known for key in zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
