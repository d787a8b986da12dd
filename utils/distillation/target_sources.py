"""The targets of a student: out-of-fold predictions, or predictions of the views of each epoch or of recurring views.

Targets are computed in advance and stored, except those of `consistent`, which the teacher predicts for the views of
each epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from utils.core import estimates
from utils.core.artifacts import digest_of
from utils.core.config import Config
from utils.core.errors import LeakageError, UserError
from utils.distillation import epoch_predictions, soft_targets, teachers
from utils.distillation.open_networks import OpenNetworks
from utils.distillation.soft_targets import Targets
from utils.distillation.teachers import Teacher
from utils.networks.preprocessing import Preprocessing
from utils.predictions import extraction, streaming
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN
from utils.predictions.store import Store
from utils.training.batch_schedule import ALWAYS, HALF, NEVER, BatchSchedule
from utils.training.image_source import EVALUATION_BATCH_SIZE, NO_AUGMENTATION, ImageSource

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("disease_pipeline")

CONFIG_KEY = "distillation.targets"
EXPENSIVE_PASS = 0.2
"""Fraction of the student's training time above which `auto` logs the cost of a teacher's pass."""
MAX_RECURRENCES = 4
"""Largest number of epochs per recurring view without a warning; with 5 and with 40, students were worse than the
network alone (benchmarks/distillation.py)."""
OOF, CONSISTENT, VIEWS = "oof", "consistent", "views"
ROWS = {OOF: "oof", CONSISTENT: "in_sample", VIEWS: "in_sample"}
"""Kind of targets -> whether the teacher's predictions of train rows are out-of-fold or in-sample."""


@dataclass(frozen=True)
class StudentTargets:
    """The batches of a student and its teacher's predictions for them."""

    kind: str
    batch_schedule: BatchSchedule
    """Batch schedule of the first seed."""
    predict: Callable[[BatchSchedule, int], Targets]
    """(batch schedule, epoch) -> the teacher's predictions for the views of that epoch"""
    uses_one_thread: bool
    """Whether `predict` computes on one thread, so that forked processes can call it"""
    digest: str | None
    """Digest of the stored targets; None if the teacher predicts in every epoch."""

    def of_seed(self, seed: int) -> BatchSchedule:
        """Batches of a seed; recurring views are those of the first seed."""
        schedule = self.batch_schedule
        return schedule if seed == schedule.seed else replace(schedule, seed=seed, views_seed=schedule.seed)


def resolve_kind(store: Store, teacher: Teacher, train: ImageSplit, student: tuple[int, int]) -> tuple[str, np.ndarray]:
    """The kind of targets, and the cross-fitted log-probabilities (N, C) of the train rows, NaN for rows without them.

    `student` is (bytes of its weights, input size in px). `auto` resolves to `oof` if the teacher has members without a
    network, else to `consistent` (function matching, Beyer et al. 2022), and logs the cost of an expensive teacher.

    Raises LeakageError if `oof` is configured and there is no cross-fitted prediction, and UserError if the kind needs
    a network that the teacher does not have.
    """
    kind: str = store.config.distillation.targets
    without_network = teachers.members_without_network(store, teacher)
    crossfit = teachers.crossfit_log_probabilities(store, teacher, "train", train.sample_ids)
    has_target = ~np.isnan(crossfit).any(axis=1)
    if kind == "auto":
        kind = OOF if without_network else CONSISTENT
        if kind == CONSISTENT:
            _log_cost(store, teacher, student)
    if kind != OOF and without_network:
        raise UserError(
            f"{CONFIG_KEY}: {kind} needs the teacher's networks, and {', '.join(without_network)} of {teacher.name} "
            f"have imported predictions alone; set it to {OOF}"
        )
    if kind == OOF and not has_target.any():
        raise LeakageError(
            f"{CONFIG_KEY}: {teacher.name} has no cross-fitted predictions of train rows"
            + (
                f" for images with these ids, and {', '.join(without_network)} have no network. Import oof.npz for them"
                if without_network
                else f"; its members need out-of-fold predictions, or set it to {CONSISTENT}"
            )
        )
    if kind == OOF and not has_target.all():
        logger.warning(
            "%d of %d train rows have no target; the student learns them by their labels alone",
            *((~has_target).sum(), len(has_target)),
        )
    _check_settings(store.config, teacher, kind, without_network)
    return kind, crossfit


def _log_cost(store: Store, teacher: Teacher, student: tuple[int, int]) -> None:
    """Log the cost of the passes of an expensive teacher, estimated from sizes only, so that it is reproducible."""
    settings = store.config.distillation
    fraction = estimates.pass_fraction(teachers.network_sizes(store, teacher), student, epochs=settings.epochs)
    if fraction > EXPENSIVE_PASS:
        logger.info(
            "%s: auto takes %s: each of the %d epochs has a pass of %s over the images, which costs an estimated "
            "%.0f%% of the student's whole training. %s needs fewer passes, but students of recurring views were worse "
            "than the same network alone",
            *(CONFIG_KEY, CONSISTENT, settings.epochs, teacher.name, 100 * fraction, VIEWS),
        )


def mixing_of(config: Config, kind: str) -> str:
    """The kind of mixing for a kind of targets; `auto` is both mixup and CutMix, but none with `oof`.

    Cross-fitted targets apply to the evaluation view of an image, and mixing is an augmentation.
    """
    mix: str = config.distillation.mix
    if mix != "auto":
        return mix
    return "none" if kind == OOF else "both"


def recurrence_note(epochs: int, views: int) -> str | None:
    """A warning if few views of each image recur over many epochs, else None."""
    if epochs <= MAX_RECURRENCES * views:
        return None
    return (
        f"distillation.views: each of the {views} views of an image recurs in {epochs / views:.0f} epochs; a student "
        "that sees few views can be worse than the same network trained alone on new views in every epoch, which its "
        f"control does not show. Set distillation.views to {-(-epochs // MAX_RECURRENCES)} or more, or {CONFIG_KEY} "
        f"to {CONSISTENT}"
    )


def _check_settings(config: Config, teacher: Teacher, kind: str, without_network: list[str]) -> None:
    settings = config.distillation
    if mixing_of(config, kind) != "none" and kind == OOF:
        raise UserError(
            f"distillation.mix: {settings.mix} needs targets for augmented images, which {CONFIG_KEY}: {kind} does not "
            f"give; set {CONFIG_KEY} to {CONSISTENT} or {VIEWS}, or distillation.mix to none"
        )
    if settings.feature_weight != 0 and kind != CONSISTENT:
        reason = (
            f"{', '.join(without_network)} of {teacher.name} have imported predictions alone; set it to 0"
            if without_network
            else f"{CONFIG_KEY}: {kind} has none; set {CONFIG_KEY} to {CONSISTENT}, or distillation.feature_weight to 0"
        )
        raise UserError(f"distillation.feature_weight needs the embeddings of the same views, and {reason}")
    if settings.unlabeled_dir is not None and without_network:
        raise UserError(
            f"distillation.unlabeled_dir: {', '.join(without_network)} of {teacher.name} have imported predictions "
            "alone and cannot predict other images; set it to null"
        )


def prepare(
    store: Store, teacher: Teacher, image_source: ImageSource, kind: str, crossfit: np.ndarray, *, ensemble: str
) -> StudentTargets:
    """Make the batch schedule and, unless the kind is `consistent`, compute the targets or read the stored ones.

    `image_source` holds the train images, then the unlabeled ones; `crossfit` comes from `resolve_kind`; `ensemble` is
    the student's ensemble, in whose folder targets are stored.
    """
    settings = store.config.distillation
    count = len(image_source)
    batch_schedule = BatchSchedule(
        image_source,
        settings.batch_size,
        store.config.seed,
        unaugmented=unaugmented_frequency(image_source, kind, ~np.isnan(crossfit).any(axis=1), settings.alpha),
        n_views=settings.views if kind == VIEWS and image_source.augmentation != NO_AUGMENTATION else 0,
        mix=mixing_of(store.config, kind),
        mixes_targets=kind != CONSISTENT,
        is_shared=kind == CONSISTENT,
        device=streaming.resolve_device(store.config.device),
    )
    if kind == CONSISTENT:
        predict = partial(epoch_predictions.predict_epoch, store, teacher, OpenNetworks())
        uses_one_thread = extraction.use_one_thread(teachers.network_sizes(store, teacher))
        return StudentTargets(kind, batch_schedule, predict, uses_one_thread, None)
    if batch_schedule.n_views and (note := recurrence_note(settings.epochs, batch_schedule.n_views)):
        logger.warning("%s", note)
    path = store.workspace.distillation(ensemble) / "targets.npz"
    key = digest_of(
        [
            *(teachers.inputs_digest(store, teacher), kind, image_source.images.digest, image_source.augmentation),
            *(batch_schedule.n_views, views_digest(batch_schedule)),
        ]
    )
    arrays = soft_targets.load(path, key)
    if arrays is None:
        if kind == VIEWS:
            n_images = max(1, batch_schedule.n_views) * count
            views = partial(all_views, batch_schedule)
            targets = teachers.predict_views(store, teacher, n_images, views, OpenNetworks()).log_probabilities
        else:
            targets = _oof_targets(store, teacher, image_source, crossfit)
        arrays = soft_targets.pack(targets.reshape(-1, count, targets.shape[1]))
        soft_targets.save(path, key, arrays)
    table, digest = soft_targets.unpack(arrays), soft_targets.content_digest(arrays)

    def stored(schedule: BatchSchedule, epoch: int) -> Targets:
        return Targets(table[schedule.view_numbers(epoch), np.arange(count)])

    return StudentTargets(kind, batch_schedule, stored, uses_one_thread=True, digest=digest)


def _oof_targets(store: Store, teacher: Teacher, image_source: ImageSource, crossfit: np.ndarray) -> np.ndarray:
    """Cross-fitted log-probabilities of the train images, followed by predictions of the unlabeled ones, (N, C)."""
    n_train, n_unlabeled = len(crossfit), len(image_source) - len(crossfit)
    if not n_unlabeled:
        return crossfit

    def batches(preprocessing: Preprocessing) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = streaming.resolve_device(store.config.device)
        for rows, images in image_source.evaluation_batches(preprocessing, start=n_train, device=device):
            yield rows - n_train, images

    predicted = teachers.predict_views(store, teacher, n_unlabeled, batches, OpenNetworks())
    return np.concatenate([crossfit, predicted.log_probabilities])


def unaugmented_frequency(image_source: ImageSource, kind: str, has_target: np.ndarray, alpha: float) -> np.ndarray:
    """How often each image is loaded with the evaluation transform, unicode (N,): never, half or always.

    Cross-fitted targets apply only to that view, labels to any view. Half of each batch is loaded with it and enters
    the distillation loss, the other half enters the label loss, so that an epoch costs as much as without a teacher.
    `has_target` (n,) is about the train images, which come first.
    """
    frequency = np.full(len(image_source), NEVER, dtype="<U6")
    if kind != OOF or image_source.augmentation == NO_AUGMENTATION or alpha == 0:
        return frequency
    frequency[: len(has_target)][has_target] = ALWAYS if alpha == 1 else HALF
    frequency[image_source.images.labels == UNKNOWN] = ALWAYS
    return frequency


def views_digest(batch_schedule: BatchSchedule) -> str | None:
    """Digest of the recurring views, which are sampled again from their seed; None if there are none."""
    if not batch_schedule.n_views:
        return None
    views = batch_schedule.recurring_views()
    return soft_targets.content_digest({name: value.numpy() for name, value in vars(views).items()})


def all_views(
    batch_schedule: BatchSchedule, preprocessing: Preprocessing
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (indices int64 (B,), images float32 (B, 3, S, S)): all images in view 0, then all in view 1, ...

    The index of image i in view k is k * N + i.
    """
    import torch

    source = batch_schedule.image_source
    views = batch_schedule.recurring_views() if batch_schedule.n_views else None
    for number in range(max(1, batch_schedule.n_views)):
        for rows in torch.arange(len(source)).split(EVALUATION_BATCH_SIZE):
            indices = number * len(source) + rows
            row_views = None if views is None else views.take(indices)
            yield indices, source.load(rows, preprocessing, row_views, batch_schedule.device)
