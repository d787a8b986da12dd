"""Builds one student: trains it and its control, once per seed, and writes what `distill` leaves of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import ensembles, fitting
from utils.core import estimates
from utils.core.artifacts import digest_of, write_json
from utils.core.config_sections import Distillation
from utils.core.links import remove_file
from utils.discovery import discover
from utils.distillation import expected_gain, student_comparison, students, teachers, unlabeled, verdicts
from utils.distillation.controls import ALONE, STUDENT
from utils.distillation.initial_weights import MEMBER, RANDOM
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
    from utils.distillation.target_sources import StudentTargets
    from utils.training.image_source import ImageSource
    from utils.training.progress import TrainingProgress

logger = logging.getLogger("disease_pipeline")


def build_student(
    store: Store, student: Student, teacher: Teacher, unlabeled_split: ImageSplit | None, digest: str, force: bool
) -> Store:
    """Train and write the student and its control; returns the store whose catalog has the student.

    `digest` is that of all its inputs. An interrupted training resumes, unless `force`.
    """
    from utils.distillation import target_sources

    start = time.monotonic()
    settings, members = store.config.distillation, teachers.members_of(store, teacher)
    model = students.initial_network(store, student, members)
    sizes = (_model_bytes(model), student.img_size)
    kind, crossfit = target_sources.resolve_kind(store, teacher, store.images("train"), sizes)
    images = _StudentImages(
        store,
        student,
        students.training_facts(store, student),
        streaming.resolve_device(store.config.device),
        image_splits.decoding_threads(store.config.dataset.num_workers),
    )
    train_images = unlabeled.append_unlabeled(store.images("train"), unlabeled_split)
    images.decode(teacher, train_images)
    _warn_of_size(store, student, teacher, model)
    expected = expected_gain.before_training(store, student, teacher)
    logger.info(
        "training %s with the teacher %s, targets %s: %s",
        *(student.name, teacher.name, kind, _estimate(store, model, train_images, student.img_size)),
    )
    targets = target_sources.prepare(
        store, teacher, images.source(train_images), kind, crossfit, ensemble=student.ensemble
    )
    if force:
        remove_progress(store.workspace.distillation(student.ensemble))
    trainings = [_train_pair(images, targets, members, number, [digest, kind]) for number in range(settings.seeds)]
    trained, alone = trainings[0].student, trainings[0].alone
    facts = {
        "teacher": teacher.name,
        "targets": _target_facts(targets, kind, 0 if unlabeled_split is None else len(unlabeled_split.paths)),
        "initial_weights": _initial_weights(store, student),
        "expected_gain": expected,
        **_schedule_facts(settings, trained, alone),
    }
    if facts["schedule_note"]:
        logger.warning("%s: %s", student.ensemble, facts["schedule_note"])
    store = _add_member(store, student, teacher, trained, images.facts, kind)
    derived = store.catalog.members[student.member]
    _build_ensemble(store, student, teacher, derived, digest, facts)
    costs = student_comparison.measure_costs(store, teacher, derived)
    verdict = student_comparison.compare_on_val(store, student, teacher, _probabilities(trainings), costs)
    record = facts | {
        "key": digest,
        "name": student.ensemble,
        "student": student.name,
        "member": derived.name,
        "sha256": derived.checkpoints[0]["sha256"],
        "costs": costs,
        "verdict": verdict,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(store.workspace.distillation(student.ensemble) / "record.json", record)
    remove_progress(store.workspace.distillation(student.ensemble))
    return store


def _target_facts(targets: StudentTargets, kind: str, unlabeled_images: int) -> dict[str, Any]:
    from utils.distillation.target_sources import ROWS

    return {
        "kind": kind,
        "rows": ROWS[kind],
        "views": targets.batch_schedule.n_views,
        "mix": targets.batch_schedule.mix,
        "digest": targets.digest,
        "unlabeled": unlabeled_images,
    }


def _schedule_facts(
    settings: Distillation, trained: StudentTrainingResult, alone: StudentTrainingResult
) -> dict[str, Any]:
    return {
        "temperature": settings.temperature,
        "alpha": settings.alpha,
        "seeds": settings.seeds,
        "epochs": {STUDENT: len(trained.history), ALONE: len(alone.history)},
        "history": {STUDENT: trained.history, ALONE: alone.history},
        "threads": {STUDENT: trained.threads, ALONE: alone.threads},
        "schedule_note": verdicts.schedule_note(alone.history, settings.epochs),
    }


def _probabilities(trainings: Sequence[_TrainedPair]) -> dict[str, dict[str, np.ndarray]]:
    """{split: {arm: (seeds, N, C)}}"""
    return {
        split: {arm: np.stack([each.probabilities[arm][split] for each in trainings]) for arm in (STUDENT, ALONE)}
        for split in STREAMED_SPLITS
    }


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


def _progress(store: Store, student: Student, arm: str, number: int, key: list[str]) -> TrainingProgress:
    """Progress file of one training of an arm: `progress_student.pth`, `progress_student_1.pth` of the second seed."""
    from utils.training.progress import TrainingProgress

    name = f"{arm}_{number}" if number else arm
    folder = store.workspace.distillation(student.ensemble)
    return TrainingProgress(folder / f"progress_{name}.pth", digest_of([*key, name]))


def remove_progress(folder: Path) -> None:
    """Remove the progress files of student and control."""
    for path in folder.glob("progress_*.pth"):
        remove_file(path)


def _training_settings(store: Store, student: Student, seed: int) -> StudentTrainingSettings:
    from utils.distillation.student_training import StudentTrainingSettings

    settings = store.config.distillation
    return StudentTrainingSettings(
        student.architecture,
        settings.epochs,
        settings.lr,
        settings.temperature,
        settings.alpha,
        seed=seed,
    )


@dataclass(frozen=True)
class _TrainedPair:
    """A student and its control of one seed."""

    student: StudentTrainingResult
    alone: StudentTrainingResult
    probabilities: Mapping[str, Mapping[str, np.ndarray]]
    """{student, alone: {split: probabilities (N, C)}} of val and test."""


def _train_pair(
    images: _StudentImages, targets: StudentTargets, members: Sequence[Member], number: int, key: list[str]
) -> _TrainedPair:
    """Train the student and its control of one seed.

    The control is the same network with the same initial weights, trained without a teacher for as many images with the
    same augmentation, mixing and loss of labels.
    """
    from utils.distillation.student_training import predict_logits, train
    from utils.training.batch_schedule import NEVER, BatchSchedule, derived_seed

    store, student, settings = images.store, images.student, images.store.config.distillation
    seed = store.config.seed if number == 0 else derived_seed(store.config.seed, "training", number)
    validation_set = images.source(store.images("val"))
    schedule, epoch_targets = targets.of_seed(seed)
    source = images.source(store.images("train"))
    alone_schedule = BatchSchedule(
        source,
        settings.batch_size,
        seed,
        np.full(len(source), NEVER),
        n_views=schedule.n_views,
        mix=schedule.mix,
        views_seed=schedule.views_seed,
    )
    alone_epochs = -(-settings.epochs * len(schedule.image_source) // len(source))
    training_settings = _training_settings(store, student, seed)
    results: dict[str, StudentTrainingResult] = {}
    probabilities: dict[str, dict[str, np.ndarray]] = {}
    for arm, arm_settings, arm_schedule, arm_targets in (
        (STUDENT, training_settings, schedule, epoch_targets),
        (ALONE, replace(training_settings, epochs=alone_epochs, alpha=0.0), alone_schedule, None),
    ):
        model = students.initial_network(store, student, members, seed=seed)
        results[arm] = train(
            model,
            arm_settings,
            arm_schedule,
            arm_targets,
            validation_set,
            device=images.device,
            progress=_progress(store, student, arm, number, key),
        )
        probabilities[arm] = {
            split: softmax(
                predict_logits(model, images.source(store.images(split)), images.device, results[arm].weights)
            )
            for split in STREAMED_SPLITS
        }
    return _TrainedPair(results[STUDENT], results[ALONE], probabilities)


def _initial_weights(store: Store, student: Student) -> str:
    """Where the initial weights come from: random, member, or the source of pretrained ones."""
    if student.pretrained is not None:
        return student.pretrained.source
    setting: str = store.config.distillation.initial_weights
    return setting if setting == MEMBER else RANDOM


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


def _estimate(store: Store, model: nn.Module, images: ImageSplit, img_size: int) -> estimates.Estimate:
    """Of all trainings, one after the other."""
    settings = store.config.distillation
    return estimates.estimate_training(
        [_model_bytes(model)],
        len(images.paths),
        epochs=2 * settings.seeds * settings.epochs,
        kept=1,
        batch_size=settings.batch_size,
        img_size=img_size,
        on_cuda=streaming.resolve_device(store.config.device) != "cpu",
        cores=1,
    )
