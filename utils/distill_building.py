"""The command `distill`: one small network is taught what an ensemble knows, and is held against itself untaught.

The student is a checkpoint of the base pipeline's form, a derived member and an ensemble of that one member. What
became of it stands in `ensembles/distillation/<ensemble>/`, by which it is known the next time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import catalog, discovery, ensembles, estimates, fitting, streaming, unlabeled
from utils import distillation_comparison as comparison
from utils import distillation_plan as plan
from utils import distillation_students as students
from utils import distillation_teachers as teachers
from utils.artifacts import digest_of, write_json
from utils.catalog import Member
from utils.config import Config, require_enabled
from utils.distillation_controls import ALONE
from utils.distillation_plan import STREAMED
from utils.distillation_students import Student
from utils.distillation_teachers import METHOD, Teacher
from utils.ensembles import Provenance
from utils.errors import UserError
from utils.metrics import softmax
from utils.predictions import Store
from utils.results import Result
from utils.streaming import ImageSplit
from utils.workspace import Workspace

if TYPE_CHECKING:
    from utils.distilling import Trained
    from utils.lessons import Album

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
    if not force and record is not None and plan.is_whole(store, student, record, key):
        return _outcome(store, student, record, is_fresh=False)
    students.require_known(student.name)
    record = _taught(store, student, teacher, others, key, force)
    return _outcome(store, student, record, is_fresh=True)


def _outcome(store: Store, student: Student, record: Mapping[str, Any], *, is_fresh: bool) -> Outcome:
    epochs = record["epochs"]["student"]
    stopped = f"stopped after {epochs['run']}" if epochs["stopped"] else f"{epochs['run']} epochs"
    targets = f"{record['targets']['kind']} ({record['targets']['rows']})"
    lines = (
        fitting.line(store, student.ensemble, "built" if is_fresh else "up to date"),
        f"    teacher {record['teacher']}, targets {targets}; {stopped}, epoch {epochs['best'] + 1} chosen on val",
        f"    on val, which chose the epochs: {record['verdict']}",
    )
    return Outcome(student.ensemble, is_fresh, record["verdict"], lines)


def _taught(
    store: Store, student: Student, teacher: Teacher, others: ImageSplit | None, key: str, force: bool
) -> dict[str, Any]:
    """Train the student and its control, keep both; returns the record."""
    from utils import distillation_teaching as teaching
    from utils.distilling import Course, Progress, logits_of, train
    from utils.lessons import Album, Lessons

    config, settings = store.config, store.config.distillation
    kind, unseen = teaching.kind_of(store, teacher, store.images("train"))
    said = students.said_of_training(store, student)
    device, threads = (
        streaming.resolve_device(config.device),
        streaming.decoding_threads(config.dataset.num_workers),
    )
    start = time.monotonic()

    def album(images: ImageSplit) -> Album:
        how = students.augmentation(said)
        return Album(images, student.img_size, how, image_cache=store.workspace.image_cache, threads=threads)

    images = unlabeled.joined(store.images("train"), others)
    sizes = {student.img_size, *(member.img_size for member in teachers.members_of(store, teacher) if member.img_size)}
    splits = [images, *(store.images(split) for split in STREAMED)]
    streaming.decode(splits, sorted(sizes), image_cache=store.workspace.image_cache, threads=threads)
    folder = store.workspace.distillation(student.ensemble)
    paths = {who: folder / f"progress_{who}.pth" for who in ("student", ALONE)}
    if force:
        for path in paths.values():
            path.unlink(missing_ok=True)
    model = students.fresh(store, student)
    _compare_sizes(store, student, teacher, model)
    logger.info("teaching %s by %s, targets %s: %s", student.name, teacher.name, kind, _expected(store, model, images))
    lessons = teaching.prepare(store, teacher, album(images), kind, unseen, name=student.ensemble)
    exam = album(store.images("val"))
    course = Course(
        student.architecture, settings.epochs, settings.lr, settings.temperature, settings.alpha, config.seed
    )
    progress = {who: Progress(path, digest_of([key, kind, who])) for who, path in paths.items()}
    taught = train(*(model, course, lessons.lessons, lessons.teach, exam), device=device, progress=progress["student"])
    # The same network from the same weights, shown as many images by the same augmentation, told their labels alone.
    own = album(store.images("train"))
    same = -(-settings.epochs * len(lessons.lessons.album) // len(own))
    never = np.full(len(own), "never")
    plain = Lessons(own, settings.batch_size, config.seed, never, views=lessons.lessons.views, mix=settings.mix)
    control = students.fresh(store, student)
    course = replace(course, epochs=same, alpha=0.0)
    alone = train(control, course, plain, None, exam, device=device, progress=progress[ALONE])
    answers = {
        split: softmax(logits_of(control, album(store.images(split)), device, alone.weights)) for split in STREAMED
    }
    derived, unseen_val = _kept(store, student, teacher, taught, said, kind)
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
    fitting.build(
        store,
        student.ensemble,
        METHOD,
        ensembles.COMBINERS[METHOD].configured(config, fitting.facts(store, [derived])),
        [derived],
        unseen_val,
        also=key,
        seen=[teacher.ensemble.provenance, Provenance((), fitting.row_sets(unseen_val.rows))],
        notes={"distillation": facts},
    )
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
    write_json(folder / "record.json", record)
    for path in paths.values():
        path.unlink(missing_ok=True)
    return record


def _kept(
    store: Store, student: Student, teacher: Teacher, taught: Trained, said: Mapping[str, str], kind: str
) -> tuple[Member, fitting.HonestRows]:
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
    store.catalog = discovery.take_in(
        store.config, store.workspace, store.digests, train, store.catalog, [student.member]
    )
    derived = store.catalog.members[student.member]
    store.ensure([derived], STREAMED)
    return derived, fitting.honest_rows(store, [derived])


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
    return estimates.training(
        [4 * sum(parameter.numel() for parameter in model.parameters())],
        len(images.paths),
        epochs=2 * settings.epochs,
        kept=1,
        batch_size=settings.batch_size,
        img_size=store.config.dataset.img_size,
        on_cuda=streaming.resolve_device(store.config.device) != "cpu",
        cores=1,
    )
