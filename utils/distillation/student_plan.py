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

VERSION = 3  # incremented whenever the student for the same request changes
CONFIG_KEY = "distillation"
DIGEST_SETTINGS = (
    *("temperature", "alpha", "epochs", "lr", "batch_size", "targets", "views", "mix"),
    *("initial_weights", "feature_weight", "seeds"),
)
REMEDY = "Remove it, then distill again"


@dataclass(frozen=True)
class DistillationStep:
    """One student and its teacher; an assistant makes two steps."""

    student: str
    teacher: str


def distillation_steps(config: Config) -> list[DistillationStep]:
    """The configured steps: the student, preceded by a teacher assistant if configured (Mirzadeh et al. 2020)."""
    settings = config.distillation
    if settings.assistant is None:
        return [DistillationStep(settings.student, settings.teacher)]
    assistant = f"{settings.assistant}_{students.ROLE}"
    return [DistillationStep(settings.assistant, settings.teacher), DistillationStep(settings.student, assistant)]


def names(config: Config) -> list[str]:
    """Names of the ensembles that the command builds."""
    return [students.ensemble_name(step.student) for step in distillation_steps(config)]


def stale_reason(store: Store, name: str, teacher_name: str) -> str | None:
    """The reason why the student `name` on disk is out of date with its teacher; None if it is not; needs no torch."""
    student = students.resolve(store, name)
    record = read_student_record(store, student)
    if record is None:
        return "its record of distillation is missing"
    try:
        digest = step_digest(store, name, teacher_name)
    except UserError as error:
        return str(error)
    if is_up_to_date(store, student, record, digest):
        return None
    return "its teacher, images or settings have changed since the build"


def step_digest(store: Store, name: str, teacher_name: str) -> str:
    """`inputs_digest` of a student and a teacher by their names. Raises UserError if the teacher cannot be used."""
    student = students.resolve(store, name)
    teacher = teachers.resolve(store, teacher_name, excluded_member=student.member)
    return inputs_digest(store, student, teacher, unlabeled.unlabeled_images(store))


def read_student_record(store: Store, student: Student) -> dict[str, Any] | None:
    """The record of the student's last build; None if there is none."""
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
    """Whether the record has this digest, and checkpoint, member, ensemble and controls match the record."""
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
