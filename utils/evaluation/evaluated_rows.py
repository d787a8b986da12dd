"""Selection of the evaluated rows, and their overlap with the rows that a model was fitted on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from utils.building.ensembles import RowSet
from utils.core.errors import UserError
from utils.predictions.rows import UNKNOWN, MemberRows, Rows, align
from utils.predictions.store import IMPORT, Store

logger = logging.getLogger("disease_pipeline")


def evaluated_rows(store: Store, member_rows: Mapping[str, MemberRows], split: str) -> tuple[Rows, int]:
    """Align all members on a split, without unlabelled rows and without copies of train or val images.

    Returns the rows and the number of copies. Raises UserError if no row remains.
    """
    rows = align({name: [part] for name, part in member_rows.items()}, store.catalog.classes)
    copies = _copies(store, rows, split) if store.catalog.has_images else []
    for sample_id, original in copies[:5]:
        logger.warning("evaluate: %s/%s is the same image as %s and is left out", split, sample_id, original)
    if copies:
        logger.warning("evaluate: %d row(s) left out for every member and ensemble", len(copies))
    unlabelled = rows.labels == UNKNOWN
    if unlabelled.any():
        logger.warning(
            "evaluate: %d of %d row(s) of %s are left out: no label", unlabelled.sum(), len(unlabelled), split
        )
    if unlabelled.all():
        raise UserError(f"{split}: no row has a label. Write labels into {split}.npz of any member, then: {IMPORT}")
    remaining = ~np.isin(rows.sample_ids, [sample_id for sample_id, _ in copies]) & ~unlabelled
    if not remaining.any():
        raise UserError(f"{split}: every image is also a train or val image. Split the images anew")
    return rows.take(np.flatnonzero(remaining)), len(copies)


def _copies(store: Store, rows: Rows, split: str) -> list[tuple[str, str]]:
    """Return (sample id, train or val sample of equal content) of the evaluated rows that are such copies."""
    originals = {
        content: f"{earlier_split}/{sample_id}"
        for earlier_split in ("train", "val")
        if earlier_split != split
        for sample_id, content in zip(
            store.images(earlier_split).sample_ids, store.images(earlier_split).contents, strict=True
        )
    }
    images = store.images(split)
    contents = dict(zip(images.sample_ids, images.contents, strict=True))
    return [
        (sample_id, originals[contents[sample_id]]) for sample_id in rows.sample_ids if contents[sample_id] in originals
    ]


def count_overlap(row_sets: Sequence[RowSet], rows: Rows) -> int:
    """Return the number of evaluated rows that are in `row_sets`, by (split, sample id)."""
    keys = {(part.split, sample_id) for part in row_sets for sample_id in part.sample_ids}
    return sum(key in keys for key in zip(rows.split.tolist(), rows.sample_ids.tolist(), strict=True))
