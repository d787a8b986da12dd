"""Builds one student: trains it and its control once per seed, and writes the files of `distill`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.building import ensembles, fitting
from utils.core import estimates
from utils.core.artifacts import write_json
from utils.core.config_sections import Distillation
from utils.discovery import discover
from utils.distillation import expected_gain, student_comparison, students, teachers, unlabeled, verdicts
from utils.distillation.controls import ALONE, STUDENT
from utils.distillation.initial_weights import MEMBER, RANDOM
from utils.distillation.students import Student
from utils.distillation.teachers import METHOD, Teacher
from utils.distillation.trained_pairs import PairTraining, StudentImages, TrainedPair, remove_progress
from utils.predictions import extraction, image_splits, streaming
from utils.predictions.catalog import BEST_ON_VAL, Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

if TYPE_CHECKING:
    from torch import nn

    from utils.distillation.student_training import StudentTrainingResult
    from utils.distillation.target_sources import StudentTargets

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
    images = StudentImages(
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
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    run = PairTraining(images, targets, members, n_parameters, [digest, kind])
    feature_weight, val_log_loss = run.chosen_feature_weight()
    trainings = [run.train(number, feature_weight) for number in range(settings.seeds)]
    trained, alone = trainings[0].student, trainings[0].alone
    facts = {
        "teacher": teacher.name,
        "targets": _target_facts(targets, kind, 0 if unlabeled_split is None else len(unlabeled_split.paths)),
        "initial_weights": _initial_weights(store, student),
        "expected_gain": expected,
        "feature_weight": {"value": feature_weight, "val_log_loss": val_log_loss},
        **_schedule_facts(settings, trained, alone),
    }
    if facts["schedule_note"]:
        logger.warning("%s: %s", student.ensemble, facts["schedule_note"])
    chosen_on_val = val_log_loss is not None
    store = _add_member(store, student, teacher, trained, images.facts, kind, chosen_on_val=chosen_on_val)
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


def _probabilities(trainings: Sequence[TrainedPair]) -> dict[str, dict[str, np.ndarray]]:
    """{split: {arm: (seeds, N, C)}}"""
    return {
        split: {arm: np.stack([each.probabilities[arm][split] for each in trainings]) for arm in (STUDENT, ALONE)}
        for split in STREAMED_SPLITS
    }


def _initial_weights(store: Store, student: Student) -> str:
    """Origin of the initial weights: random, member, or the source of pretrained weights."""
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
    *,
    chosen_on_val: bool,
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
        **({"selection": BEST_ON_VAL} if chosen_on_val else {}),
    }
    students.write_student(store, student, trained.weights, facts)
    updated = discover.register_derived(
        store.config, store.workspace, store.digests, store.images("train"), store.catalog, [student.member]
    )
    return store.with_catalog(updated)


def _build_ensemble(
    store: Store, student: Student, teacher: Teacher, derived: Member, digest: str, facts: Mapping[str, Any]
) -> None:
    """Write the ensemble that consists of the student's member; `facts` are recorded in its `ensemble.json`.

    Its out-of-sample rows are those of val. Rows that the teacher was fitted or selected on count for the student too.
    """
    extraction.ensure(store, [derived], STREAMED_SPLITS)
    val_rows = fitting.out_of_sample_rows(store, [derived])
    fitting.save(
        store,
        student.ensemble,
        METHOD,
        fitting.fit(
            ensembles.COMBINERS[METHOD].configured(store.config, fitting.member_facts(store, [derived])), val_rows
        ),
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
    """Estimate of all trainings, run one after the other."""
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
