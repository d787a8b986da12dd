"""The command `distill` and the builder of students.

A student is a checkpoint in the base pipeline's format, a derived member and an ensemble of that member. The record of
its build is in `ensembles/distillation/<ensemble>/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from utils.building import builder_protocol
from utils.building.builder_protocol import BUILT, UP_TO_DATE, Build, Builder, Session, summary_line
from utils.core import caches
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.distillation import student_assembly, student_plan, students, teachers, trained_pairs, unlabeled
from utils.distillation.student_assembly import STUDENT
from utils.distillation.student_plan import DistillationStep
from utils.predictions import catalog
from utils.predictions.store import Store


def distill(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Train the configured student with the configured teacher, through an assistant if one is configured.

    The student is compared with the same network trained without a teacher. A student that is up to date is kept
    unless `force`; an interrupted training resumes. Raises UserError for an unknown student or teacher, for a workspace
    without images, and if the teacher cannot provide targets.
    """
    builders = builder_protocol.enabled([StudentBuilder(resolves_best=True)], config)
    session = Session(Store(config, workspace, catalog.load(workspace)), members=())
    folders = {name: workspace.distillation(name) for name in student_plan.names(config)}
    for folder in folders.values():
        caches.remove_temporary_files(folder)
    outcome = builder_protocol.run(builders, session, force=force)
    for name, state in outcome.states.items():
        if state == UP_TO_DATE:  # the training may have been interrupted right after writing its record
            trained_pairs.remove_progress(folders[name])
    document = {
        "built": [name for name, state in outcome.states.items() if state == BUILT],
        "up_to_date": [name for name, state in outcome.states.items() if state == UP_TO_DATE],
        "verdict": _verdict(outcome.session.store),
        "folder": str(workspace.models),
    }
    lines = [*outcome.lines, f"written: {workspace.models}"]
    return Result("\n".join(lines), document, list(outcome.failures), next="evaluate")


def _chosen(feature_weight: Mapping[str, Any]) -> str:
    """The weight selected on val, with the calibrated log-loss of the student of each weight."""
    losses = ", ".join(f"{loss:.4f} with {weight}" for weight, loss in feature_weight["val_log_loss"].items())
    return f"{feature_weight['value']:g}, chosen on val: calibrated log-loss {losses}; val is not out of sample for it"


def _verdict(store: Store) -> str | None:
    """The verdict on the configured student, which is the last one."""
    name = student_plan.distillation_steps(store.config)[-1].student
    record = student_plan.read_student_record(store, students.resolve(store, name))
    return record["verdict"] if record else None


class StudentBuilder(Builder):
    """Builder of the configured student and, before it, of its assistant if one is configured.

    With `resolves_best`, the teacher `best` is resolved again, which may run networks; otherwise it is that of the last
    build.
    """

    config_key = student_plan.CONFIG_KEY

    def __init__(self, *, resolves_best: bool = False) -> None:
        self.resolves_best = resolves_best

    def names(self, session: Session) -> list[str]:
        """Names of the students' ensembles, the assistant's first."""
        return student_plan.names(session.config) if session.config.distillation.enable else []

    def check(self, session: Session) -> None:
        """Raise UserError for a workspace without images."""
        if not session.catalog.has_images:
            raise UserError(
                f"{session.workspace.split_dir}: no images, which a student is trained on; all members are imported. "
                "Put images with the imported ids there, run discover and import-predictions again"
            )

    def inputs_digest(self, session: Session, name: str) -> str:
        """Digest of the student's teacher, images, settings and initial weights."""
        step = self._steps(session)[name]
        return student_plan.step_digest(session.store, step.student, self._teacher(session, step))

    def stale_reason(self, session: Session, name: str, record: Mapping[str, Any]) -> str | None:
        """The reason why the student on disk is out of date; None if it is up to date."""
        step = self._steps(session)[name]
        return student_plan.stale_reason(session.store, step.student, self._teacher(session, step))

    def build(self, session: Session, names: Sequence[str], *, force: bool) -> Build:
        """Train the named students, and later students whose teacher changes as a result."""
        built: list[str] = []
        for name, step in self._steps(session).items():
            state = builder_protocol.state_of(session, name, self) if built else None
            if name not in names and (state is None or state.state == builder_protocol.CURRENT):
                continue
            store = session.store
            student = students.resolve(store, step.student)
            teacher = teachers.resolve(store, step.teacher, excluded_member=student.member)
            unlabeled_split = unlabeled.unlabeled_images(store)
            students.require_architecture(student.name)
            digest = student_plan.inputs_digest(store, student, teacher, unlabeled_split)
            store = student_assembly.build_student(store, student, teacher, unlabeled_split, digest, force)
            session = session.with_catalog(store.catalog)
            built.append(name)
        return Build(session, tuple(built))

    def describe_one(self, session: Session, name: str, state: str) -> list[str]:
        """The ensemble, its teacher, targets and number of epochs, and the comparison with its controls on val."""
        student = students.resolve(session.store, self._steps(session)[name].student)
        record = student_plan.read_student_record(session.store, student)
        assert record is not None  # the student has been built or is up to date
        targets = f"{record['targets']['kind']} ({record['targets']['rows']})"
        note = record.get("schedule_note")  # records of earlier versions have none
        weights = (record.get("feature_weight") or {}).get("val_log_loss")
        return [
            summary_line(session.workspace, name, state),
            f"    teacher {record['teacher']}, targets {targets}; {record['epochs'][STUDENT]} epochs",
            *([f"    feature weight {_chosen(record['feature_weight'])}"] if weights else []),
            f"    on val: {record['verdict']}",
            *([f"    note: {note}"] if note else []),
        ]

    def _steps(self, session: Session) -> dict[str, DistillationStep]:
        steps = student_plan.distillation_steps(session.config)
        return {students.ensemble_name(step.student): step for step in steps}

    def _teacher(self, session: Session, step: DistillationStep) -> str:
        """Name of the step's teacher, `best` only with `resolves_best`."""
        if step.teacher != teachers.BEST or self.resolves_best:
            return step.teacher
        record = student_plan.read_student_record(session.store, students.resolve(session.store, step.student))
        return step.teacher if record is None else str(record["teacher"])
