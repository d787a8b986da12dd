"""What `distill` is asked for, and whether it is there already: by names, records and digests, without torch."""

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
PLACE = "distillation"
DECIDING = ("temperature", "alpha", "epochs", "lr", "batch_size", "targets", "views", "mix")
"""Settings that the weights depend on, beside teacher and student."""
AGAIN = "Remove it, then distill again"


@dataclass(frozen=True)
class Step:
    """One student and its teacher; with an assistant there are two."""

    student: str
    teacher: str


def steps(config: Config) -> list[Step]:
    """Teacher assistants bridge a large gap in size (Mirzadeh et al. 2020)."""
    settings = config.distillation
    if settings.assistant is None:
        return [Step(settings.student, settings.teacher)]
    assistant = f"{settings.assistant}_{students.ROLE}"
    return [Step(settings.assistant, settings.teacher), Step(settings.student, assistant)]


def names(config: Config) -> list[str]:
    """Ensembles that the command sees to."""
    return [students.ensemble_name(step.student) for step in steps(config)]


def reasons_against(store: Store) -> dict[str, str | None]:
    """{ensemble: why the student on disk is not what the command would make; None: it is}, without torch."""
    found: dict[str, str | None] = {}
    for step in steps(store.config):
        student = students.find(store, step.student)
        record = record_of(store, student)
        if record is None:
            found[student.ensemble] = "not built yet"
            continue
        # Who is best now is for `distill` to find out, since it may have to run somebody.
        name = record["teacher"] if step.teacher == teachers.BEST else step.teacher
        try:
            wanted = key(store, student, teachers.find(store, name, besides=student.member), unlabeled.find(store))
            is_same = is_whole(store, student, record, wanted)
            found[student.ensemble] = None if is_same else "its teacher, images or settings are others now"
        except UserError as error:
            found[student.ensemble] = str(error)
    return found


def record_of(store: Store, student: Student) -> dict[str, Any] | None:
    """What became of a student the last time."""
    path = store.workspace.distillation(student.ensemble) / "record.json"
    record: dict[str, Any] | None = read_record(path, remedy=AGAIN)
    return record


def key(store: Store, student: Student, teacher: Teacher, others: ImageSplit | None) -> str:
    """Everything that a student depends on; found without torch."""
    settings = store.config.distillation
    return digest_of(
        [
            *(VERSION, teachers.key(store, teacher), student.identity(), store.config.seed),
            {name: getattr(settings, name) for name in DECIDING},
            [store.catalog.splits[split]["digest"] for split in ("train", "val")],
            list(store.catalog.classes),
            others.digest if others else None,
            base_back.source_digest(base_back.locate()),
        ]
    )


def is_whole(store: Store, student: Student, record: Mapping[str, Any], wanted: str) -> bool:
    """Whether checkpoint, member, ensemble and controls are those of the record, which is that of the key."""
    derived = store.catalog.members.get(student.member)
    path = store.workspace.derived_checkpoint(student.name, students.ROLE)
    return (
        record["key"] == wanted
        and derived is not None
        and derived.checkpoints[0]["sha256"] == record["sha256"]
        and store.digests.is_intact(path)
        and (store.workspace.distillation(student.ensemble) / "controls.npz").is_file()
        and ensembles.stored_digest(store.workspace, student.ensemble)
        == fitting.inputs_digest(store.config, store, [derived], METHOD, extra_inputs=wanted)
    )
