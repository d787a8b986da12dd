"""What a student learns from: whose words on which images, the three kinds of targets, and how they are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from utils.core.artifacts import digest_of
from utils.core.config import Config
from utils.core.errors import LeakageError, UserError
from utils.distillation import soft_targets as stored
from utils.distillation import teachers
from utils.distillation.teachers import Teacher
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN
from utils.predictions.store import Store
from utils.training.image_views import NO_VIEW, Album, Lessons

if TYPE_CHECKING:
    import torch

    from utils.distillation.student_training import Teach

logger = logging.getLogger("disease_pipeline")

PLACE = "distillation.targets"
OOF, CONSISTENT, VIEWS = "oof", "consistent", "views"
ROWS = {OOF: "oof", CONSISTENT: "in_sample", VIEWS: "in_sample"}
"""By which predictions of train rows the student is taught."""
CHUNK = 256  # images at a time, where nothing else makes batches of them


@dataclass(frozen=True)
class Teaching:
    """The lessons of the taught student, and what its teacher says in each epoch."""

    kind: str
    lessons: Lessons
    teach: Teach
    digest: str | None
    """Of the targets that are on disk."""


def kind_of(store: Store, teacher: Teacher, train: ImageSplit) -> tuple[str, np.ndarray]:
    """Which targets are taken, and the cross-fitted log-probabilities (N, C) of the train rows, NaN where none are.

    `auto` takes `oof` where every train row has them, else `consistent`. Raises LeakageError where `oof` is asked for
    and there are none, UserError where a network is needed and there is none.
    """
    asked = store.config.distillation.targets
    without = teachers.without_networks(store, teacher)
    unseen = teachers.unseen(store, teacher, "train", train.sample_ids)
    known = ~np.isnan(unseen).any(axis=1)
    kind = asked
    if asked == "auto":
        kind = OOF if known.all() or without else CONSISTENT
        if kind == CONSISTENT:
            logger.warning(
                "%s has cross-fitted predictions for %d of %d train rows, so that it is asked about the views that "
                "the student is shown; targets: in_sample",
                *(teacher.name, known.sum(), len(known)),
            )
    if kind != OOF and without:
        raise UserError(
            f"{PLACE}: {kind} shows the teacher every view, and {', '.join(without)} of {teacher.name} are known by "
            f"predictions alone; set it to {OOF}"
        )
    if kind == OOF and not known.any():
        raise LeakageError(
            f"{PLACE}: {teacher.name} has no cross-fitted predictions of train rows"
            + (
                f" for images with these ids, and {', '.join(without)} cannot be shown any. Import oof.npz for them"
                if without
                else f"; its members need out-of-fold predictions, or set it to {CONSISTENT}"
            )
        )
    if kind == OOF and not known.all():
        logger.warning("%d of %d train rows have no target; labels alone teach them", (~known).sum(), len(known))
    _check_settings(store.config, teacher, kind, without)
    return kind, unseen


def _check_settings(config: Config, teacher: Teacher, kind: str, without: list[str]) -> None:
    settings = config.distillation
    if settings.mix != "none" and kind != CONSISTENT:
        raise UserError(
            f"distillation.mix: {settings.mix} needs targets for mixed images, which {PLACE}: {kind} does not give; "
            f"set {PLACE} to {CONSISTENT}, or distillation.mix to none"
        )
    if settings.unlabeled_dir is not None and without:
        raise UserError(
            f"distillation.unlabeled_dir: {', '.join(without)} of {teacher.name} are known by predictions alone and "
            "cannot say anything of other images; set it to null"
        )


def prepare(store: Store, teacher: Teacher, album: Album, kind: str, unseen: np.ndarray, *, name: str) -> Teaching:
    """Ask the teacher for what can be asked beforehand, or find it on disk, and make the lessons.

    The `album` holds the train images and then those without labels; `unseen` is what `kind_of` gave; `name` is
    that of the ensemble, by which targets are kept.
    """
    settings = store.config.distillation
    count, own = len(album), len(unseen)
    lessons = Lessons(
        album,
        settings.batch_size,
        store.config.seed,
        plain=plainness(album, kind, ~np.isnan(unseen).any(axis=1), settings.alpha),
        views=settings.views if kind == VIEWS and album.kind != NO_VIEW else 0,
        mix=settings.mix,
        is_shared=kind == CONSISTENT,
    )
    if kind == CONSISTENT:
        return Teaching(kind, lessons, lambda epoch: _consistent(store, teacher, lessons, epoch), None)
    path = store.workspace.distillation(name) / "targets.npz"
    key = digest_of(
        [teachers.key(store, teacher), kind, album.images.digest, album.kind, lessons.views, views_digest(lessons)]
    )
    arrays = stored.load(path, key)
    if arrays is None:
        if kind == VIEWS:
            targets = teachers.shown(store, teacher, max(1, lessons.views) * count, lambda size: _views(lessons, size))
        else:
            targets = np.empty((count, unseen.shape[1]), dtype=np.float32)
            targets[:own] = unseen
            if count > own:
                others = range(own, count)
                targets[own:] = teachers.shown(store, teacher, count - own, lambda size: _plainly(album, others, size))
        arrays = stored.pack(targets.reshape(-1, count, targets.shape[1]))
        stored.save(path, key, arrays)
    table = stored.unpack(arrays)
    return Teaching(
        kind, lessons, lambda epoch: table[lessons.view_of(epoch), np.arange(count)], stored.content_digest(arrays)
    )


def plainness(album: Album, kind: str, known: np.ndarray, alpha: float) -> np.ndarray:
    """How often each image of the album is shown as in evaluation, unicode (N,): never, half, always.

    Cross-fitted targets belong to that view, labels to any. Half of each batch is shown so and is the teacher's part,
    the other half is the labels' part, so that an epoch costs what one of plain training does. `known` (n,) says which
    of the train images, which come first, have a target.
    """
    found = np.full(len(album), "never", dtype="<U6")
    if kind != OOF or album.kind == NO_VIEW or alpha == 0:
        return found
    found[: len(known)][known] = "always" if alpha == 1 else "half"
    found[album.images.labels == UNKNOWN] = "always"
    return found


def views_digest(lessons: Lessons) -> str | None:
    """Of the views that come back; they are drawn again from their seed, and this shows that they are the same."""
    if not lessons.views:
        return None
    drawn = lessons.all_views()
    return stored.content_digest({name: value.numpy() for name, value in vars(drawn).items()})


def _views(lessons: Lessons, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All images in all their views, one view after the other."""
    import torch

    count, drawn = len(lessons.album), lessons.all_views() if lessons.views else None
    for number in range(max(1, lessons.views)):
        for start in range(0, count, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, count))
            places = number * count + rows
            yield places, lessons.album.show(rows, size, None if drawn is None else drawn.take(places))


def _plainly(album: Album, rows: range, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    for start in range(rows.start, rows.stop, CHUNK):
        chunk = torch.arange(start, min(start + CHUNK, rows.stop))
        yield chunk - rows.start, album.show(chunk, size, None)


def _consistent(store: Store, teacher: Teacher, lessons: Lessons, epoch: int) -> np.ndarray:
    """What the teacher says of the very images that the student is shown in an epoch (Beyer et al. 2022)."""

    def show(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, images in lessons.pages(epoch, size):
            yield batch.rows, images

    return teachers.shown(store, teacher, len(lessons.album), show)
