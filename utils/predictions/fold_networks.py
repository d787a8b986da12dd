"""The networks that K-fold trained: the mean of their probabilities may answer for a member, as its full network does.

Out-of-fold rows describe these networks. Their mean is kept beside the full network's arrays, as log-probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from utils.core import engines
from utils.core.artifacts import digest_of, open_array, read_record, write_array, write_json
from utils.numeric.metrics import log_softmax
from utils.predictions import catalog, image_splits, streaming
from utils.predictions.catalog import Member
from utils.predictions.rows import MemberRows, Rows, align
from utils.predictions.store import AGAIN, GPU_SHARE, Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # raised whenever the same weights and images would give other arrays
FULL, FOLDS = "full", "folds"
"""What may answer at inference: the member's own checkpoint, or the mean of its fold networks."""


def stages(member: Member) -> tuple[str, ...]:
    """`fold0`, `fold1`...: the networks that its out-of-fold predictions come from; none unless all are there."""
    found = [entry["stage"] for entry in member.checkpoints if entry["stage"].startswith("fold")]
    if member.oof is None or len(found) != member.oof["folds"]:
        return ()
    return tuple(sorted(found, key=lambda stage: int(stage.removeprefix("fold"))))


def digest(member: Member, inference: str) -> str:
    """Of the networks that answer and of what is needed to run them."""
    if inference == FULL:
        return member.digest
    weights = {entry["stage"]: entry["sha256"] for entry in member.checkpoints}
    return digest_of([VERSION, member.digest, [weights[stage] for stage in stages(member)]])


def key(store: Store, member: Member, split: str, inference: str) -> str:
    """What the stored rows of a member and split depend on."""
    if inference == FULL:
        return store.key(member, split)
    return digest_of([digest(member, FOLDS), store.key(member, split)])


def ensure(store: Store, members: Sequence[Member], splits: Sequence[str], inference: str) -> None:
    """Stream what is missing of the rows of the networks that answer; one network is resident at a time."""
    store.ensure(members, splits)
    if inference == FULL:
        return
    missing = [(m, gaps) for m in members if (gaps := [s for s in splits if not _is_stored(store, m, s)])]
    engine = engines.current()
    device = streaming.resolve_device(store.config.device) if missing else "cpu"
    share = GPU_SHARE if device != "cpu" else 0.0
    for _ in engine.each(_stream, missing, shared=(store, engine.placed(device)), what="fold networks", gpu=share):
        pass
    store.digests.save()


def rows(store: Store, member: Member, split: str, inference: str, *, embeddings: bool = False) -> MemberRows:
    """One member's stored rows of a split, memory-mapped; they must have been ensured.

    Embeddings are always those of the full network: every fold network has a space of its own.
    """
    found = store.rows(member, split, embeddings=embeddings)
    if inference == FULL:
        return found
    return replace(found, logits=open_array(store.workspace.fold_predictions(member.name, split), remedy=AGAIN))


def aligned(store: Store, members: Sequence[Member], split: str, inference: str, *, embeddings: bool = False) -> Rows:
    """Members together on the rows of a split."""
    parts = {member.name: [rows(store, member, split, inference, embeddings=embeddings)] for member in members}
    return replace(align(parts, store.catalog.classes), inference=inference)


def out_of_sample(store: Store, members: Sequence[Member], inference: str) -> Rows:
    """Members together on honest rows: out-of-fold on train where all have them, of these networks on val."""
    parts = store.out_of_sample_parts(members)
    for member in members if inference == FOLDS else ():
        parts[member.name][-1] = rows(store, member, "val", inference)
    return replace(align(parts, store.catalog.classes), inference=inference)


def _is_stored(store: Store, member: Member, split: str) -> bool:
    path = store.workspace.fold_predictions(member.name, split)
    record = read_record(path.with_suffix(".json"), remedy=AGAIN)
    return record is not None and record.get("key") == key(store, member, split, FOLDS) and path.is_file()


def _stream(store: Store, device: str, job: tuple[Member, Sequence[str]]) -> None:
    """Run a member's fold networks one after another; the sums stay in memory, (N, C) in float64 per split."""
    member, splits = job
    images = [store.images(split) for split in splits]
    order = [member.classes.index(name) for name in store.catalog.classes]
    names = stages(member)
    sums = {split.split: np.full((len(split.paths), len(order)), -np.inf) for split in images}
    for stage in names:
        catalog.check_current(store.workspace, member, store.digests, stage=stage)
        logger.info("streaming %s of %s over %s", stage, member.name, ", ".join(splits))
        batches = streaming.stream(
            member.network(store.workspace, stage=stage),
            images,
            batch_size=store.config.dataset.batch_size,
            device=device,
            image_cache=store.workspace.image_cache,
            decoding_threads=image_splits.decoding_threads(store.config.dataset.num_workers),
            val=store.images("val"),
        )
        for batch in batches:
            part = sums[batch.split][batch.start : batch.start + len(batch.logits)]
            np.logaddexp(part, log_softmax(batch.logits[:, order]), out=part)
    for split, total in sums.items():
        path = store.workspace.fold_predictions(member.name, split)
        path.with_suffix(".json").unlink(missing_ok=True)
        write_array(path, (total - np.log(len(names))).astype(np.float32))
        write_json(path.with_suffix(".json"), {"key": key(store, member, split, FOLDS), "networks": list(names)})
