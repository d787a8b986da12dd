"""The teacher's predictions for the student's views of each epoch, computed ahead of its training where cores are free.

They depend on the epoch alone, not on the student, so that worker processes compute those of the next epochs while the
student trains. The teacher is the expensive part: a pass of all its networks per epoch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from utils import base_back
from utils.core import engines, worker_processes
from utils.distillation import teachers
from utils.distillation.soft_targets import Targets
from utils.distillation.teachers import Teacher
from utils.networks.preprocessing import Preprocessing
from utils.predictions import streaming
from utils.predictions.store import Store

if TYPE_CHECKING:
    import torch

    from utils.distillation.student_training import EpochTargets
    from utils.training.batch_schedule import BatchSchedule

MAX_BYTES = 2**28  # of the predictions of all epochs, which may all be ready before the student needs them
BYTES_PER_PARAMETER = 2  # of a checkpoint in half precision, so that the number of parameters is not underestimated


@contextmanager
def epoch_predictions(
    store: Store, teacher: Teacher, batch_schedule: BatchSchedule, epochs: int
) -> Iterator[EpochTargets]:
    """Within the block, a function that returns the predictions of an epoch; epochs are called for in order.

    Passes run in processes beside the training if each uses one thread on the CPU and the predictions fit in memory;
    their bytes are the same.
    """
    if not _can_run_ahead(store, teacher, len(batch_schedule.image_source), epochs):
        yield partial(_predict_epoch, store, teacher, batch_schedule)
        return
    with closing(_Ahead(store, teacher, batch_schedule, epochs)) as ahead:
        yield ahead


class _Ahead:
    """Predictions of consecutive epochs, beginning with the first that is called for."""

    def __init__(self, store: Store, teacher: Teacher, batch_schedule: BatchSchedule, epochs: int) -> None:
        self.shared, self.epochs = (store, teacher, batch_schedule), epochs
        self.next_epoch: int | None = None
        self.results: Generator[Targets, None, None] | None = None

    def __call__(self, epoch: int) -> Targets:
        if self.results is None or epoch != self.next_epoch:
            self.close()
            self.results = engines.Local().map(
                _predict_epoch,
                range(epoch, self.epochs),
                shared=self.shared,
                description="the teacher's passes",
                n_processes=engines.cores(),
                threads_per_job=1,
                are_long=True,
            )
        self.next_epoch = epoch + 1
        return next(self.results)

    def close(self) -> None:
        """End the passes that are running."""
        if self.results is not None:
            self.results.close()


def _can_run_ahead(store: Store, teacher: Teacher, rows: int, epochs: int) -> bool:
    rule = base_back.load_bundled("threads")
    has_no_core = worker_processes.is_within_job() or engines.cores() == 1
    if has_no_core or not engines.current().shares_memory or worker_processes.start_method() != worker_processes.FORK:
        return False
    if streaming.resolve_device(store.config.device) != "cpu" or store.config.distillation.feature_weight != 0:
        return False
    one_thread = all(
        rule.number_of_threads("streaming", n_bytes // BYTES_PER_PARAMETER, img_size) == 1
        for n_bytes, img_size in teachers.network_sizes(store, teacher)
    )
    return one_thread and rows * len(store.catalog.classes) * 4 * epochs <= MAX_BYTES


def _predict_epoch(store: Store, teacher: Teacher, batch_schedule: BatchSchedule, epoch: int) -> Targets:
    """The teacher's predictions for the student's training views in an epoch (Beyer et al. 2022)."""

    def batches(preprocessing: Preprocessing) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, images in batch_schedule.loader(epoch, preprocessing):
            yield batch.rows, images

    matches_embeddings = store.config.distillation.feature_weight != 0
    return teachers.predict_views(
        store, teacher, len(batch_schedule.image_source), batches, embeddings=matches_embeddings
    )
