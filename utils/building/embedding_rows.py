"""Rows with embeddings for fusion: which networks' embeddings a head may be fitted on, all in the space it will meet.

At inference the full networks answer. Every fold network has a space of its own, so its embeddings of the rows that it
did not see are brought into the full network's space by a linear map, learned without labels on the val rows, which
neither network was fitted on. Whether train rows and val rows are of one space is checked, whoever made them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core.artifacts import digest_of, open_array, read_json, write_array, write_json
from utils.core.errors import UserError
from utils.numeric.metrics import softmax
from utils.numeric.ridge_alignment import fit_ridge_map, pearson_correlation
from utils.predictions import catalog, fold_networks, image_splits, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.fold_networks import FOLDS
from utils.predictions.rows import MemberRows, Rows, align
from utils.predictions.store import AGAIN, IMPORT, Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same weights and images would give other arrays
ALIGNED = "aligned"
SAME_NETWORK = 0.02  # mean difference of probabilities: half precision on CUDA stays below it
TELLING = 0.5  # agreement on val rows left out, below which nothing can be told of the space of other rows
LEAST = 1 / 3  # of that agreement, which train rows of the same space keep; a rotation leaves about none


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows with embeddings, and what is known of how they came about."""

    rows: Rows
    facts: dict[str, Any]
    """{member: what its alignment explains, and how far its train rows agree with its last layer}"""


def of_val(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """The full networks' val rows."""
    return EmbeddedRows(fold_networks.aligned(store, members, "val", fold_networks.FULL, embeddings=True), {})


def in_sample(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """The full networks' train rows, which they were fitted on, and their val rows."""
    return _joined(store, members, {member.name: store.rows(member, "train", embeddings=True) for member in members})


def reason_not_aligned(store: Store, members: Sequence[Member]) -> str | None:
    """What keeps train rows from being aligned, and the remedy; None where nothing does."""
    trained = [m for m in members if m.source != IMPORTED and not fold_networks.stages(m)]
    imported = [m for m in members if m.source == IMPORTED and not store.has_oof_embeddings(m)]
    reasons = []
    if trained:
        names = [member.name for member in trained]
        reasons.append(
            f"no complete set of fold networks: {', '.join(names)}. Make them: "
            f"{catalog.kfold_command(store.workspace, names)}"
        )
    if imported:
        names = [member.name for member in imported]
        reasons.append(f"no embeddings in oof.npz: {', '.join(names)}. Write them there: {IMPORT}")
    return "; ".join(reasons) or None


def aligned(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """Out-of-fold train rows in the full networks' spaces, and val rows.

    Fold networks are run where their embeddings are not kept yet. Embeddings of an imported member are taken as they
    were given, which is right where one fixed network made them. Raises UserError where train and val rows of a member
    are not of one space.
    """
    train, explained = {}, {}
    for member in members:
        rows = store.oof(member, embeddings=member.source == IMPORTED)
        assert rows is not None, "asked for after why_not_aligned"
        if member.source != IMPORTED:
            embeddings, explained[member.name] = _of_fold_networks(store, member, rows)
            rows = replace(rows, embeddings=embeddings)
        train[member.name] = rows
    store.digests.save()
    found = _joined(store, members, train)
    return replace(found, facts={n: {**facts, "explained": explained.get(n)} for n, facts in found.facts.items()})


def require_shared_space(name: str, train: MemberRows, val: MemberRows) -> float | None:
    """How far a member's train embeddings give its logits by the map that its val rows teach; None: it cannot be told.

    A network's logits are a linear map of its embeddings. In one space the map from the val rows holds for the train
    rows too. Raises UserError where it does not: embeddings of fold networks as they are, or of another network.
    """
    expected = [rows.logits - rows.logits.mean(axis=1, keepdims=True) for rows in (val, train)]
    found = fit_ridge_map(val.embeddings, expected[0])
    known = np.sqrt(max(found.explained, 0.0))
    if known < TELLING:
        logger.warning(
            "member %s: %d val rows do not teach how its logits follow from its embeddings; that its train rows are of "
            "the same space cannot be checked",
            name,
            len(expected[0]),
        )
        return None
    agreed = pearson_correlation(found.apply(train.embeddings), expected[1])
    if agreed < LEAST * known:
        raise UserError(
            f"member {name}: its train rows' embeddings are not of the space of its val rows: what gives its logits on "
            f"val (correlation {known:.2f}) does not on train ({agreed:.2f}). Embeddings of several fold networks "
            "cannot be pooled; use the val rows: --set runs.fusion.train_embeddings=val"
        )
    return agreed


def _joined(store: Store, members: Sequence[Member], train: dict[str, MemberRows]) -> EmbeddedRows:
    parts, facts = {}, {}
    for member in members:
        val = store.rows(member, "val", embeddings=True)
        own = train[member.name]
        if own.embeddings is not None and own.embeddings.shape[1] != val.embeddings.shape[1]:
            raise UserError(
                f"member {member.name}: embeddings of {own.embeddings.shape[1]} numbers on train and "
                f"{val.embeddings.shape[1]} on val. {AGAIN}"
            )
        facts[member.name] = {"agreement": require_shared_space(member.name, own, val)}
        parts[member.name] = [own, val]
    return EmbeddedRows(align(parts, store.catalog.classes), facts)


def _of_fold_networks(store: Store, member: Member, rows: MemberRows) -> tuple[np.ndarray, list[float]]:
    """Aligned embeddings float32 (N, D) of out-of-fold rows, and what each fold's map explains; kept on disk."""
    place = store.workspace.embeddings(member.name, ALIGNED)
    note = store.workspace.embeddings_record(member.name, ALIGNED)
    oof_key = store.catalog.splits["train"]["digest"], store.catalog.splits["val"]["digest"]
    key = digest_of([VERSION, fold_networks.digest(member, FOLDS), store.key(member, "val"), *oof_key])
    record = read_json(note, remedy=AGAIN)
    if record is not None and record.get("key") == key and place.is_file():
        return open_array(place, remedy=AGAIN), record["explained"]
    full = store.rows(member, "val", embeddings=True)
    fold = store.oof_folds(member)
    numbers = [int(stage.removeprefix("fold")) for stage in fold_networks.stages(member)]
    if sorted(np.unique(fold).tolist()) != numbers:
        raise UserError(
            f"member {member.name}: its fold networks are {numbers}, its out-of-fold predictions name "
            f"{np.unique(fold).tolist()}. Use the val rows: --set runs.fusion.train_embeddings=val"
        )
    found = np.empty((len(fold), full.embeddings.shape[1]), dtype=np.float32)
    explained = []
    for number in numbers:
        inside = fold == number
        part = replace(rows, sample_ids=rows.sample_ids[inside], logits=rows.logits[inside])
        held_out, of_val = _embeddings(store, member, number, part)
        to_full = fit_ridge_map(of_val, full.embeddings)
        found[inside] = to_full.apply(held_out)
        explained.append(to_full.explained)
    note.unlink(missing_ok=True)
    write_array(place, found)
    facts = {"key": key, "rows": "oof", "explained": explained, "width": found.shape[1], "member": member.name}
    classes, ids = list(store.catalog.classes), rows.sample_ids.tolist()
    write_json(note, facts | {"classes": classes, "sample_ids": ids, "member_digest": member.digest})
    return found, explained


def _embeddings(store: Store, member: Member, number: int, rows: MemberRows) -> tuple[np.ndarray, np.ndarray]:
    """One fold network's embeddings of its held-out train rows and of val.

    Raises UserError where it does not give the out-of-fold logits of these rows.
    """
    stage, train = f"fold{number}", store.images("train")
    catalog.check_current(store.workspace, member, store.digests, stage=stage)
    place = {sample_id: row for row, sample_id in enumerate(train.sample_ids)}
    images = [train.take([place[sample_id] for sample_id in rows.sample_ids.tolist()]), store.images("val")]
    logger.info("streaming %s of %s over its %d rows and val", stage, member.name, len(rows.sample_ids))
    batches = list(
        streaming.stream(
            member.network(store.workspace, stage=stage),
            images,
            batch_size=store.config.dataset.batch_size,
            device=streaming.resolve_device(store.config.device),
            image_cache=store.workspace.image_cache,
            decoding_threads=image_splits.decoding_threads(store.config.dataset.num_workers),
            val=store.images("val"),
        )
    )
    order = [member.classes.index(name) for name in store.catalog.classes]
    logits = np.concatenate([batch.logits[:, order] for batch in batches if batch.split == "train"])
    difference = float(np.abs(softmax(logits) - softmax(rows.logits)).mean())
    if difference > SAME_NETWORK:
        raise UserError(
            f"member {member.name}: {stage} does not give the out-of-fold predictions of its rows (mean difference "
            f"{difference:.3f}), so it is another network. Make them again: "
            f"{catalog.kfold_command(store.workspace, [member.name])}"
        )
    return tuple(  # type: ignore[return-value]
        np.concatenate([batch.embeddings for batch in batches if batch.split == split]) for split in ("train", "val")
    )
