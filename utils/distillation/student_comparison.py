"""A student's two controls: what they answer on val and test, what they cost, and what that says of the student."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import latency
from utils.core.errors import UserError
from utils.distillation import controls, teachers
from utils.distillation.controls import ALONE, TEACHER
from utils.distillation.students import Student
from utils.distillation.teachers import Teacher
from utils.numeric.metrics import softmax
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")


def keep(
    store: Store,
    student: Student,
    teacher: Teacher,
    derived: Member,
    alone: Mapping[str, np.ndarray],
) -> str:
    """Keep what the controls answer; gives the verdict on val in words.

    `alone` {split: probabilities (N, C)} is what the same network trained alone says of all images of val and test.
    """
    kept: dict[str, dict[str, np.ndarray]] = {}
    for split in alone:
        images = store.images(split)
        try:
            rows, probabilities = teachers.of_split(store, teacher, split)
        except UserError as error:  # an imported member without that split
            logger.warning("%s; %s has no controls on %s", error, student.ensemble, split)
            continue
        row_of = {sample_id: row for row, sample_id in enumerate(rows.sample_ids.tolist())}
        shared = [place for place, sample_id in enumerate(images.sample_ids) if sample_id in row_of]
        own = probabilities[[row_of[images.sample_ids[place]] for place in shared]]
        if split == "val":  # whose labels its combiner was fitted on
            unseen = teachers.unseen(store, teacher, split, [images.sample_ids[place] for place in shared])
            own = np.where(np.isnan(unseen), own, np.exp(unseen))
        kept[split] = {
            ALONE: alone[split][shared],
            TEACHER: own / own.sum(axis=1, keepdims=True),
            "labels": images.labels[shared],
            "sample_ids": np.array(images.sample_ids)[shared],
        }
    controls.keep(store.workspace, student.ensemble, kept)
    if "val" not in kept:
        return "the teacher has no predictions for val; evaluate compares on test"
    val = kept["val"]
    logits = store.rows(derived, "val")
    place_of = {sample_id: row for row, sample_id in enumerate(logits.sample_ids.tolist())}
    student_on_val = softmax(np.asarray(logits.logits)[[place_of[key] for key in val["sample_ids"].tolist()]])
    share, _ = controls.gain_kept(student_on_val, val[ALONE], val[TEACHER], val["labels"])
    scores = [controls.scores(each, val["labels"]) for each in (student_on_val, val[ALONE], val[TEACHER])]
    return controls.verdict(*scores, share)


def costs(store: Store, teacher: Teacher, derived: Member) -> dict[str, dict[str, Any]]:
    """`{alone, teacher: {latency_ms, size_mb}}`; an ensemble takes what its networks take one after the other."""
    members = teachers.members_of(store, teacher)
    measured = latency.measure(store, [derived, *members])

    def summed(found: Sequence[Member], networks: Sequence[int]) -> dict[str, Any] | None:
        if any(member.name not in measured for member in found):
            return None
        records = [measured[member.name] for member in found]
        sizes = set.intersection(*(set(record.batches) for record in records))
        times = {
            f"batch_{size}": {
                name: round(
                    sum(n * getattr(record.batches[size], name) for n, record in zip(networks, records, strict=True)), 4
                )
                for name in ("p50", "p95")
            }
            for size in sorted(sizes)
        }
        return times | {"device": records[0].device, "threads": records[0].threads}

    counts = [len(fold_networks.answering(member, teacher.ensemble.inference)) for member in members]
    size = teachers.size_mb(store, teacher)
    own = (store.workspace.base / derived.checkpoints[0]["path"]).stat().st_size / 1e6
    return {
        ALONE: {"latency_ms": summed([derived], [1]), "size_mb": round(own, 3)},
        TEACHER: {"latency_ms": summed(members, counts), "size_mb": None if size is None else round(size, 3)},
    }
