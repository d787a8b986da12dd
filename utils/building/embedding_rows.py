"""Rows with embeddings for fusion, all in the embedding space of inference.

The full networks predict at inference. Each fold network has a different embedding space: a linear map, fitted without
labels on the val rows (on which neither network was trained), maps its embeddings of held-out rows into the full
network's space. A check that train and val rows share one space covers imported members too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from utils.core import engines
from utils.core.artifacts import digest_of, open_array, read_json, write_array, write_json
from utils.core.errors import LeakageError, UserError
from utils.core.links import remove_file
from utils.numeric.metrics import softmax
from utils.numeric.ridge_alignment import fit_ridge_map, pearson_correlation
from utils.predictions import (
    catalog,
    extraction,
    fold_heads,
    fold_networks,
    image_splits,
    streaming,
    training_data,
)
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.fold_networks import FOLDS
from utils.predictions.rows import MemberRows, Rows, align
from utils.predictions.store import AGAIN, IMPORT, Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same weights and images would give different arrays
OUT_OF_FOLD = "train"
"""Name of the file of out-of-fold embeddings in the full network's space."""
MAX_PROBABILITY_DIFFERENCE = 0.02  # mean over the rows; half precision on CUDA stays below it
MIN_CORRELATION = 0.5  # on held-out val rows; below it, the space of other rows cannot be checked
MIN_KEPT_CORRELATION = 1 / 3  # fraction that remains on train rows of the same space; after a rotation about 0 remains


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows with embeddings, and the quality of their alignment."""

    rows: Rows
    facts: dict[str, Any]
    """{member: explained variance of its alignment, and the correlation of `require_shared_space`}"""


def of_val(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """Return the full networks' val rows. Raises LeakageError if no val row is out-of-sample for all members."""
    rows = fold_networks.aligned(store, members, "val", fold_networks.FULL, embeddings=True)
    return EmbeddedRows(_out_of_sample(rows), {})


def in_sample(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """Return the full networks' train rows, which are in-sample, and their val rows, which are out-of-sample."""
    return _joined(store, members, {member.name: store.rows(member, "train", embeddings=True) for member in members})


def reason_not_aligned(store: Store, members: Sequence[Member]) -> str | None:
    """Return why the train rows cannot be aligned, with the remedy; None if they can."""
    networks = [m for m in members if m.source != IMPORTED and not training_data.predicts_unseen_train_rows(store, m)]
    trained = [m for m in networks if not fold_networks.stages(m)]
    seen = [m for m in networks if m not in trained and not training_data.has_train_rows(store, m)]
    imported = [m for m in members if m.source == IMPORTED and not store.has_oof_embeddings(m)]
    reasons = []
    if trained:
        names = [member.name for member in trained]
        reasons.append(
            f"no complete set of fold networks: {', '.join(names)}. Make them: "
            f"{catalog.kfold_command(store.workspace, trained)}"
        )
    if seen:
        names = [member.name for member in seen]
        reasons.append(f"trained on weights that had seen train images before: {', '.join(names)}")
    if imported:
        names = [member.name for member in imported]
        reasons.append(f"no embeddings in oof.npz: {', '.join(names)}. Write them there: {IMPORT}")
    return "; ".join(reasons) or None


def aligned(store: Store, members: Sequence[Member]) -> EmbeddedRows:
    """Return out-of-sample train rows in the full networks' spaces, and val rows.

    Fold networks run if their embeddings are not stored yet. Fold networks that share the full network's trunk have the
    same embeddings; those of train rows are used if the trunk was trained on no image of the workspace, and likewise
    for a full network that was trained on none. Embeddings of an imported member are used unchanged, which is correct
    if one fixed network made them. Raises UserError if train and val rows of a member are not in one space.
    """
    train, explained = {}, {}
    trunk_members = [member for member in members if _has_unseen_trunk(member)]
    extraction.ensure(store, trunk_members, ("train",))
    to_align: list[Member] = []
    for member in members:
        if training_data.predicts_unseen_train_rows(store, member):
            rows = store.rows(member, "train", embeddings=True)
            train[member.name] = rows.take(rows.out_of_sample)
            continue
        out_of_fold = store.oof(member, embeddings=member.source == IMPORTED)
        assert out_of_fold is not None, "reason_not_aligned comes first"
        if member in trunk_members:
            out_of_fold = replace(out_of_fold, embeddings=_of_trunk(store, member, out_of_fold))
        elif member.source != IMPORTED:
            to_align.append(member)
        train[member.name] = out_of_fold
    _run_fold_networks(store, to_align, train)
    for member in to_align:
        stored = _stored_embeddings(store, member)
        assert stored is not None, "it has just been written"
        embeddings, explained[member.name] = stored
        train[member.name] = replace(train[member.name], embeddings=embeddings)
    store.digests.save()
    joined = _joined(store, members, train)
    return replace(joined, facts={n: {**facts, "explained": explained.get(n)} for n, facts in joined.facts.items()})


def _run_fold_networks(store: Store, members: Sequence[Member], out_of_fold: Mapping[str, MemberRows]) -> None:
    """Store the aligned embeddings of members that lack them, several members at a time where cores allow."""
    missing = [member for member in members if _stored_embeddings(store, member) is None]
    finished = engines.Local().map(
        _align,
        [(member, out_of_fold[member.name]) for member in missing],
        shared=(store,),
        description="fold networks",
        n_processes=extraction.n_processes(store, missing, streaming.resolve_device(store.config.device)),
    )
    for number, (member, _) in enumerate(zip(missing, finished, strict=True), start=1):
        logger.info("[%d/%d] aligned the embeddings of the fold networks of %s", number, len(missing), member.name)


def _has_unseen_trunk(member: Member) -> bool:
    """Return whether a member and its fold networks share a trunk that was trained on no image of the workspace."""
    return member.trunk is not None and member.pretrained_on == training_data.NONE


def _of_trunk(store: Store, member: Member, rows: MemberRows) -> np.ndarray:
    """Return the full network's embeddings (N, D) of out-of-fold rows. Raises UserError for a head of another trunk."""
    for stage in fold_networks.stages(member):
        catalog.check_current(store.workspace, member, store.digests, stage=stage)
    fold_heads.read(store.workspace, member, fold_networks.stages(member))  # raises for another trunk
    train = store.rows(member, "train", embeddings=True)
    row_of = {sample_id: row for row, sample_id in enumerate(train.sample_ids.tolist())}
    embeddings: np.ndarray = _embeddings_of(train)[[row_of[sample_id] for sample_id in rows.sample_ids.tolist()]]
    key = digest_of([VERSION, fold_networks.digest(member, FOLDS), store.key(member, "train")])
    record = read_json(store.workspace.embeddings_record(member.name, OUT_OF_FOLD), remedy=AGAIN) or {}
    if record.get("key") != key or not store.workspace.embeddings(member.name, OUT_OF_FOLD).is_file():
        _write(store, member, rows, embeddings, {"key": key, "explained": None})
    return embeddings


def require_shared_space(name: str, train: MemberRows, val: MemberRows) -> float | None:
    """Check that the embeddings of a member's train and val rows are in one space; return the correlation on train.

    A network's logits are a linear map of its embeddings; in one embedding space, the map that is fitted on the val
    rows also predicts the logits of the train rows. The correlation is that of predicted and actual logits. None if the
    val rows do not determine the map. Raises UserError if the map does not hold on the train rows, as for unaligned
    embeddings of fold networks or embeddings of another network.
    """
    expected = [rows.logits - rows.logits.mean(axis=1, keepdims=True) for rows in (val, train)]
    to_logits = fit_ridge_map(_embeddings_of(val), expected[0])
    on_val = np.sqrt(max(to_logits.explained, 0.0))
    if on_val < MIN_CORRELATION:
        logger.warning(
            "member %s: %d val rows do not determine how its logits follow from its embeddings; whether its train rows "
            "share their space cannot be checked",
            name,
            len(expected[0]),
        )
        return None
    on_train = pearson_correlation(to_logits.apply(_embeddings_of(train)), expected[1])
    if on_train < MIN_KEPT_CORRELATION * on_val:
        raise UserError(
            f"member {name}: its train rows' embeddings are not of the space of its val rows: what gives its logits on "
            f"val (correlation {on_val:.2f}) does not on train ({on_train:.2f}). Embeddings of several fold networks "
            "cannot be pooled; use the val rows: --set runs.fusion.train_embeddings=val"
        )
    return on_train


def _joined(store: Store, members: Sequence[Member], train: dict[str, MemberRows]) -> EmbeddedRows:
    parts: dict[str, list[MemberRows]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for member in members:
        val = store.rows(member, "val", embeddings=True)
        widths = [_embeddings_of(rows).shape[1] for rows in (train[member.name], val)]
        if widths[0] != widths[1]:
            raise UserError(
                f"member {member.name}: embeddings of {widths[0]} numbers on train and {widths[1]} on val. {AGAIN}"
            )
        if _has_unseen_trunk(member):  # all embeddings are of one network
            facts[member.name] = {"agreement": None, "trunk": (member.trunk or {})["sha256"]}
        else:
            facts[member.name] = {"agreement": require_shared_space(member.name, train[member.name], val)}
        parts[member.name] = [train[member.name], val]
    return EmbeddedRows(_out_of_sample(align(parts, store.catalog.classes)), facts)


def _out_of_sample(rows: Rows) -> Rows:
    """Remove val rows that a network was trained on. Raises LeakageError if no val row is left."""
    remaining = np.flatnonzero(rows.out_of_sample | (rows.split != "val"))
    if "val" not in rows.split[remaining]:
        raise LeakageError(
            f"no val row is out of sample for all of {', '.join(rows.members)}, by what they were trained on, and val "
            "rows judge a fusion. Leave out members that were trained on val: --set backbones.exclude=[NAME]"
        )
    return rows if len(remaining) == len(rows.split) else rows.take(remaining)


def _embeddings_of(rows: MemberRows) -> np.ndarray:
    assert rows.embeddings is not None, "rows are read with their embeddings here"
    return rows.embeddings


def _alignment_key(store: Store, member: Member) -> str:
    """Return the digest of everything that a member's aligned embeddings depend on."""
    splits = store.catalog.splits
    return digest_of(
        [
            *(VERSION, fold_networks.digest(member, FOLDS), store.key(member, "val")),
            *(splits["train"]["digest"], splits["val"]["digest"]),
        ]
    )


def _stored_embeddings(store: Store, member: Member) -> tuple[np.ndarray, list[float]] | None:
    """Return the aligned embeddings of out-of-fold rows, float32 (N, D), with each map's R^2; None if not stored."""
    path = store.workspace.embeddings(member.name, OUT_OF_FOLD)
    record = read_json(store.workspace.embeddings_record(member.name, OUT_OF_FOLD), remedy=AGAIN)
    if record is None or record.get("key") != _alignment_key(store, member) or not path.is_file():
        return None
    return open_array(path, remedy=AGAIN), record["explained"]


def _align(store: Store, member_and_rows: tuple[Member, MemberRows]) -> None:
    """Compute and store the aligned embeddings of a member's out-of-fold rows."""
    member, rows = member_and_rows
    full = _embeddings_of(store.rows(member, "val", embeddings=True))
    fold = rows.fold
    assert fold is not None, "rows are out-of-fold here"
    numbers = [int(stage.removeprefix("fold")) for stage in fold_networks.stages(member)]
    if sorted(np.unique(fold).tolist()) != numbers:
        raise UserError(
            f"member {member.name}: its fold networks are {numbers}, its out-of-fold predictions name "
            f"{np.unique(fold).tolist()}. Use the val rows: --set runs.fusion.train_embeddings=val"
        )
    embeddings = np.empty((len(fold), full.shape[1]), dtype=np.float32)
    explained = []
    for number in numbers:
        inside = fold == number
        part = replace(rows, sample_ids=rows.sample_ids[inside], logits=rows.logits[inside])
        held_out, val_embeddings = _embeddings(store, member, number, part)
        to_full = fit_ridge_map(val_embeddings, full)
        embeddings[inside] = to_full.apply(held_out)
        explained.append(to_full.explained)
    _write(store, member, rows, embeddings, {"key": _alignment_key(store, member), "explained": explained})


def _write(store: Store, member: Member, rows: MemberRows, embeddings: np.ndarray, facts: Mapping[str, Any]) -> None:
    """Store embeddings (N, D) of out-of-fold rows in the full network's space; the record is written last."""
    record_path = store.workspace.embeddings_record(member.name, OUT_OF_FOLD)
    remove_file(record_path)
    write_array(store.workspace.embeddings(member.name, OUT_OF_FOLD), embeddings)
    record = {
        "rows": "oof",
        "space": "full network",
        "width": embeddings.shape[1],
        "member": member.name,
        "member_digest": member.digest,
        "classes": list(store.catalog.classes),
        "sample_ids": rows.sample_ids.tolist(),
    }
    write_json(record_path, {**record, **facts})


def _embeddings(store: Store, member: Member, number: int, rows: MemberRows) -> tuple[np.ndarray, np.ndarray]:
    """Return one fold network's embeddings of its held-out train rows and of the val rows.

    Raises UserError if the network does not reproduce the out-of-fold logits of these rows.
    """
    stage, train = f"fold{number}", store.images("train")
    catalog.check_current(store.workspace, member, store.digests, stage=stage)
    row_of = {sample_id: row for row, sample_id in enumerate(train.sample_ids)}
    images = [train.take([row_of[sample_id] for sample_id in rows.sample_ids.tolist()]), store.images("val")]
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
    if difference > MAX_PROBABILITY_DIFFERENCE:
        raise UserError(
            f"member {member.name}: {stage} does not give the out-of-fold predictions of its rows (mean difference "
            f"{difference:.3f}), so it is another network. Make them again: "
            f"{catalog.kfold_command(store.workspace, [member])}"
        )
    held_out, val_embeddings = (
        np.concatenate([batch.embeddings for batch in batches if batch.split == split]) for split in ("train", "val")
    )
    return held_out, val_embeddings
