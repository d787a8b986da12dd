"""Builds one student: trains it and its control, and writes checkpoint, member, ensemble, controls and record."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import ensembles, fitting
from utils.core import estimates
from utils.core.artifacts import digest_of, write_json
from utils.core.links import remove_file
from utils.discovery import discover
from utils.distillation import student_comparison, students, teachers, unlabeled
from utils.distillation.controls import ALONE
from utils.distillation.students import Student
from utils.distillation.teachers import METHOD, Teacher
from utils.numeric.metrics import softmax
from utils.predictions import extraction, image_splits, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

    from utils.distillation.student_training import StudentTrainingResult, StudentTrainingSettings
    from utils.training.batch_schedule import BatchSchedule
    from utils.training.image_source import ImageSource
    from utils.training.progress import TrainingProgress

logger = logging.getLogger("disease_pipeline")

STUDENT = "student"  # key of the student's training in records; that of its control is ALONE


def build_student(
    store: Store, student: Student, teacher: Teacher, unlabeled_split: ImageSplit | None, digest: str, force: bool
) -> Store:
    """Train and write the student and its control; returns the store whose catalog has the student.

    `digest` is that of all its inputs. An interrupted training resumes, unless `force`.
    """
    from utils.distillation import target_sources
    from utils.distillation.student_training import train

    start = time.monotonic()
    kind, crossfit = target_sources.resolve_kind(store, teacher, store.images("train"))
    images = _StudentImages(
        store,
        student,
        students.training_facts(store, student),
        streaming.resolve_device(store.config.device),
        image_splits.decoding_threads(store.config.dataset.num_workers),
    )
    train_images = unlabeled.append_unlabeled(store.images("train"), unlabeled_split)
    images.decode(teacher, train_images)
    progress = _progress(store, student, [digest, kind], force)
    model = students.initial_network(store, student)
    _warn_of_size(store, student, teacher, model)
    logger.info(
        "training %s with the teacher %s, targets %s: %s",
        *(student.name, teacher.name, kind, _estimate(store, model, train_images)),
    )
    targets = target_sources.prepare(
        store, teacher, images.source(train_images), kind, crossfit, ensemble=student.ensemble
    )
    trained = train(
        model,
        _training_settings(store, student),
        targets.batch_schedule,
        targets.epoch_targets,
        images.source(store.images("val")),
        device=images.device,
        progress=progress[STUDENT],
    )
    alone, alone_probs = _train_alone(images, targets.batch_schedule, progress[ALONE])
    settings = store.config.distillation
    facts = {
        "teacher": teacher.name,
        "targets": {
            "kind": kind,
            "rows": target_sources.ROWS[kind],
            "views": targets.batch_schedule.n_views,
            "digest": targets.digest,
            "unlabeled": 0 if unlabeled_split is None else len(unlabeled_split.paths),
        },
        "temperature": settings.temperature,
        "alpha": settings.alpha,
        "epochs": {STUDENT: len(trained.history), ALONE: len(alone.history)},
        "history": {STUDENT: trained.history, ALONE: alone.history},
        "threads": {STUDENT: trained.threads, ALONE: alone.threads},
    }
    store = _add_member(store, student, teacher, trained, images.facts, kind)
    derived = store.catalog.members[student.member]
    _build_ensemble(store, student, teacher, derived, digest, facts)
    verdict = student_comparison.compare_on_val(store, student, teacher, derived, alone_probs)
    record = facts | {
        "key": digest,
        "name": student.ensemble,
        "student": student.name,
        "member": derived.name,
        "sha256": derived.checkpoints[0]["sha256"],
        "costs": student_comparison.measure_costs(store, teacher, derived),
        "verdict": verdict,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(store.workspace.distillation(student.ensemble) / "record.json", record)
    remove_progress(store.workspace.distillation(student.ensemble))
    return store


@dataclass(frozen=True)
class _StudentImages:
    """The images of student and control: preprocessing, augmentation, cache and device."""

    store: Store
    student: Student
    facts: Mapping[str, str]
    """What the checkpoint of the student's reference member records of its training."""
    device: str
    threads: int

    def source(self, images: ImageSplit) -> ImageSource:
        """Images by the student's preprocessing, with its augmentation."""
        from utils.training.image_source import ImageSource, augmentation_kind

        augmentation, cache = augmentation_kind(self.facts), self.store.workspace.image_cache
        return ImageSource(images, self.student.preprocessing, augmentation, image_cache=cache, threads=self.threads)

    def decode(self, teacher: Teacher, images: ImageSplit) -> None:
        """Decode every image once, by the rule of every network that reads it."""
        networks = [member for member in teachers.members_of(self.store, teacher) if member.source != IMPORTED]
        preprocessings = [self.student.preprocessing, *(member.image_preprocessing for member in networks)]
        splits = [images, *(self.store.images(split) for split in STREAMED_SPLITS)]
        cache = self.store.workspace.image_cache
        image_splits.decode(splits, preprocessings, image_cache=cache, threads=self.threads)


def _progress(store: Store, student: Student, key: list[str], force: bool) -> dict[str, TrainingProgress]:
    """Progress files of student and control; `force` removes them first."""
    from utils.training.progress import TrainingProgress

    folder = store.workspace.distillation(student.ensemble)
    if force:
        remove_progress(folder)
    return {
        name: TrainingProgress(folder / f"progress_{name}.pth", digest_of([*key, name])) for name in (STUDENT, ALONE)
    }


def remove_progress(folder: Path) -> None:
    """Remove the progress files of student and control."""
    for path in folder.glob("progress_*.pth"):
        remove_file(path)


def _training_settings(store: Store, student: Student) -> StudentTrainingSettings:
    from utils.distillation.student_training import StudentTrainingSettings

    settings = store.config.distillation
    return StudentTrainingSettings(
        student.architecture,
        settings.epochs,
        settings.lr,
        settings.temperature,
        settings.alpha,
        seed=store.config.seed,
    )


def _train_alone(
    images: _StudentImages, student_schedule: BatchSchedule, progress: TrainingProgress
) -> tuple[StudentTrainingResult, dict[str, np.ndarray]]:
    """Train the control, and its probabilities {split: (N, C)}.

    It is the same network with the same initial weights, trained without a teacher on as many images with the same
    augmentation.
    """
    from utils.distillation.student_training import predict_logits, train
    from utils.training.batch_schedule import NEVER, BatchSchedule

    store, settings = images.store, images.store.config.distillation
    source = images.source(store.images("train"))
    schedule = BatchSchedule(
        source,
        settings.batch_size,
        store.config.seed,
        np.full(len(source), NEVER),
        n_views=student_schedule.n_views,
        mix=settings.mix,
    )
    epochs = -(-settings.epochs * len(student_schedule.image_source) // len(source))
    training_settings = replace(_training_settings(store, images.student), epochs=epochs, alpha=0.0)
    model = students.initial_network(store, images.student)
    validation_set = images.source(store.images("val"))
    alone = train(model, training_settings, schedule, None, validation_set, device=images.device, progress=progress)
    probabilities = {
        split: softmax(predict_logits(model, images.source(store.images(split)), images.device, alone.weights))
        for split in STREAMED_SPLITS
    }
    return alone, probabilities


def _add_member(
    store: Store,
    student: Student,
    teacher: Teacher,
    trained: StudentTrainingResult,
    reference_facts: Mapping[str, str],
    kind: str,
) -> Store:
    """Write the student's checkpoint; returns the store whose catalog has its member."""
    settings = store.config.distillation
    facts = {  # the order of the keys is part of the checkpoint's bytes
        **reference_facts,
        "accuracy": trained.history[-1]["val_accuracy"],
        "epoch": len(trained.history) - 1,
        "parents": list(teacher.ensemble.members),
        "teacher": teacher.name,
        "targets": kind,
        "temperature": settings.temperature,
        "alpha": settings.alpha,
        "threads": trained.threads,
    }
    students.write_student(store, student, trained.weights, facts)
    updated = discover.register_derived(
        store.config, store.workspace, store.digests, store.images("train"), store.catalog, [student.member]
    )
    return store.with_catalog(updated)


def _build_ensemble(
    store: Store, student: Student, teacher: Teacher, derived: Member, digest: str, facts: Mapping[str, Any]
) -> None:
    """Write the ensemble of the student's member alone; `facts` are recorded in its `ensemble.json`.

    Its out-of-sample rows are those of val. What the teacher was fitted or selected on counts for the student as well.
    """
    extraction.ensure(store, [derived], STREAMED_SPLITS)
    val_rows = fitting.out_of_sample_rows(store, [derived])
    fitting.build(
        store,
        student.ensemble,
        METHOD,
        ensembles.COMBINERS[METHOD].configured(store.config, fitting.member_facts(store, [derived])),
        [derived],
        val_rows,
        extra_inputs=digest,
        prior_provenance=[teacher.ensemble.provenance],
        notes={"distillation": facts},
    )


def _model_bytes(model: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _warn_of_size(store: Store, student: Student, teacher: Teacher, model: nn.Module) -> None:
    student_mb, teacher_mb = _model_bytes(model) / 1e6, teachers.size_mb(store, teacher)
    if teacher_mb is not None and student_mb > teacher_mb:
        logger.warning(
            "the student %s is larger than its teacher %s (%.1f MB, %.1f MB): it saves nothing",
            *(student.name, teacher.name, student_mb, teacher_mb),
        )


def _estimate(store: Store, model: nn.Module, images: ImageSplit) -> estimates.Estimate:
    """Of both trainings, one after the other."""
    settings = store.config.distillation
    return estimates.estimate_training(
        [_model_bytes(model)],
        len(images.paths),
        epochs=2 * settings.epochs,
        kept=1,
        batch_size=settings.batch_size,
        img_size=store.config.dataset.img_size,
        on_cuda=streaming.resolve_device(store.config.device) != "cpu",
        cores=1,
    )
