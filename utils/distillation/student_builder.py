"""The command `distill`: one small network is taught what an ensemble knows, and is held against itself untaught.

The student is a checkpoint of the base pipeline's form, a derived member and an ensemble of that one member. What
became of it stands in `ensembles/distillation/<ensemble>/`, by which it is known the next time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import ensembles, fitting
from utils.building.ensembles import Provenance
from utils.core import caches, estimates
from utils.core.artifacts import digest_of, write_json
from utils.core.config import Config, require_enabled
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.discovery import discover
from utils.distillation import student_comparison as comparison
from utils.distillation import student_plan as plan
from utils.distillation import students, teachers, unlabeled
from utils.distillation.controls import ALONE
from utils.distillation.students import Student
from utils.distillation.teachers import METHOD, Teacher
from utils.numeric.metrics import softmax
from utils.predictions import catalog, extraction, image_splits, streaming
from utils.predictions.catalog import Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.distillation.student_training import Course, Trained
    from utils.training.image_views import Album, Lessons
    from utils.training.progress import TrainingProgress

logger = logging.getLogger("disease_pipeline")


def distill(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Teach the configured student by the configured teacher, by way of an assistant where one is named.

    What is there with equal inputs is kept, unless `force`; a training that was killed goes on. Raises UserError for an
    unknown student or teacher, without images, and where the teacher cannot say anything of them.
    """
    require_enabled(config, plan.PLACE)
    store = Store(config, workspace, catalog.load(workspace))
    if not store.catalog.has_images:
        raise UserError(
            f"{workspace.split_dir}: no images, and a student is shown some; all members are imported. Put images with "
            "the imported ids there, run discover and import-predictions again"
        )
    results = [_one(store, step, force) for step in plan.steps(config)]
    store.digests.save()
    lines = [line for result in results for line in result.lines]
    document = {
        "built": [result.name for result in results if result.is_fresh],
        "up_to_date": [result.name for result in results if not result.is_fresh],
        "verdict": results[-1].verdict,
        "folder": str(workspace.models),
    }
    return Result("\n".join([*lines, f"written: {workspace.models}"]), document, next="evaluate")


@dataclass(frozen=True)
class Outcome:
    """What became of one step."""

    name: str
    is_fresh: bool
    verdict: str
    lines: tuple[str, ...]


# one student ----------------------------------------------------------------------------------------------------------


def _one(store: Store, step: plan.Step, force: bool) -> Outcome:
    student = students.find(store, step.student)
    teacher = teachers.find(store, step.teacher, besides=student.member)
    others = unlabeled.find(store)
    key = plan.key(store, student, teacher, others)
    record = plan.record_of(store, student)
    folder = store.workspace.distillation(student.ensemble)
    caches.remove_temporary_files(folder)
    if not force and record is not None and plan.is_whole(store, student, record, key):
        _forget_progress(folder)  # of a training that was killed when it had just been recorded
        return _outcome(store, student, record, is_fresh=False)
    students.require_known(student.name)
    record = _taught(store, student, teacher, others, key, force)
    return _outcome(store, student, record, is_fresh=True)


def _outcome(store: Store, student: Student, record: Mapping[str, Any], *, is_fresh: bool) -> Outcome:
    epochs = record["epochs"]["student"]
    stopped = f"stopped after {epochs['run']}" if epochs["stopped"] else f"{epochs['run']} epochs"
    targets = f"{record['targets']['kind']} ({record['targets']['rows']})"
    lines = (
        fitting.summary_line(store, student.ensemble, "built" if is_fresh else "up to date"),
        f"    teacher {record['teacher']}, targets {targets}; {stopped}, epoch {epochs['best'] + 1} chosen on val",
        f"    on val, which chose the epochs: {record['verdict']}",
    )
    return Outcome(student.ensemble, is_fresh, record["verdict"], lines)


@dataclass(frozen=True)
class _Showing:
    """How student and control are shown images, and where they run."""

    store: Store
    student: Student
    said: Mapping[str, str]
    """What the checkpoint that the student is like says of that."""
    device: str
    threads: int

    def album(self, images: ImageSplit) -> Album:
        """Images at the student's size and by its augmentation."""
        from utils.training.image_views import Album, augmentation_kind

        cache, how = self.store.workspace.image_cache, augmentation_kind(self.said)
        return Album(images, self.student.img_size, how, image_cache=cache, threads=self.threads)

    def decode(self, teacher: Teacher, images: ImageSplit) -> None:
        """Open everything once, at each size that somebody looks at."""
        found = {member.img_size for member in teachers.members_of(self.store, teacher)} | {self.student.img_size}
        splits = [images, *(self.store.images(split) for split in STREAMED_SPLITS)]
        sizes = sorted(size for size in found if size)
        image_splits.decode(splits, sizes, image_cache=self.store.workspace.image_cache, threads=self.threads)


def _taught(
    store: Store, student: Student, teacher: Teacher, others: ImageSplit | None, key: str, force: bool
) -> dict[str, Any]:
    """Train the student and its control, keep both; returns the record."""
    from utils.distillation import target_sources as teaching
    from utils.distillation.student_training import train

    start = time.monotonic()
    kind, unseen = teaching.kind_of(store, teacher, store.images("train"))
    showing = _Showing(
        store,
        student,
        students.said_of_training(store, student),
        streaming.resolve_device(store.config.device),
        image_splits.decoding_threads(store.config.dataset.num_workers),
    )
    images = unlabeled.joined(store.images("train"), others)
    showing.decode(teacher, images)
    progress = _progress(store, student, [key, kind], force)
    model = students.fresh(store, student)
    _compare_sizes(store, student, teacher, model)
    logger.info("teaching %s by %s, targets %s: %s", student.name, teacher.name, kind, _expected(store, model, images))
    lessons = teaching.prepare(store, teacher, showing.album(images), kind, unseen, name=student.ensemble)
    given = (_course(store, student), lessons.lessons, lessons.teach, showing.album(store.images("val")))
    taught = train(model, *given, device=showing.device, progress=progress["student"])
    alone, answers = _alone(showing, lessons.lessons, progress[ALONE])
    settings = store.config.distillation
    facts = {
        "teacher": teacher.name,
        "targets": {
            "kind": kind,
            "rows": teaching.ROWS[kind],
            "views": lessons.lessons.views,
            "digest": lessons.digest,
            "unlabeled": 0 if others is None else len(others.paths),
        },
        "temperature": settings.temperature,
        "alpha": settings.alpha,
        "epochs": {who: _epochs(one) for who, one in (("student", taught), (ALONE, alone))},
        "history": {"student": taught.history, ALONE: alone.history},
    }
    derived = _built(store, student, teacher, taught, showing.said, key, facts)
    verdict = comparison.keep(store, student, teacher, derived, answers)
    record = facts | {
        "key": key,
        "name": student.ensemble,
        "student": student.name,
        "member": derived.name,
        "sha256": derived.checkpoints[0]["sha256"],
        "costs": comparison.costs(store, teacher, derived),
        "verdict": verdict,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(store.workspace.distillation(student.ensemble) / "record.json", record)
    _forget_progress(store.workspace.distillation(student.ensemble))
    return record


def _progress(store: Store, student: Student, key: list[str], force: bool) -> dict[str, TrainingProgress]:
    """How far student and control are; nothing, where that is to be forgotten."""
    from utils.training.progress import TrainingProgress

    folder = store.workspace.distillation(student.ensemble)
    if force:
        _forget_progress(folder)
    return {who: TrainingProgress(folder / f"progress_{who}.pth", digest_of([*key, who])) for who in ("student", ALONE)}


def _forget_progress(folder: Path) -> None:
    for path in folder.glob("progress_*.pth"):
        path.unlink(missing_ok=True)


def _course(store: Store, student: Student) -> Course:
    from utils.distillation.student_training import Course

    settings = store.config.distillation
    return Course(
        *(student.architecture, settings.epochs, settings.lr, settings.temperature, settings.alpha),
        seed=store.config.seed,
    )


def _alone(showing: _Showing, lessons: Lessons, progress: TrainingProgress) -> tuple[Trained, dict[str, np.ndarray]]:
    """The control, and its probabilities {split: (N, C)}.

    The same network from the same weights, shown as many images by the same augmentation, told their labels alone.
    """
    from utils.distillation.student_training import logits_of, train
    from utils.training.image_views import Lessons

    store, settings = showing.store, showing.store.config.distillation
    album = showing.album(store.images("train"))
    never = np.full(len(album), "never")
    plain = Lessons(album, settings.batch_size, store.config.seed, never, views=lessons.views, mix=settings.mix)
    epochs = -(-settings.epochs * len(lessons.album) // len(album))
    course = replace(_course(store, showing.student), epochs=epochs, alpha=0.0)
    model, exam = students.fresh(store, showing.student), showing.album(store.images("val"))
    alone = train(model, course, plain, None, exam, device=showing.device, progress=progress)
    albums = {split: showing.album(store.images(split)) for split in STREAMED_SPLITS}
    answers = {split: softmax(logits_of(model, one, showing.device, alone.weights)) for split, one in albums.items()}
    return alone, answers


def _built(
    store: Store,
    student: Student,
    teacher: Teacher,
    taught: Trained,
    said: Mapping[str, str],
    key: str,
    facts: Mapping[str, Any],
) -> Member:
    """The student as member and as an ensemble of that one member; `facts` stand in its `ensemble.json`."""
    derived, unseen_val = _kept(store, student, teacher, taught, said, facts["targets"]["kind"])
    fitting.build(
        store,
        student.ensemble,
        METHOD,
        ensembles.COMBINERS[METHOD].configured(store.config, fitting.member_facts(store, [derived])),
        [derived],
        unseen_val,
        extra_inputs=key,
        prior_provenance=[teacher.ensemble.provenance, Provenance((), fitting.row_sets(unseen_val.rows))],
        notes={"distillation": facts},
    )
    return derived


def _kept(
    store: Store, student: Student, teacher: Teacher, taught: Trained, said: Mapping[str, str], kind: str
) -> tuple[Member, fitting.OutOfSampleRows]:
    """The student's checkpoint and member, and its honest rows, which are those of val."""
    settings = store.config.distillation
    facts = {
        **said,
        "accuracy": taught.history[taught.epoch]["val_accuracy"],
        "epoch": taught.epoch,
        "parents": list(teacher.ensemble.members),
        "teacher": teacher.name,
        "targets": kind,
        "temperature": settings.temperature,
        "alpha": settings.alpha,
    }
    students.write(store, student, taught.weights, facts)
    train = store.images("train")
    store.catalog = discover.register_derived(
        store.config, store.workspace, store.digests, train, store.catalog, [student.member]
    )
    derived = store.catalog.members[student.member]
    extraction.ensure(store, [derived], STREAMED_SPLITS)
    return derived, fitting.out_of_sample_rows(store, [derived])


def _epochs(one: Trained) -> dict[str, Any]:
    return {"run": len(one.history), "best": one.epoch, "stopped": one.is_stopped}


def _compare_sizes(store: Store, student: Student, teacher: Teacher, model: Any) -> None:
    own = 4 * sum(parameter.numel() for parameter in model.parameters()) / 1e6
    theirs = teachers.size_mb(store, teacher)
    if theirs is not None and own > theirs:
        logger.warning(
            "the student %s is larger than its teacher %s (%.1f MB, %.1f MB): nothing is saved by it",
            *(student.name, teacher.name, own, theirs),
        )


def _expected(store: Store, model: Any, images: ImageSplit) -> estimates.Estimate:
    """Of both trainings, one after the other."""
    settings = store.config.distillation
    return estimates.estimate_training(
        [4 * sum(parameter.numel() for parameter in model.parameters())],
        len(images.paths),
        epochs=2 * settings.epochs,
        kept=1,
        batch_size=settings.batch_size,
        img_size=store.config.dataset.img_size,
        on_cuda=streaming.resolve_device(store.config.device) != "cpu",
        cores=1,
    )
