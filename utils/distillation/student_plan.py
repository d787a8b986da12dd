"""The students that `distill` builds, and whether those on disk are up to date; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils import base_back
from utils.building import ensembles, fitting
from utils.core.artifacts import digest_of, read_record
from utils.core.config import Config
from utils.core.errors import UserError
from utils.distillation import students, teachers, unlabeled
from utils.distillation.students import Student
from utils.distillation.teachers import METHOD, Teacher
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

VERSION = 1  # raised whenever the same request would give another student
CONFIG_KEY = "distillation"
DIGEST_SETTINGS = ("temperature", "alpha", "epochs", "lr", "batch_size", "targets", "views", "mix")
REMEDY = "Remove it, then distill again"


@dataclass(frozen=True)
class DistillationStep:
    """One student and its teacher; an assistant makes two steps."""

    student: str
    teacher: str


def distillation_steps(config: Config) -> list[DistillationStep]:
    """A teacher assistant bridges a large gap in size (Mirzadeh et al. 2020)."""
    settings = config.distillation
    if settings.assistant is None:
        return [DistillationStep(settings.student, settings.teacher)]
    assistant = f"{settings.assistant}_{students.ROLE}"
    return [DistillationStep(settings.assistant, settings.teacher), DistillationStep(settings.student, assistant)]


def names(config: Config) -> list[str]:
    """Ensembles that the command builds."""
    return [students.ensemble_name(step.student) for step in distillation_steps(config)]


def staleness_reasons(store: Store) -> dict[str, str | None]:
    """{ensemble: why the student on disk is out of date; None where it is up to date}; needs no torch."""
    reasons: dict[str, str | None] = {}
    for step in distillation_steps(store.config):
        student = students.resolve(store, step.student)
        record = read_student_record(store, student)
        if record is None:
            reasons[student.ensemble] = "not built yet"
            continue
        # Only `distill` resolves `best` again, since that may have to run networks.
        name = record["teacher"] if step.teacher == teachers.BEST else step.teacher
        try:
            teacher = teachers.resolve(store, name, excluded_member=student.member)
            digest = inputs_digest(store, student, teacher, unlabeled.unlabeled_images(store))
            is_current = is_up_to_date(store, student, record, digest)
            reasons[student.ensemble] = (
                None if is_current else "teacher, images or settings have changed since the build"
            )
        except UserError as error:
            reasons[student.ensemble] = str(error)
    return reasons


def read_student_record(store: Store, student: Student) -> dict[str, Any] | None:
    """The record of the student's last build; None where there is none."""
    path = store.workspace.distillation(student.ensemble) / "record.json"
    record: dict[str, Any] | None = read_record(path, remedy=REMEDY)
    return record


def inputs_digest(store: Store, student: Student, teacher: Teacher, unlabeled_split: ImageSplit | None) -> str:
    """Digest of everything that a student depends on; needs no torch."""
    settings = store.config.distillation
    return digest_of(
        [
            *(VERSION, teachers.inputs_digest(store, teacher), student.identity(), store.config.seed),
            {name: getattr(settings, name) for name in DIGEST_SETTINGS},
            [store.catalog.splits[split]["digest"] for split in ("train", "val")],
            list(store.catalog.classes),
            unlabeled_split.digest if unlabeled_split else None,
            base_back.source_digest(base_back.locate()),
        ]
    )


def is_up_to_date(store: Store, student: Student, record: Mapping[str, Any], digest: str) -> bool:
    """Whether checkpoint, member, ensemble and controls are those of the record, and the record has this digest."""
    derived = store.catalog.members.get(student.member)
    path = store.workspace.derived_checkpoint(student.name, students.ROLE)
    return (
        record["key"] == digest
        and derived is not None
        and derived.checkpoints[0]["sha256"] == record["sha256"]
        and store.digests.is_intact(path)
        and (store.workspace.distillation(student.ensemble) / "controls.npz").is_file()
        and ensembles.stored_digest(store.workspace, student.ensemble)
        == fitting.inputs_digest(store.config, store, [derived], METHOD, extra_inputs=digest)
    )
