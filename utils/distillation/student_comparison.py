"""Predictions and costs of a student's two controls on val and test, and the comparison with the student on val."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.building import latency
from utils.core.errors import UserError
from utils.distillation import controls, teachers
from utils.distillation.controls import ALONE, STUDENT, TEACHER
from utils.distillation.students import Student
from utils.distillation.teachers import Teacher
from utils.predictions import fold_networks
from utils.predictions.catalog import Member
from utils.predictions.row_groups import row_groups
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")


def compare_on_val(
    store: Store,
    student: Student,
    teacher: Teacher,
    trainings: Mapping[str, Mapping[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, Any]],
) -> str:
    """Write the predictions of the student and its controls; returns the verdict on val.

    `trainings` is {split: {student, alone: probabilities (K, N, C)}} of K trainings each, for all images of val and
    test; `costs` is the result of `measure_costs`.
    """
    predictions: dict[str, dict[str, np.ndarray]] = {}
    for split, of_split in trainings.items():
        images = store.images(split)
        try:
            rows, probabilities = teachers.predict_split(store, teacher, split)
        except UserError as error:  # an imported member without this split
            logger.warning("%s; %s has no controls on %s", error, student.ensemble, split)
            continue
        row_of = {sample_id: row for row, sample_id in enumerate(rows.sample_ids.tolist())}
        shared = [index for index, sample_id in enumerate(images.sample_ids) if sample_id in row_of]
        sample_ids = [images.sample_ids[index] for index in shared]
        teacher_probs = probabilities[[row_of[sample_id] for sample_id in sample_ids]]
        if split == "val":  # the teacher's combiner is fitted on its labels
            crossfit = teachers.crossfit_log_probabilities(store, teacher, split, sample_ids)
            teacher_probs = np.where(np.isnan(crossfit), teacher_probs, np.exp(crossfit))
        predictions[split] = {
            STUDENT: of_split[STUDENT][:, shared],
            ALONE: of_split[ALONE][:, shared],
            TEACHER: teacher_probs / teacher_probs.sum(axis=1, keepdims=True),
            "labels": images.labels[shared],
            "sample_ids": np.array(images.sample_ids)[shared],
        }
    controls.write_controls(store.workspace, student.ensemble, predictions)
    if "val" not in predictions:
        return "the teacher has no predictions for val; evaluate compares on test"
    val = predictions["val"]
    arrays = {f"val/{key}": array for key, array in val.items()}
    compared = {STUDENT: val[STUDENT], ALONE: val[ALONE], TEACHER: val[TEACHER][None]}
    record = {"costs": costs, "teacher": teacher.name}
    groups = row_groups(store, [("val", sample_id) for sample_id in val["sample_ids"].tolist()])
    _, notes = controls.compare(record, compared, val["labels"], controls.temperatures(arrays), groups)
    return notes["controls"]


def measure_costs(store: Store, teacher: Teacher, derived: Member) -> dict[str, dict[str, Any]]:
    """`{alone, teacher: {latency_ms, size_mb}}`; an ensemble's latency is the sum over its networks."""
    members = teachers.members_of(store, teacher)
    measured = latency.measure(store, [derived, *members])

    def summed(summands: Sequence[Member], n_networks: Sequence[int]) -> dict[str, Any] | None:
        if any(member.name not in measured for member in summands):
            return None
        records = [measured[member.name] for member in summands]
        batch_sizes = sorted(set.intersection(*(set(record.batches) for record in records)))
        times = {
            f"batch_{size}": {
                quantile: round(
                    sum(
                        n * getattr(record.batches[size], quantile)
                        for n, record in zip(n_networks, records, strict=True)
                    ),
                    4,
                )
                for quantile in ("p50", "p95")
            }
            for size in batch_sizes
        }
        return times | {"device": records[0].device, "threads": records[0].threads}

    n_networks = [len(fold_networks.answering(member, teacher.ensemble.inference)) for member in members]
    teacher_mb = teachers.size_mb(store, teacher)
    student_mb = (store.workspace.base / derived.checkpoints[0]["path"]).stat().st_size / 1e6
    return {
        ALONE: {"latency_ms": summed([derived], [1]), "size_mb": round(student_mb, 3)},
        TEACHER: {
            "latency_ms": summed(members, n_networks),
            "size_mb": None if teacher_mb is None else round(teacher_mb, 3),
        },
    }
