"""Units side by side: as many processes as cores on the CPU, one on a GPU, each unit as soon as it may start."""

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
    """Where units run, several at a time."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """The future result of `function(*arguments)`."""

    def shutdown(self, *, wait: bool = True) -> None:
        """Nothing is running any more, or may go on to its end."""

    def kill(self) -> None:
        """End what is running at once: what it was writing lies under temporary names."""


def _start_worker(parent: int, threads: int | None) -> None:
    """Prepare a worker: its number of threads, and its end when the parent is killed."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    if threads:
        torch.set_num_threads(threads)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process soon after the one that started it: nobody is left to take its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
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
    new_pool: Callable[[], Pool] | None = None,
) -> None:
    """Run units in `jobs` processes, each after those it names; the callbacks run in this process, one at a time.

    `new_pool` makes what takes the place of processes of this machine.

    A unit fails by an exception or by the death of its process; whatever waits for it then fails with it, the rest
    goes on. Units that wait for something outside `units` start at once.
    """
    waiting = {unit.name: unit for unit in units}
    done: set[str] = set()
    lost: set[str] = set()
    running: dict[Future[Any], Unit] = {}
    make: Callable[[], Pool] = new_pool or (lambda: _new_pool(jobs, threads))
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
                except Exception as error:  # whatever a network raises fails this unit alone
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
    """Processes of this machine."""

    def kill(self) -> None:
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(wait=False, cancel_futures=True)


def _new_pool(jobs: int, threads: int | None) -> Pool:
    context = multiprocessing.get_context("spawn")
    return _Processes(jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), threads))
