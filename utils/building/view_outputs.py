"""Out-of-sample logits of one member by groups of views: the fold networks answer for train rows, as for K-fold.

They are kept in `ensembles/tta/<member>_views.npz`, so that another choice among the same views runs no network.
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

VERSION = 1  # raised whenever the same networks and images would give other logits
MAX_PROBABILITY_DIFFERENCE = 0.02  # mean over the rows; half precision on CUDA stays below it
FULL_NETWORK = -1  # in place of the number of a fold


@dataclass(frozen=True)
class MemberViews:
    """One member's out-of-sample rows, with its logits on each group of views."""

    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,)"""
    network: np.ndarray
    """int64 (N,): number of the fold network that answers, or `FULL_NETWORK`"""
    logits: dict[str, np.ndarray]
    """{`ORIGINAL` or name of a group: float32 (N, C)}"""

    def keys(self) -> list[tuple[str, str]]:
        """(split, sample id) of each row."""
        return list(zip(self.split.tolist(), self.sample_ids.tolist(), strict=True))


def reason_without(store: Store, member: Member) -> str | None:
    """Why there are no out-of-sample rows of a member's views; None where there are some."""
    if member.source == catalog.IMPORTED:
        return "imported predictions; there is no network that could look at views"
    if member.oof is not None and not fold_networks.stages(member):
        command = catalog.kfold_command(store.workspace, [member])
        return f"the fold networks of its out-of-fold predictions are not all there. Make them again: {command}"
    if not store.out_of_sample_parts([member])[member.name]:
        return "no out-of-sample rows, by what it was trained on"
    return None


def measure(store: Store, member: Member, groups: Sequence[str]) -> MemberViews:
    """The member's logits on its out-of-sample rows, of the image itself and of each group of views.

    Networks run where the logits are not kept. Raises UserError where the fold networks do not give the out-of-fold
    predictions that are known.
    """
    names = (ORIGINAL, *groups)
    rows, known = _rows(store, member)
    splits = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    key = digest_of([VERSION, view_members.networks_digest(member), splits, list(store.catalog.classes)])
    path = store.workspace.view_outputs(member.name)
    kept: dict[str, Any] = read_arrays(path, remedy=view_members.AGAIN) if path.is_file() else {}
    if str(kept.get("key")) != key or kept["sample_ids"].tolist() != rows.sample_ids.tolist():
        kept = {}
    missing = [name for name in names if name not in kept]
    if missing:
        kept |= _run(store, member, rows, missing)
        write_arrays(path, {**kept, "key": np.array(key), "sample_ids": rows.sample_ids})
    difference = float(np.abs(softmax(kept[ORIGINAL]) - softmax(known)).mean())
    if difference > MAX_PROBABILITY_DIFFERENCE:
        raise UserError(
            f"member {member.name}: its networks do not give its out-of-sample predictions (mean difference "
            f"{difference:.3f}), so they are others. Make them again: "
            f"{catalog.kfold_command(store.workspace, [member])}"
        )
    return MemberViews(rows.split, rows.sample_ids, rows.labels, rows.network, {name: kept[name] for name in names})


def _rows(store: Store, member: Member) -> tuple[MemberViews, np.ndarray]:
    """The member's out-of-sample rows without logits, and the logits (N, C) that are known of them."""
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
    """{group: logits float32 (N, C)}; one network is in memory at a time."""
    order = [member.classes.index(name) for name in store.catalog.classes]
    logits = {group: np.empty((len(rows.labels), len(order)), dtype=np.float32) for group in groups}
    for number in np.unique(rows.network).tolist():
        stage = None if number == FULL_NETWORK else f"fold{number}"
        catalog.check_current(store.workspace, member, store.digests, stage=stage)
        spec = member.network(store.workspace, stage=stage)
        for split in ("train", "val"):
            answered = np.flatnonzero((rows.network == number) & (rows.split == split))
            if not len(answered):
                continue
            images = store.images(split)
            row_of = {sample_id: row for row, sample_id in enumerate(images.sample_ids)}
            part = images.take([row_of[sample_id] for sample_id in rows.sample_ids[answered].tolist()])
            logger.info(
                "views of %s (%s) on %d rows of %s: %s",
                *(member.name, stage or "the full network", len(answered), split, ", ".join(groups)),
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
                logits[group][answered] = np.concatenate([batch.logits[:, order] for batch in batches])
    store.digests.save()
    return logits


def _open(spec: NetworkSpec, group: str) -> Any:
    """The network on one group of views alone."""
    network = streaming.open_network(spec)
    if group == ORIGINAL:
        return network
    return streaming.average_over_views(network, spec, (group,), with_original=False)
