"""Fold networks: the mean of their probabilities can replace the predictions of a member's full network.

Out-of-fold rows describe the fold networks. The mean is stored with the full network's arrays, as log-probabilities.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from utils.core import engines
from utils.core.artifacts import digest_of, write_array, write_json
from utils.core.links import remove_file
from utils.core.parsed_files import array_once, record_once
from utils.numeric.metrics import log_softmax
from utils.predictions import catalog, extraction, fold_heads, image_splits, streaming, training_data
from utils.predictions.catalog import Member
from utils.predictions.extraction import GPU_SHARE
from utils.predictions.rows import MemberRows, Rows, align
from utils.predictions.store import AGAIN, Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented whenever the arrays for the same weights and images change
FULL, FOLDS = "full", "folds"
"""Networks used at inference: the member's full network, or the mean of its fold networks."""


class BuiltEnsemble(Protocol):
    """The record of a saved ensemble on the networks that it was built from."""

    @property
    def members(self) -> Sequence[str]:
        """Names of the members that it uses."""

    @property
    def member_digests(self) -> Mapping[str, str]:
        """{member: `digest` of its networks at the time of building}."""

    @property
    def inference(self) -> str:
        """FULL or FOLDS."""


def stages(member: Member) -> tuple[str, ...]:
    """`fold0`, `fold1`...: the networks of its out-of-fold predictions; empty unless all of them exist."""
    folds = [entry["stage"] for entry in member.checkpoints if entry["stage"].startswith("fold")]
    if member.oof is None or len(folds) != member.oof["folds"]:
        return ()
    return tuple(sorted(folds, key=lambda stage: int(stage.removeprefix("fold"))))


def answering(member: Member, inference: str, *, embeddings: bool = False) -> tuple[str | None, ...]:
    """Stages of the networks to run for a member, in order; None stands for its full network.

    With `embeddings`, the full network is the first of them: fold networks have no common embedding space.
    """
    if inference == FULL:
        return (None,)
    return (*((None,) if embeddings else ()), *stages(member))


def missing_and_changed(members: Mapping[str, Member], ensemble: BuiltEnsemble) -> tuple[list[str], list[str]]:
    """Names of an ensemble's members that the catalog no longer has, and of those whose networks have changed.

    `members` are those of the catalog. An imported member has changed if its predictions have.
    """
    missing = [name for name in ensemble.members if name not in members]
    changed = [
        name
        for name in ensemble.members
        if name in members and digest(members[name], ensemble.inference) != ensemble.member_digests[name]
    ]
    return missing, changed


class FoldMean:
    """The mean of several networks' probabilities on N rows, as log-probabilities, summed in float64 (N, C)."""

    def __init__(self, n_rows: int, n_classes: int) -> None:
        self._total = np.full((n_rows, n_classes), -np.inf)

    def add(self, logits: np.ndarray, start: int = 0) -> None:
        """Add one network's logits (B, C) for the rows from `start` on."""
        rows = self._total[start : start + len(logits)]
        np.logaddexp(rows, log_softmax(logits), out=rows)

    def mean(self, n_networks: int) -> np.ndarray:
        """The mean as log-probabilities, float32 (N, C), after all rows of `n_networks` networks have been added."""
        return (self._total - np.log(n_networks)).astype(np.float32)


def digest(member: Member, inference: str) -> str:
    """Digest of the networks that `inference` selects and of everything needed to run them."""
    if inference == FULL:
        return member.digest
    weights = {entry["stage"]: entry["sha256"] for entry in member.checkpoints}
    return digest_of([VERSION, member.digest, [weights[stage] for stage in stages(member)]])


def key(store: Store, member: Member, split: str, inference: str) -> str:
    """Digest of everything that the stored rows of a member and split depend on."""
    if inference == FULL:
        return store.key(member, split)
    return digest_of([digest(member, FOLDS), store.key(member, split)])


def ensure(store: Store, members: Sequence[Member], splits: Sequence[str], inference: str) -> None:
    """Run the networks that `inference` selects on the splits that the store lacks, one at a time in each process."""
    extraction.ensure(store, members, splits)
    if inference == FULL:
        return
    missing = [(m, gaps) for m in members if (gaps := [s for s in splits if not _is_stored(store, m, s)])]
    engine = engines.current()
    device = streaming.resolve_device(store.config.device) if missing else "cpu"
    share = GPU_SHARE if device != "cpu" else 0.0
    to_stream = [member for member, _ in missing]
    streamed = engine.map(
        _stream,
        missing,
        shared=(store, engine.worker_device(device)),
        description="fold networks",
        n_processes=extraction.n_processes(store, to_stream, device),
        threads_per_job=extraction.job_threads(store, to_stream, device),
        gpu=share,
    )
    for number, ((member, gaps), _) in enumerate(zip(missing, streamed, strict=True), start=1):
        logger.info(
            "[%d/%d] streamed the fold networks of %s over %s", number, len(missing), member.name, ", ".join(gaps)
        )
    store.digests.save()


def rows(store: Store, member: Member, split: str, inference: str, *, embeddings: bool = False) -> MemberRows:
    """One member's stored rows of a split, memory-mapped; `ensure` must have run.

    Embeddings are always those of the full network: fold networks have no common embedding space.
    """
    full = store.rows(member, split, embeddings=embeddings)
    if inference == FULL:
        return full
    return replace(full, logits=array_once(store.workspace.fold_predictions(member.name, split), remedy=AGAIN))


def aligned(store: Store, members: Sequence[Member], split: str, inference: str, *, embeddings: bool = False) -> Rows:
    """Several members' rows of a split, aligned."""
    parts = {member.name: [rows(store, member, split, inference, embeddings=embeddings)] for member in members}
    return replace(align(parts, store.catalog.classes), inference=inference)


def out_of_sample(store: Store, members: Sequence[Member], inference: str) -> Rows:
    """Several members' out-of-sample rows, aligned: out-of-fold on train if all have them, and those of val.

    Rows of val are by the networks that `inference` selects. Raises LeakageError if no row is out of sample for all.
    """
    parts = store.out_of_sample_parts(members)
    training_data.require_shared_splits(store.catalog, parts)
    for member in members if inference == FOLDS else ():
        parts[member.name] = [_by_fold_networks(store, member, part) for part in parts[member.name]]
    return replace(align(parts, store.catalog.classes), inference=inference)


def _by_fold_networks(store: Store, member: Member, member_rows: MemberRows) -> MemberRows:
    """Rows of val, predicted by the member's fold networks; rows of train are returned unchanged."""
    if member_rows.split != "val":
        return member_rows
    of_folds = rows(store, member, "val", FOLDS)
    if len(member_rows.sample_ids) == len(of_folds.sample_ids):
        return of_folds
    return of_folds.take(np.isin(of_folds.sample_ids, member_rows.sample_ids))


def _is_stored(store: Store, member: Member, split: str) -> bool:
    path = store.workspace.fold_predictions(member.name, split)
    record = record_once(path.with_suffix(".json"), remedy=AGAIN)
    return record is not None and record.get("key") == key(store, member, split, FOLDS) and path.is_file()


def _stream(store: Store, device: str, job: tuple[Member, Sequence[str]]) -> None:
    """Run a member's fold networks one after another; one `FoldMean` per split stays in memory.

    Fold networks that share the full network's trunk need no pass: their logits are computed from stored embeddings.
    """
    member, splits = job
    for stage in stages(member):
        catalog.check_current(store.workspace, member, store.digests, stage=stage)
    if member.trunk is not None and _by_heads(store, member, splits):
        return
    images = [store.images(split) for split in splits]
    order = [member.classes.index(name) for name in store.catalog.classes]
    names = stages(member)
    means = {split.split: FoldMean(len(split.paths), len(order)) for split in images}
    for stage in names:
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
            means[batch.split].add(batch.logits[:, order], batch.start)
    for split, mean in means.items():
        _write(store, member, split, mean.mean(len(names)))


def _by_heads(store: Store, member: Member, splits: Sequence[str]) -> bool:
    """Write the means of a member's fold heads on the full network's embeddings; False if these do not suffice."""
    heads = fold_heads.read(store.workspace, member, stages(member))
    if heads is None or store.lacks_embeddings(member):
        return False
    full, folds = heads
    columns = [member.classes.index(name) for name in store.catalog.classes]
    means: dict[str, np.ndarray] = {}
    for split in splits:
        rows_of_split = store.rows(member, split, embeddings=True)
        embeddings = rows_of_split.embeddings
        if embeddings is None or not fold_heads.explains(full, rows_of_split.logits, embeddings, columns):
            return False
        mean = FoldMean(len(rows_of_split.sample_ids), len(columns))
        for head in folds:
            mean.add(head.logits(embeddings)[:, columns])
        means[split] = mean.mean(len(folds))
    for split, values in means.items():
        _write(store, member, split, values)
    return True


def _write(store: Store, member: Member, split: str, mean: np.ndarray) -> None:
    """Store the mean of a member's fold networks on a split; the record is written last."""
    path = store.workspace.fold_predictions(member.name, split)
    remove_file(path.with_suffix(".json"))
    write_array(path, mean)
    record = {"key": key(store, member, split, FOLDS), "networks": list(stages(member))}
    write_json(path.with_suffix(".json"), record)
