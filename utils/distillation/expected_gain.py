"""The possible gain of a student: the teacher's advantage over the student's architecture on out-of-sample rows."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from utils.distillation import teachers, verdicts
from utils.distillation.students import Student
from utils.distillation.teachers import Teacher
from utils.distillation.verdicts import Difference
from utils.numeric.metrics import softmax
from utils.numeric.temperature import fit_temperature
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

SPLITS = ("train", "val")
"""Splits whose cross-fitted predictions are compared."""


def before_training(store: Store, student: Student, teacher: Teacher) -> dict[str, Any] | None:
    """Log the teacher's advantage over a member of the student's architecture, and warn if distillation has no use.

    Returns `{member, rows, accuracy, log_loss}` with the teacher's advantages and their intervals; None if there is no
    such member, or no row out of sample for both.
    """
    members = teachers.members_of(store, teacher)
    _log_inputs(student, members)
    if len(members) == 1 and _is_alike(student, members[0]):
        logger.warning(
            "the teacher %s is one network of the student's own architecture (%s): its student cannot be smaller or "
            "faster than it; set another teacher or a smaller student",
            *(teacher.name, members[0].name),
        )
    member = _member_alike(store, student, teacher)
    if member is None:
        logger.info(
            "no member has the student's architecture %s: how far the teacher is ahead is known after the training",
            student.architecture,
        )
        return None
    compared = _differences(store, teacher, member)
    if compared is None:
        return None
    differences, count = compared
    text = verdicts.difference_text(differences)
    if all(each.sign <= 0 for each in differences.values()):
        logger.warning(
            "the teacher %s is not ahead of %s, the student's architecture alone, beyond noise on %d out-of-sample "
            "rows (%s): there is nothing that a student could keep. Choose a better teacher or a smaller student",
            *(teacher.name, member.name, count, text),
        )
    else:
        logger.info(
            "the teacher %s is ahead of %s, the student's architecture alone, on %d out-of-sample rows: %s",
            *(teacher.name, member.name, count, text),
        )
    return {"member": member.name, "rows": count} | {name: each.as_record() for name, each in differences.items()}


def _log_inputs(student: Student, members: list[Member]) -> None:
    """Log members with other preprocessing than the student; they still receive the same views."""
    differing_names = [
        member.name
        for member in members
        if member.source != IMPORTED and member.image_preprocessing != student.preprocessing
    ]
    if differing_names:
        logger.info(
            "the student reads images otherwise (%s) than %s: each network is shown the same view by its own "
            "preprocessing",
            *(student.preprocessing.describe(), ", ".join(differing_names)),
        )


def _is_alike(student: Student, member: Member) -> bool:
    return (member.architecture, member.size) == (student.architecture, student.size)


def _member_alike(store: Store, student: Student, teacher: Teacher) -> Member | None:
    """The trained member of the student's architecture; of several, the one with the student's input size."""
    alike = [
        member
        for member in store.catalog.members.values()
        if member.source == "trained" and member.usable and _is_alike(student, member) and member.name != teacher.name
    ]
    return min(alike, key=lambda member: (member.img_size != student.img_size, member.name), default=None)


def _differences(store: Store, teacher: Teacher, member: Member) -> tuple[dict[str, Difference], int] | None:
    """The teacher's advantages over a member and the number of rows; None without rows out of sample for both.

    Both are calibrated by a temperature fitted on these rows.
    """
    alone = teachers.resolve(store, member.name, excluded_member="")
    parts: dict[str, list[np.ndarray]] = {"teacher": [], "alone": [], "labels": []}
    keys: list[tuple[str, str]] = []
    for split in SPLITS:
        samples = store.images(split)
        predictions = [
            teachers.crossfit_log_probabilities(store, each, split, samples.sample_ids) for each in (teacher, alone)
        ]
        shared = ~np.isnan(np.concatenate(predictions, axis=1)).any(axis=1)
        parts["teacher"].append(predictions[0][shared])
        parts["alone"].append(predictions[1][shared])
        parts["labels"].append(samples.labels[shared])
        keys += [
            (split, sample_id) for sample_id, is_shared in zip(samples.sample_ids, shared, strict=True) if is_shared
        ]
    labels = np.concatenate(parts["labels"])
    if len(labels) < 2:
        return None
    groups = row_groups(store, keys)
    calibrated = {}
    for name in ("teacher", "alone"):
        log_probs = np.concatenate(parts[name]).astype(np.float64)
        calibrated[name] = softmax(log_probs / fit_temperature(log_probs, labels))[None]
    differences = {
        metric: verdicts.difference(calibrated["teacher"], calibrated["alone"], labels, metric, groups)
        for metric in verdicts.METRICS
    }
    return differences, len(labels)
