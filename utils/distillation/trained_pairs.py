"""Trains a student and its control for each seed, and selects on val whether the teacher's embeddings are matched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import base_back
from utils.core.artifacts import digest_of
from utils.core.links import remove_file
from utils.distillation import epoch_predictions, students, teachers
from utils.distillation.controls import ALONE, STUDENT
from utils.distillation.epoch_predictions import EpochPredictions
from utils.distillation.students import Student
from utils.distillation.teachers import Teacher
from utils.numeric.metrics import clipped_log, log_loss, softmax
from utils.numeric.temperature import fit_temperature
from utils.predictions import image_splits
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.extraction import STREAMED_SPLITS
from utils.predictions.image_splits import ImageSplit
from utils.predictions.store import Store

if TYPE_CHECKING:
    from utils.distillation.student_training import EpochTargets, StudentTrainingResult, StudentTrainingSettings
    from utils.distillation.target_sources import StudentTargets
    from utils.training.batch_schedule import BatchSchedule
    from utils.training.image_source import ImageSource
    from utils.training.progress import TrainingProgress

logger = logging.getLogger("disease_pipeline")

AUTO = "auto"
FEATURE_WEIGHTS = (0.0, 1.0)
"""Candidate weights of `feature_weight: auto`."""


@dataclass(frozen=True)
class StudentImages:
    """The images of student and control: preprocessing, augmentation, cache and device."""

    store: Store
    student: Student
    facts: Mapping[str, str]
    """Training metadata of the checkpoint of the student's reference member."""
    device: str
    threads: int

    def source(self, images: ImageSplit) -> ImageSource:
        """Images with the student's preprocessing and augmentation."""
        from utils.training.image_source import ImageSource, augmentation_kind

        augmentation, cache = augmentation_kind(self.facts), self.store.workspace.image_cache
        return ImageSource(images, self.student.preprocessing, augmentation, image_cache=cache, threads=self.threads)

    def decode(self, teacher: Teacher, images: ImageSplit) -> None:
        """Decode every image once, with the resize rules of all networks that read it."""
        networks = [member for member in teachers.members_of(self.store, teacher) if member.source != IMPORTED]
        preprocessings = [self.student.preprocessing, *(member.image_preprocessing for member in networks)]
        splits = [images, *(self.store.images(split) for split in STREAMED_SPLITS)]
        cache = self.store.workspace.image_cache
        image_splits.decode(splits, preprocessings, image_cache=cache, threads=self.threads)


@dataclass(frozen=True)
class TrainedPair:
    """A student and its control of one seed."""

    student: StudentTrainingResult
    alone: StudentTrainingResult
    """The control's, without weights"""
    probabilities: Mapping[str, Mapping[str, np.ndarray]]
    """{student, alone: {split: probabilities (N, C)}} for val and test."""


@dataclass(frozen=True)
class PairTraining:
    """Everything that the trainings of one student and its control have in common."""

    images: StudentImages
    targets: StudentTargets
    members: Sequence[Member]
    """Members of the teacher."""
    n_parameters: int
    """Of the student"""
    key: Sequence[str]
    """Key that a progress file must have been written with."""

    def chosen_feature_weight(self) -> tuple[float, dict[str, float] | None]:
        """The configured weight; for `auto`, that of lowest calibrated log-loss on val, with {weight: log-loss}.

        With `auto`, a student of the first seed is trained with every weight.
        """
        configured = self.images.store.config.distillation.feature_weight
        if configured != AUTO:
            return float(configured), None
        labels, losses = self.images.store.images("val").labels, {}
        for weight in FEATURE_WEIGHTS:
            with self._epoch_predictions(0) as predictions:
                log_probs = clipped_log(self._student(0, weight, predictions)[1]["val"])
            losses[weight] = log_loss(softmax(log_probs / fit_temperature(log_probs, labels)), labels)
        best = min(losses, key=lambda weight: (losses[weight], weight))
        logger.info(
            "distillation.feature_weight: auto takes %g: calibrated log-loss on val %s",
            *(best, ", ".join(f"{loss:.4f} with {weight:g}" for weight, loss in losses.items())),
        )
        return best, {f"{weight:g}": loss for weight, loss in losses.items()}

    def train(self, number: int, feature_weight: float) -> TrainedPair:
        """Train the student and its control of one seed, or read the results of an earlier run.

        The control is the same network with the same initial weights, trained without a teacher on the same number of
        images with the same augmentation, mixing and label loss. It is trained beside the student where a core is free.
        """
        train_control = partial(self._alone, number)
        beside = train_control if self._control_uses_one_thread(number) else None
        with self._epoch_predictions(number, beside) as predictions:
            student, student_probabilities = self._student(number, feature_weight, predictions)
            alone, alone_probabilities = train_control() if beside is None else predictions.result_beside()
        return TrainedPair(student, alone, {STUDENT: student_probabilities, ALONE: alone_probabilities})

    def _epoch_predictions(
        self, number: int, beside: Callable[[], object] | None = None
    ) -> AbstractContextManager[EpochPredictions]:
        """The teacher's predictions for the student of one seed, computed together with the job `beside`."""
        targets, store = self.targets, self.images.store
        schedule, epochs = targets.of_seed(self._seed(number)), store.config.distillation.epochs
        n_processes = 1
        if targets.uses_one_thread and (targets.digest is None or beside is not None):
            n_processes = epoch_predictions.n_processes(store, len(schedule.image_source), epochs)
        predict = partial(targets.predict, schedule)
        return closing(EpochPredictions(predict, epochs, beside, n_processes=n_processes))

    def _control_uses_one_thread(self, number: int) -> bool:
        """Whether the control is trained on one thread, as in a forked process."""
        saved = self._progress(ALONE, number).load()
        if saved is not None and saved.get("threads") is not None:
            return bool(saved["threads"] == 1)
        rule = base_back.load_bundled("threads")
        return bool(rule.number_of_threads("student", self.n_parameters, self.images.student.img_size) == 1)

    def _student(
        self, number: int, feature_weight: float, predictions: EpochPredictions
    ) -> tuple[StudentTrainingResult, dict[str, np.ndarray]]:
        schedule = self.targets.of_seed(self._seed(number))
        name = f"{STUDENT}_features" if feature_weight else STUDENT
        settings = replace(self._settings(number), feature_weight=feature_weight)
        return self._trained(name, number, settings, schedule, predictions)

    def _alone(self, number: int) -> tuple[StudentTrainingResult, dict[str, np.ndarray]]:
        from utils.training.batch_schedule import NEVER, BatchSchedule

        settings = self.images.store.config.distillation
        of_student = self.targets.of_seed(self._seed(number))
        source = self.images.source(self.images.store.images("train"))
        schedule = BatchSchedule(
            source,
            settings.batch_size,
            self._seed(number),
            np.full(len(source), NEVER),
            n_views=of_student.n_views,
            mix=of_student.mix,
            views_seed=of_student.views_seed,
            device=of_student.device,
        )
        epochs = -(-settings.epochs * len(of_student.image_source) // len(source))
        settings_alone = replace(self._settings(number), epochs=epochs, alpha=0.0)
        result, probabilities = self._trained(ALONE, number, settings_alone, schedule, None)
        return replace(result, weights={}), probabilities  # nothing reads them, and a worker would have to send them

    def _trained(
        self,
        arm: str,
        number: int,
        settings: StudentTrainingSettings,
        schedule: BatchSchedule,
        epoch_targets: EpochTargets | None,
    ) -> tuple[StudentTrainingResult, dict[str, np.ndarray]]:
        """Result and {split: probabilities (N, C)} of one training."""
        from utils.distillation.student_training import predict_logits, train

        images, store = self.images, self.images.store
        model = students.initial_network(store, images.student, self.members, seed=self._seed(number))
        validation_set, progress = images.source(store.images("val")), self._progress(arm, number)
        result = train(
            model, settings, schedule, epoch_targets, validation_set, device=images.device, progress=progress
        )
        return result, {
            split: softmax(predict_logits(model, images.source(store.images(split)), images.device, result.weights))
            for split in STREAMED_SPLITS
        }

    def _seed(self, number: int) -> int:
        from utils.training.batch_schedule import derived_seed

        seed = self.images.store.config.seed
        return seed if number == 0 else derived_seed(seed, "training", number)

    def _settings(self, number: int) -> StudentTrainingSettings:
        from utils.distillation.student_training import StudentTrainingSettings

        settings = self.images.store.config.distillation
        return StudentTrainingSettings(
            self.images.student.architecture,
            settings.epochs,
            settings.lr,
            settings.temperature,
            settings.alpha,
            seed=self._seed(number),
        )

    def _progress(self, arm: str, number: int) -> TrainingProgress:
        """Progress file of one training: `progress_student.pth`, `progress_student_1.pth` of the second seed."""
        from utils.training.progress import TrainingProgress

        name = f"{arm}_{number}" if number else arm
        folder = self.images.store.workspace.distillation(self.images.student.ensemble)
        return TrainingProgress(folder / f"progress_{name}.pth", digest_of([*self.key, name]))


def remove_progress(folder: Path) -> None:
    """Remove the progress files of student and control."""
    for path in folder.glob("progress_*.pth"):
        remove_file(path)
