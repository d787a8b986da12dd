"""The teacher's predictions for the student's views of each epoch, and the control's training beside the student's.

Neither depends on the student. Where cores are free, worker processes train the control and compute the predictions of
the next epochs while the student trains; the bytes are the same. With `consistent` targets, the predictions are the
expensive part: a pass of all the teacher's networks per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from utils.core import engines, worker_processes
from utils.distillation import teachers
from utils.distillation.open_networks import OpenNetworks
from utils.distillation.soft_targets import Targets
from utils.distillation.teachers import Teacher
from utils.networks.preprocessing import Preprocessing
from utils.predictions import streaming
from utils.predictions.store import Store

if TYPE_CHECKING:
    import torch

    from utils.training.batch_schedule import BatchSchedule

MAX_BYTES = 2**28  # of the predictions of all epochs, which may all be ready before the student needs them


class EpochPredictions:
    """The teacher's predictions of consecutive epochs, and the result of a job that may run beside their use.

    Parameters
    ----------
    predict : epoch -> the predictions for the views of that epoch
    epochs : number of epochs
    beside : the job; None without one
    n_processes : number of processes; with 1, everything runs in this process when it is called for
    """

    def __init__(
        self,
        predict: Callable[[int], Targets],
        epochs: int,
        beside: Callable[[], Any] | None = None,
        *,
        n_processes: int,
    ) -> None:
        self._predict, self._epochs, self._beside, self._n_processes = predict, epochs, beside, n_processes
        self._next_epoch: int | None = None
        self._results: Generator[Any, None, None] | None = None

    def __call__(self, epoch: int) -> Targets:
        """Predictions of an epoch; epochs are called for in order, beginning with any."""
        if self._n_processes == 1:
            return self._predict(epoch)
        if self._results is None or epoch != self._next_epoch:
            self.close()
            epochs = range(epoch, self._epochs)
            jobs = [*epochs] if self._beside is None else [*epochs, None]
            self._results = engines.Local().map(
                _run,
                jobs,
                shared=(self._predict, self._beside),
                description="distillation",
                n_processes=self._n_processes,
                threads_per_job=1,
                are_long=True,
                # The job beside is the longest, so that it starts first.
                start_order=sorted(range(len(jobs)), key=lambda index: jobs[index] is not None),
            )
        self._next_epoch = epoch + 1
        return next(self._results)

    def result_beside(self) -> Any:
        """The result of the job, after the last epoch: waits for it, or runs it if it has not run."""
        assert self._beside is not None
        if self._results is None:
            return self._beside()
        assert self._next_epoch == self._epochs
        return next(self._results)

    def close(self) -> None:
        """End everything that is running."""
        if self._results is not None:
            self._results.close()


def n_processes(store: Store, rows: int, epochs: int) -> int:
    """Number of processes among which the epochs of a training on `rows` images can be divided.

    1 without forks or free cores, and if predictions are embeddings or too large to keep those of all epochs.
    """
    has_no_core = worker_processes.is_within_job() or engines.cores() == 1
    if has_no_core or not engines.current().shares_memory or not worker_processes.can_fork():
        return 1
    if streaming.resolve_device(store.config.device) != "cpu" or store.config.distillation.feature_weight != 0:
        return 1
    return engines.cores() if rows * len(store.catalog.classes) * 4 * epochs <= MAX_BYTES else 1


def predict_epoch(
    store: Store, teacher: Teacher, open_networks: OpenNetworks, batch_schedule: BatchSchedule, epoch: int
) -> Targets:
    """The teacher's predictions for the student's training views in an epoch (Beyer et al. 2022)."""

    def batches(preprocessing: Preprocessing) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch, images in batch_schedule.loader(epoch, preprocessing):
            yield batch.rows, images

    matches_embeddings = store.config.distillation.feature_weight != 0
    return teachers.predict_views(
        store, teacher, len(batch_schedule.image_source), batches, open_networks, embeddings=matches_embeddings
    )


def _run(predict: Callable[[int], Targets], beside: Callable[[], Any], epoch: int | None) -> Any:
    """The predictions of an epoch, or the result of the job beside for None."""
    return beside() if epoch is None else predict(epoch)
