"""The teacher's passes and the control run beside the student in other processes, with equal bytes."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from student_runs import SMALL, store_of
from synthetic_votes import votes

from utils.core import engines, worker_processes
from utils.core.errors import UserError
from utils.distillation import epoch_predictions, teachers
from utils.distillation.epoch_predictions import EpochPredictions
from utils.distillation.open_networks import OpenNetworks
from utils.predictions import extraction
from utils.training.batch_schedule import NEVER, BatchSchedule
from utils.training.image_source import ImageSource

__all__ = ["votes"]
EPOCHS = 4
forks = pytest.mark.skipif(worker_processes.start_method() != "fork", reason="passes run ahead in forks only")


@pytest.fixture
def passes(votes, monkeypatch):
    """A function that opens the block of predictions on a number of cores."""
    store = store_of(votes, SMALL)
    teacher = teachers.resolve(store, "soft_voting", excluded_member="x")
    train = store.images("train")
    preprocessing = store.catalog.members["CustomConvNeXt"].image_preprocessing
    source = ImageSource(train, preprocessing, "full", image_cache=store.workspace.image_cache, threads=1)

    def opened(cores, beside=None):
        monkeypatch.setattr(engines, "cores", lambda: cores)
        schedule = BatchSchedule(source, 4, 5, np.full(len(source), NEVER), mix="both", is_shared=True)
        predict = partial(epoch_predictions.predict_epoch, store, teacher, OpenNetworks(), schedule)
        n_processes = epoch_predictions.n_processes(store, len(source), EPOCHS)
        if not extraction.use_one_thread(teachers.network_sizes(store, teacher)):
            n_processes = 1
        return closing(EpochPredictions(predict, EPOCHS, beside, n_processes=n_processes))

    return opened


def workers(expected):
    """The number of workers, once it is the expected one; a pool notices the end of its workers in another thread."""
    end = time.monotonic() + 5
    while True:
        count = sum(process.name.startswith("ForkProcess") for process in multiprocessing.active_children())
        if count == expected or time.monotonic() > end:
            return count
        time.sleep(0.01)


@forks
def test_passes_in_other_processes_have_the_bytes_of_passes_here(passes):
    with passes(1) as predict:
        expected = [predict(epoch).log_probabilities for epoch in range(EPOCHS)]
        assert workers(0) == 0
    with passes(2) as predict:
        found = [predict(epoch).log_probabilities for epoch in range(EPOCHS)]
        assert workers(1) == 1
    assert workers(0) == 0
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not np.array_equal(found[0], found[1])
    with passes(2) as predict:  # a training that resumes
        assert np.array_equal(predict(2).log_probabilities, expected[2])


@forks
def test_a_training_that_fails_leaves_no_worker(passes):
    def train():
        with passes(2) as predict:
            predict(0)
            assert workers(1) == 1
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        train()
    assert workers(0) == 0


@forks
@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(epoch_predictions, "MAX_BYTES", 10), (extraction, "HALF_BYTES", 1e-6)],
    ids=["memory", "networks of two threads"],
)
def test_passes_stay_here_where_they_would_take_memory_or_threads(passes, monkeypatch, module, name, value):
    monkeypatch.setenv("DBT_NUM_THREADS", "0")  # the number of threads is that of the table
    monkeypatch.setattr(module, name, value)
    with passes(2) as predict:
        predict(0)
        assert workers(0) == 0


@forks
@pytest.mark.parametrize("first", [0, 2, EPOCHS], ids=["from the first epoch", "resumed", "resumed after the last"])
def test_the_job_beside_runs_once_in_a_worker_where_one_is_started(passes, tmp_path, first):
    def beside():
        with (tmp_path / "calls").open("a") as calls:
            calls.write("called\n")
        return os.getpid()

    for cores in (1, 2):
        (tmp_path / "calls").unlink(missing_ok=True)
        with passes(cores, beside) as predict:
            for epoch in range(first, EPOCHS):
                predict(epoch)
            assert (predict.result_beside() == os.getpid()) == (cores == 1 or first == EPOCHS)
        assert (tmp_path / "calls").read_text() == "called\n"
    assert workers(0) == 0


@forks
def test_the_job_beside_starts_before_the_passes(passes, tmp_path):
    def beside():
        (tmp_path / "started").touch()

    with passes(2, beside) as predict:
        predict(0)
        assert (tmp_path / "started").exists()
        assert workers(1) == 1


@forks
def test_an_error_of_the_job_beside_is_raised_with_its_result(passes):
    def beside():
        raise UserError("the loss became nan")

    with passes(2, beside) as predict:
        for epoch in range(EPOCHS):
            predict(epoch)
        with pytest.raises(UserError, match="the loss became nan"):
            predict.result_beside()
    assert workers(0) == 0
