"""Run units in parallel: one process per core on the CPU, one process on a GPU, respecting their dependencies."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from training.units import Outcome, Unit

PARENT_CHECK_SECONDS = 1.0


class Pool(Protocol):
    """An executor of units."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Schedule `function(*arguments)` and return its future."""

    def shutdown(self, *, wait: bool = True) -> None:
        """Release the workers after everything submitted has finished."""

    def kill(self) -> None:
        """Terminate the workers at once; files being written still have temporary names."""


def _start_worker(threads: int | None) -> None:
    """Prepare a worker: set its number of threads and let it exit when the process that created the pool is killed."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    if threads:
        torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None
    _exit_after(parent.join)


def end_with(parent: int) -> None:
    """Exit this process soon after its parent process, since nothing would receive its result."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)

    _exit_after(wait_for_parent)


def _exit_after(wait_for_end: Callable[[], object]) -> None:
    """Exit this process when `wait_for_end`, called in a thread, returns."""

    def watch() -> None:
        wait_for_end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(unit: Unit) -> tuple[Outcome, float]:
    from training.work import run_unit

    start = time.monotonic()
    return run_unit(unit), time.monotonic() - start


def run_units(
    units: Sequence[Unit],
    *,
    jobs: int,
    threads: int | None,
    finished: Callable[[Unit, Outcome, float], None],
    failed: Callable[[Unit, str], None],
    start_method: str = "spawn",
    new_pool: Callable[[], Pool] | None = None,
) -> None:
    """Run units in `jobs` processes, each after those it depends on; callbacks run in this process, one at a time.

    `start_method` is that of `multiprocessing`; `new_pool` creates a pool to use instead of local processes.

    A unit fails with an exception or with the death of its process; units that depend on it fail with it, the others
    continue. Dependencies outside `units` are ignored.
    """
    waiting = {unit.name: unit for unit in units}
    done: set[str] = set()
    lost: set[str] = set()
    running: dict[Future[Any], Unit] = {}
    make: Callable[[], Pool] = new_pool or (lambda: _new_pool(jobs, threads, start_method))
    pool = make()
    try:
        while waiting or running:
            for unit in [u for u in waiting.values() if lost & set(u.after)]:
                del waiting[unit.name]
                lost.add(unit.name)
                failed(unit, f"not run, since {', '.join(sorted(lost & set(unit.after)))} failed")
            ready = [u for u in waiting.values() if not (set(u.after) - done) & (waiting.keys() | _names(running))]
            for unit in ready[: jobs - len(running)]:
                running[pool.submit(_work, waiting.pop(unit.name))] = unit
            if not running:
                continue
            completed, _ = wait(running, return_when=FIRST_COMPLETED)
            broken = False
            for future in completed:
                unit = running.pop(future)
                try:
                    outcome, seconds = future.result()
                except BrokenProcessPool:
                    broken = True
                    lost.add(unit.name)
                    failed(unit, "its process died (killed, or out of memory?)")
                except Exception as error:  # any exception fails only this unit and its dependents
                    lost.add(unit.name)
                    failed(unit, f"{type(error).__name__}: {error}")
                else:
                    done.add(unit.name)
                    finished(unit, outcome, seconds)
            if broken:
                pool.shutdown(wait=False)
                pool = make()
        pool.shutdown()
    except BaseException:
        pool.kill()
        raise


def _names(running: dict[Future[Any], Unit]) -> set[str]:
    return {unit.name for unit in running.values()}


class _Processes(ProcessPoolExecutor):
    """Local processes."""

    def kill(self) -> None:
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(wait=False, cancel_futures=True)


def _new_pool(jobs: int, threads: int | None, start_method: str) -> Pool:
    context = multiprocessing.get_context(start_method)
    return _Processes(jobs, mp_context=context, initializer=_start_worker, initargs=(threads,))
