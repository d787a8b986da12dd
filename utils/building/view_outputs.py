"""Out-of-sample logits of one member per group of views; the fold networks predict train rows, as in K-fold.

They are stored in `ensembles/tta/<member>_views.npz`, so that another choice among the same views runs no network.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from utils.core.artifacts import digest_of, read_arrays, write_arrays
from utils.core.errors import UserError
from utils.networks.construction import NetworkSpec
from utils.numeric.metrics import softmax
from utils.numeric.view_choice import ORIGINAL
from utils.predictions import catalog, fold_networks, image_splits, streaming, view_members
from utils.predictions.catalog import Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 1  # incremented when the same networks and images would give different logits
MAX_PROBABILITY_DIFFERENCE = 0.02  # mean over the rows; half precision on CUDA stays below it
FULL_NETWORK = -1  # instead of the number of a fold


@dataclass(frozen=True)
class MemberViews:
    """Out-of-sample rows of one member, with its logits for each group of views."""

    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,)"""
    network: np.ndarray
    """int64 (N,): number of the fold network that predicts the row, or `FULL_NETWORK`"""
    logits: dict[str, np.ndarray]
    """{`ORIGINAL` or name of a group: float32 (N, C)}"""

    def keys(self) -> list[tuple[str, str]]:
        """Return (split, sample id) of each row."""
        return list(zip(self.split.tolist(), self.sample_ids.tolist(), strict=True))


def reason_without(store: Store, member: Member) -> str | None:
    """Return why a member has no out-of-sample rows for views; None if it has some."""
    if member.source == catalog.IMPORTED:
        return "imported predictions; there is no network that could look at views"
    if member.oof is not None and not fold_networks.stages(member):
        command = catalog.kfold_command(store.workspace, [member])
        return f"the fold networks of its out-of-fold predictions are not all there. Make them again: {command}"
    if not store.out_of_sample_parts([member])[member.name]:
        return "no out-of-sample rows, by what it was trained on"
    return None


def measure(store: Store, member: Member, groups: Sequence[str]) -> MemberViews:
    """Return the member's logits on its out-of-sample rows, for the image itself and for each group of views.

    Networks run if the logits are not stored. Raises UserError if the networks do not reproduce the member's stored
    out-of-sample predictions.
    """
    names = (ORIGINAL, *groups)
    rows, recorded = _rows(store, member)
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    key = digest_of([VERSION, view_members.networks_digest(member), splits, list(store.catalog.classes)])
    path = store.workspace.view_outputs(member.name)
    stored: dict[str, Any] = read_arrays(path, remedy=view_members.AGAIN) if path.is_file() else {}
    if str(stored.get("key")) != key or stored["sample_ids"].tolist() != rows.sample_ids.tolist():
        stored = {}
    missing = [name for name in names if name not in stored]
    if missing:
        stored |= _run(store, member, rows, missing)
        write_arrays(path, {**stored, "key": np.array(key), "sample_ids": rows.sample_ids})
    difference = float(np.abs(softmax(stored[ORIGINAL]) - softmax(recorded)).mean())
    if difference > MAX_PROBABILITY_DIFFERENCE:
        raise UserError(
            f"member {member.name}: its networks do not give its out-of-sample predictions (mean difference "
            f"{difference:.3f}), so they are others. Make them again: "
            f"{catalog.kfold_command(store.workspace, [member])}"
        )
    return MemberViews(rows.split, rows.sample_ids, rows.labels, rows.network, {name: stored[name] for name in names})


def _rows(store: Store, member: Member) -> tuple[MemberViews, np.ndarray]:
    """Return the member's out-of-sample rows without logits, and their stored logits (N, C)."""
    parts = store.out_of_sample_parts([member])[member.name]
    networks = [np.full(len(part.sample_ids), FULL_NETWORK) if part.fold is None else part.fold for part in parts]
    rows = MemberViews(
        split=np.concatenate([np.full(len(part.sample_ids), part.split) for part in parts]),
        sample_ids=np.concatenate([np.asarray(part.sample_ids) for part in parts]),
        labels=np.concatenate([np.asarray(part.labels) for part in parts]),
        network=np.concatenate(networks).astype(np.int64),
        logits={},
    )
    return rows, np.concatenate([np.asarray(part.logits) for part in parts])


def _run(store: Store, member: Member, rows: MemberViews, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute {group: logits float32 (N, C)}, with one network in memory at a time."""
    order = [member.classes.index(name) for name in store.catalog.classes]
    logits = {group: np.empty((len(rows.labels), len(order)), dtype=np.float32) for group in groups}
    for number in np.unique(rows.network).tolist():
        stage = None if number == FULL_NETWORK else f"fold{number}"
        catalog.check_current(store.workspace, member, store.digests, stage=stage)
        spec = member.network(store.workspace, stage=stage)
        for split in ("train", "val"):
            indices = np.flatnonzero((rows.network == number) & (rows.split == split))
            if not len(indices):
                continue
            images = store.images(split)
            row_of = {sample_id: row for row, sample_id in enumerate(images.sample_ids)}
            part = images.take([row_of[sample_id] for sample_id in rows.sample_ids[indices].tolist()])
            logger.info(
                "views of %s (%s) on %d rows of %s: %s",
                *(member.name, stage or "the full network", len(indices), split, ", ".join(groups)),
            )
            for group in groups:
                batches = streaming.stream(
                    spec,
                    [part],
                    batch_size=store.config.dataset.batch_size,
                    device=streaming.resolve_device(store.config.device),
                    image_cache=store.workspace.image_cache,
                    decoding_threads=image_splits.decoding_threads(store.config.dataset.num_workers),
                    val=store.images("val"),
                    opener=partial(_open, group=group),
                )
                logits[group][indices] = np.concatenate([batch.logits[:, order] for batch in batches])
    store.digests.save()
    return logits


def _open(spec: NetworkSpec, group: str) -> Any:
    """Open the network, averaged over the views of one group."""
    network = streaming.open_network(spec)
    if group == ORIGINAL:
        return network
    return streaming.average_over_views(network, spec, (group,), with_original=False)
