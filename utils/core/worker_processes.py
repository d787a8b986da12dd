"""Runs independent jobs in this process and in worker processes beside it.

On Linux without a GPU, workers are forked, as those of torch's `DataLoader` are: they start in milliseconds and share
the arguments of the jobs. Jobs use one thread, since a forked process has none of its parent's thread pools. Elsewhere
workers are new interpreters, which take seconds to start and receive a copy of the arguments.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from utils.core import subprocesses

logger = logging.getLogger("disease_pipeline")

FORK, SPAWN = "fork", "spawn"
START_SECONDS = {FORK: 0.2, SPAWN: 4.0}
"""Time to start a worker, by the way it starts."""
STOP_SECONDS = 5.0  # that a job may take to stop; then its worker is killed
MAX_PROCESSES = 8  # a worker that fits heads takes up to 400 MB

JobWarning = tuple[int, str]
"""Level and text of a message that a job logged in another process."""

_n_running: Any = None
"""Within a job: a shared integer, the number of jobs of its set that run now; the process that started them sets it"""
_run: Callable[[int], Any]
"""In a worker: runs the job with this index."""
_handlers_of_parent: list[logging.Handler] = []
"""In a forked worker: handlers that write into the files of its parent, which are neither used nor closed."""


def is_within_job() -> bool:
    """Return whether this is called by a job, so that processes have been started for the cores."""
    return _n_running is not None


def n_side_by_side() -> int:
    """Return the number of jobs that share the cores with the running one now, itself included; 1 outside jobs."""
    return 1 if _n_running is None else max(1, _n_running.value)


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[Any],
    shared: Sequence[Any],
    *,
    description: str,
    n_processes: int,
    are_long: bool,
    start_order: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Return `function(*shared, job)` for each job, in order, by this process and at most `n_processes - 1` workers.

    Workers start if the jobs `are_long`, or if the remaining jobs will take twice as long as the start of a worker.
    Processes take the jobs by `start_order`, indices of all jobs, by default in order. If a worker dies, its jobs run
    here. Every job uses one thread.
    """
    run, method, seconds = _Jobs(function, jobs, shared), start_method(), 0.0
    for done in range(len(jobs)):
        remaining = len(jobs) - done
        expected = seconds / max(1, done) * remaining
        if remaining > 1 and (are_long or expected > 2 * START_SECONDS[method]):
            n_workers = min(n_processes, remaining, MAX_PROCESSES) - 1
            waiting = [number for number in start_order or range(len(jobs)) if number >= done]
            yield from _run_side_by_side(run, waiting, n_workers, method, description)
            return
        start = time.monotonic()
        result = run(done)
        seconds += time.monotonic() - start
        yield result


def start_method() -> str:
    """Return how workers start: `fork` on Linux unless torch has a GPU, whose state no fork can use; else `spawn`."""
    torch = sys.modules.get("torch")
    return SPAWN if sys.platform != "linux" or (torch is not None and torch.cuda.is_available()) else FORK


def can_fork() -> bool:
    """Return whether workers share this process's memory as it is when they start."""
    return start_method() == FORK


def run_recorded(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[JobWarning]]:
    """Run one job in another process; return its result and the warnings that it logged."""
    recorder = _WarningRecorder()
    logger.addHandler(recorder)
    try:
        return function(*arguments), recorder.warnings
    finally:
        logger.removeHandler(recorder)


def log_warnings(job_warnings: Sequence[JobWarning]) -> None:
    """Log the warnings of a job that ran in another process."""
    for level, text in job_warnings:
        logger.log(level, "%s", text)


def limited(threads: int | None) -> AbstractContextManager[Any]:
    """Limit the threads of every loaded library within a block; None: no limit."""
    if threads is None:
        return nullcontext()
    return _loaded_libraries(len(sys.modules)).limit(limits=threads)


@lru_cache(maxsize=1)
def _loaded_libraries(_n_modules: int) -> Any:
    """The libraries with thread pools; searched again, which takes 3 to 15 ms, once further modules are imported."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@dataclass(frozen=True)
class _Jobs:
    """The jobs of one set; a call with an index runs one of them on one thread."""

    function: Callable[..., Any]
    jobs: Sequence[Any]
    shared: Sequence[Any]

    def __call__(self, number: int) -> Any:
        with limited(1):
            return self.function(*self.shared, self.jobs[number])


class _WarningRecorder(logging.Handler):
    """Collects warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[JobWarning] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append((record.levelno, record.getMessage()))


def _run_side_by_side(
    run: _Jobs, numbers: Sequence[int], n_workers: int, method: str, description: str
) -> Iterator[Any]:
    """Return the results of the jobs with these indices, sorted; a process that is free takes the next of `numbers`."""
    waiting = deque(numbers)
    futures: dict[int, Future[Any]] = {}
    results: dict[int, Any] = {}
    lock = threading.Lock()
    n_running = multiprocessing.get_context(method).RawValue("i", n_workers + 1)
    is_broken = takes_none = False

    def submit_next(finished: Future[Any] | None = None) -> None:
        # A pool that breaks or stops calls this while it holds the lock that submitting needs.
        if finished is not None and (finished.cancelled() or isinstance(finished.exception(), BrokenProcessPool)):
            return
        with lock:
            if not waiting:
                n_running.value -= 1
                return
            number = waiting.popleft()
            try:
                future = futures[number] = pool.submit(_run_in_worker, number)
            except RuntimeError:  # the pool is broken, so that the job runs here, or it has stopped
                waiting.appendleft(number)
                return
        future.add_done_callback(submit_next)

    def run_here(number: int) -> Any:
        with _beside(n_running):
            return run(number)

    with _pool(run, n_workers, method, n_running) as pool:
        with warnings.catch_warnings():
            # Python warns of forks of a process with other threads; none of them holds a lock that jobs need.
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
            for _ in range(n_workers):
                submit_next()
        for number in sorted(numbers):
            while number not in results:
                with lock:
                    future = futures.get(number)
                    taken = waiting.popleft() if waiting and not (future and future.done()) else None
                    if not waiting and taken is None and not takes_none:
                        n_running.value, takes_none = n_running.value - 1, True
                if taken is not None:
                    results[taken] = run_here(taken)
                    continue
                assert future is not None, "a job is waiting, submitted or done"
                try:
                    results[number], job_warnings = future.result()
                    log_warnings(job_warnings)
                except BrokenProcessPool:
                    if not is_broken:
                        logger.warning(
                            "%s: a worker process died, perhaps for lack of memory; the remaining jobs run in this "
                            "process",
                            description,
                        )
                    is_broken, n_running.value = True, 1
                    results[number] = run_here(number)
            yield results.pop(number)


@contextmanager
def _pool(run: _Jobs, n_workers: int, method: str, n_running: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of workers within a block; an exception that leaves the block ends jobs that are running."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        n_workers,
        multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(run, n_running, os.getpid()),  # a fork inherits them as they are
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        workers = set(multiprocessing.active_children()) - before
        for process in workers:
            process.terminate()  # so that its job removes the file that it is writing
        end = time.monotonic() + STOP_SECONDS
        for process in workers:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        raise
    finally:
        pool.shutdown()


def _start_worker(run: Callable[[int], Any], n_running: Any, parent: int) -> None:
    global _run, _n_running
    subprocesses.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, _stop)
    for each in (logger, logging.getLogger()):
        _handlers_of_parent.extend(each.handlers)
        each.handlers = []
    _run, _n_running = run, n_running


def _stop(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _run_in_worker(number: int) -> tuple[Any, list[JobWarning]]:
    return run_recorded(_run, number)


@contextmanager
def _beside(n_running: Any) -> Iterator[None]:
    """Let jobs that start within the block know how many run side by side."""
    global _n_running
    before, _n_running = _n_running, n_running
    try:
        yield
    finally:
        _n_running = before
