"""Verification of members by running them on val images and on a sample of their out-of-fold rows.

`inspection` evaluates the stored results. Outputs of a network on whole splits are kept in the prediction store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.predictions import catalog, fold_heads, out_of_fold, output_writing, streaming, training_data
from utils.predictions.catalog import Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.inspection import Inspector, measure
from utils.predictions.out_of_fold import OutOfFoldPredictions
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

SAMPLE = 500  # number of train rows per member on which out-of-fold predictions are checked
AUTOCAST_EQUAL = 0.02  # on CUDA, networks run in bfloat16 with eight bits of precision
REFOLDED = 0.02  # tolerance for rerunning a fold network, as a fraction of a row's largest logit
AUTOCAST_REFOLDED = 0.1


def verify(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member on all val images and on a sample of its out-of-fold rows, and store the results.

    Existing results are not computed again unless `force` is set or a network failed to run; folds that failed with
    another BASE-BACK are run again.
    """
    digests = inspector.digests
    measured_key, leakage_key = inspector.measured_key(member), inspector.leakage_key(member)
    measured, compared = digests.facts(measured_key), digests.facts(leakage_key)
    is_measured = measured is not None and "error" not in measured and not force
    is_compared = compared is not None and compared == inspector.leakage_check(member) and not force
    if is_measured and (member.oof is None or is_compared):
        return
    val, train = inspector.store.images("val"), inspector.store.images("train")
    try:
        if member.oof is None or is_compared:
            outputs = _outputs(inspector, member, {"val": None}, anew=force)
            digests.keep(measured_key, measure(outputs["val"].logits, val.labels))
            return
        path, remedy = inspector.workspace.base / member.oof["path"], catalog.kfold_remedy(inspector.workspace, member)
        predictions = out_of_fold.read(path, member.name, train, inspector.classes, remedy=remedy)
        sample = _sample(inspector.config.seed, predictions)
        rows = {"val": None, "train": _rows_of(train, predictions, sample)}
        outputs = _outputs(inspector, member, rows, anew=force)
        digests.keep(measured_key, measure(outputs["val"].logits, val.labels))
        digests.keep(leakage_key, _compare(inspector, member, predictions, sample, outputs["train"]))
    except UserError as error:
        code = "surplus_logits" if isinstance(error, streaming.ExtraOutputsError) else "does_not_run"
        digests.keep(measured_key, {"error": str(error), "code": code, "base_back": inspector.base_back})


def verify_training_data(inspector: Inspector, member: Member, *, force: bool = False) -> None:
    """Run a member on the test images if it was stated not to be trained on them, and store the result.

    Only `training_problems` reads the result. A member that failed on val is skipped.
    """
    key, facts = inspector.measured_key(member, "test"), inspector.measured(member) or {}
    if "test" not in training_data.unseen_splits(member) or "n" not in facts:
        return
    if force or inspector.digests.facts(key) is None:
        outputs = _outputs(inspector, member, {"test": None}, anew=force)
        inspector.digests.keep(key, measure(outputs["test"].logits, inspector.store.images("test").labels))


def _sample(seed: int, predictions: OutOfFoldPredictions) -> np.ndarray:
    """Sorted indices of a seeded sample of the out-of-fold rows."""
    rows = np.random.default_rng(seed).permutation(len(predictions.labels))
    return np.sort(rows[:SAMPLE])


def _compare(
    inspector: Inspector, member: Member, predictions: OutOfFoldPredictions, sample: np.ndarray, outputs: _Outputs
) -> dict[str, Any]:
    """Compare out-of-fold predictions with the full network's `outputs` on the sample, and with the fold networks'.

    Returns `{equal, told, refolded: {fold: [differing, rows]}, unreadable: [message], base_back}`, where `told` is the
    number of comparable rows. Fold networks without a checkpoint are skipped; heads that share the full network's
    trunk need no pass.
    """
    on_cuda = inspector.device != "cpu"
    kind, stored = predictions.kind, predictions.logits
    tolerance = AUTOCAST_EQUAL if on_cuda else out_of_fold.EQUAL
    equal, comparable = out_of_fold.count_equal_rows(kind, stored[sample], outputs.logits, tolerance=tolerance)
    refolded: dict[str, list[int]] = {}
    unreadable = []
    stages = {entry["stage"] for entry in member.checkpoints}
    for fold in np.unique(predictions.fold[sample]).tolist():
        stage, in_fold = f"fold{fold}", predictions.fold[sample] == fold
        if stage not in stages:
            continue
        rows = sample[in_fold]
        try:
            logits = _by_head(inspector, member, stage, outputs.take(in_fold))
            if logits is None:
                in_train = _rows_of(inspector.store.images("train"), predictions, rows)
                logits = _outputs(inspector, member, {"train": in_train}, stage)["train"].logits
        except UserError as error:
            unreadable.append(str(error))
            continue
        tolerance = AUTOCAST_REFOLDED if on_cuda else REFOLDED
        same, compared = out_of_fold.count_equal_rows(kind, stored[rows], logits, tolerance=tolerance)
        refolded[stage] = [compared - same, compared]
    facts = {"equal": equal, "told": comparable, "refolded": refolded, "unreadable": unreadable}
    return facts | {"base_back": inspector.base_back}


def _rows_of(train: ImageSplit, predictions: OutOfFoldPredictions, rows: np.ndarray) -> np.ndarray:
    """Indices into `train` of the given out-of-fold rows, in their order."""
    row_of = {sample_id: row for row, sample_id in enumerate(train.sample_ids)}
    return np.array([row_of[sample_id] for sample_id in predictions.sample_ids[rows].tolist()])


@dataclass(frozen=True)
class _Outputs:
    """Outputs of a network for the rows of a split."""

    logits: np.ndarray
    """float32 (N, C), columns in the workspace's class order"""
    embeddings: np.ndarray | None
    """float32 (N, D); None except for a network whose fold networks share its trunk"""

    def take(self, rows: np.ndarray) -> _Outputs:
        """Select rows by a mask (N,) or by indices."""
        return _Outputs(self.logits[rows], None if self.embeddings is None else self.embeddings[rows])


def _by_head(inspector: Inspector, member: Member, stage: str, outputs: _Outputs) -> np.ndarray | None:
    """Logits (N, C) of a fold head on the full network's embeddings; None if these do not reproduce its logits."""
    if outputs.embeddings is None or (heads := fold_heads.read(inspector.workspace, member, (stage,))) is None:
        return None
    full, (head,) = heads
    columns = [member.classes.index(name) for name in inspector.classes]
    if not fold_heads.explains(full, outputs.logits, outputs.embeddings, columns):
        return None
    return head.logits(outputs.embeddings)[:, columns]


def _outputs(
    inspector: Inspector,
    member: Member,
    rows: Mapping[str, np.ndarray | None],
    stage: str | None = None,
    *,
    anew: bool = False,
) -> dict[str, _Outputs]:
    """{split: outputs} of a member, or of another of its stages, for the given rows of each split; None: all rows.

    The member's outputs on whole splits are kept in the prediction store, and read from it unless `anew` is set.
    """
    store = inspector.store
    outputs: dict[str, _Outputs] = {}
    runs: dict[str, ImageSplit] = {}
    whole_splits = []
    for split, of_split in rows.items():
        images = store.images(split)
        if stage is not None or (of_split is not None and len(of_split) < len(images.paths)):
            runs[split] = images if of_split is None else images.take(of_split)
            continue
        whole_splits.append(split)
        if anew or not store.is_stored(member, split):
            runs[split] = images
        else:
            outputs[split] = _stored_outputs(store, member, split)
    if runs:
        outputs |= _run(inspector, member, runs, stage, [runs[split] for split in whole_splits if split in runs])
    for split in whole_splits:
        of_split = rows[split]
        if of_split is not None:
            outputs[split] = outputs[split].take(of_split)
    return outputs


def _stored_outputs(store: Store, member: Member, split: str) -> _Outputs:
    rows = store.rows(member, split, embeddings=member.trunk is not None)
    return _Outputs(rows.logits, rows.embeddings)


def _run(
    inspector: Inspector,
    member: Member,
    images_of: Mapping[str, ImageSplit],
    stage: str | None,
    kept: Sequence[ImageSplit],
) -> dict[str, _Outputs]:
    """{split: outputs} of one pass over the images; the splits `kept` are written to the prediction store."""
    batches = output_writing.stream_member(
        inspector.store,
        member,
        list(images_of.values()),
        kept=kept,
        device=inspector.device,
        threads=inspector.threads,
        stage=stage,
    )
    order = [member.classes.index(name) for name in inspector.classes]
    logits: dict[str, list[np.ndarray]] = {split: [] for split in images_of}
    embeddings: dict[str, list[np.ndarray]] = {split: [] for split in images_of}
    for batch in batches:
        logits[batch.split].append(batch.logits[:, order])
        if member.trunk is not None:
            embeddings[batch.split].append(batch.embeddings)
    counts = ", ".join(f"{len(images.paths)} of {split}" for split, images in images_of.items())
    logger.info("verify %s%s: ran on %s", member.name, f" {stage}" if stage else "", counts)
    return {
        split: _Outputs(np.concatenate(parts), np.concatenate(embeddings[split]) if embeddings[split] else None)
        for split, parts in logits.items()
    }
