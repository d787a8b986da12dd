"""Where independent jobs run: in this process, or on the workers of a Ray cluster; results in the order of the jobs.

A job is a function that a worker can import by name, what all jobs share, and an item of its own. It gives the same
bytes wherever it runs on the CPU, because it is told how many threads its sums may be split over.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from utils.core.errors import ConfigError, UserError

logger = logging.getLogger("disease_pipeline")

RETRIES = 3  # of a job whose worker died
STORE_BYTES = 200_000_000  # shared memory of a cluster that is started here; what does not fit goes to disk
WORTH_SECONDS = 10.0  # of work that is left, from which processes save time: to start them takes up to four
MOST_APART = 8  # processes, of about 400 MB each
TOLD_SECONDS = 1.0  # between two lines of progress
INSTALL = "Install it: pip install 'ray>=2.40,<3'; or leave --engine ray out"


Limit = tuple[int | None, bool]
"""How many threads a job's sums are split over, and whether torch alone is told so."""


class Engine(Protocol):
    """Runs jobs that do not know of each other."""

    name: str

    def each(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        what: str | None = None,
        side_by_side: int = 1,
        apart: int = 1,
        threads: int | None = None,
        gpu: float = 0.0,
    ) -> Iterator[Any]:
        """`function(*shared, item)` for each item, in their order; all results must be taken.

        `shared` is handed to every job and not to be written to. `what` names the jobs in lines of progress. In this
        process `side_by_side` of them run in threads, and up to `apart` in processes beside it, where that saves time;
        a cluster runs as many as it has room for. `threads` is how many a job's sums are split over (None: as many as
        torch takes here); `gpu` is the part of a GPU that it needs. What a job raises is raised here; UserError where
        workers die again and again.
        """

    def placed(self, device: str) -> str:
        """What a device of this machine is called where a job runs."""


class Local:
    """This process."""

    name = "local"

    def each(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        what: str | None = None,
        side_by_side: int = 1,
        apart: int = 1,
        threads: int | None = None,
        gpu: float = 0.0,
    ) -> Iterator[Any]:
        """As `Engine` says; one job starts when the result of the last has been taken, unless some run side by side."""
        if apart > 1:
            yield from _apart(function, list(items), shared, what or "jobs", apart, threads)
            return
        with _limited(threads):
            if side_by_side == 1:
                for item in items:
                    yield function(*shared, item)
                return
            from joblib import Parallel, delayed

            calls = [delayed(function)(*shared, item) for item in items]
            yield from Parallel(n_jobs=side_by_side, prefer="threads", return_as="generator")(calls)

    def placed(self, device: str) -> str:
        """The same."""
        return device

    def close(self) -> None:
        """Nothing is open."""


def _apart(
    function: Callable[..., Any], jobs: Sequence[Any], shared: Sequence[Any], what: str, most: int, threads: int | None
) -> Iterator[Any]:
    """Two jobs here, and the others in processes where they would take long here; where one dies, here."""
    done, seconds = 0, []

    def here(last: int) -> Iterator[Any]:
        nonlocal done
        for job in jobs[done:last]:
            start = time.monotonic()
            with _limited(threads):
                result = function(*shared, job)
            seconds.append(time.monotonic() - start)
            done += 1
            yield result

    yield from here(2)  # of which the first may have had something to import
    left = len(jobs) - done
    if left > 1 and min(seconds) * left > WORTH_SECONDS:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        calls = [delayed(_run)((threads, False), function, job, *shared) for job in jobs[done:]]
        try:
            for result, warnings in Parallel(min(most, left, MOST_APART), "loky", return_as="generator")(calls):
                _tell(warnings)
                done += 1
                yield result
        except TerminatedWorkerError:
            logger.warning("%s: a process beside this one died, perhaps for want of memory; going on here alone", what)
    yield from here(len(jobs))


class Ray:
    """The workers of a Ray cluster: the one at `address`, or one that is started here for as long as the command runs.

    Every machine needs this project, its packages and the workspace under the same paths. Moritz et al. 2018, "Ray: a
    distributed framework for emerging AI applications" (OSDI).
    """

    name = "ray"

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._task: Any = None

    def each(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        what: str | None = None,
        side_by_side: int = 1,
        apart: int = 1,
        threads: int | None = None,
        gpu: float = 0.0,
    ) -> Iterator[Any]:
        """As `Engine` says; a job whose worker died is run again, up to `RETRIES` times."""
        jobs = list(items)
        if not jobs:
            return
        task, ray = self._started(gpu)
        kept = [ray.put(value) for value in shared]
        wanted = _torch_threads() if threads is None else threads
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        options = {"num_cpus": min(wanted, largest), "num_gpus": gpu, "max_retries": RETRIES}
        limit = (wanted, threads is None)
        references = [task.options(**options).remote(limit, function, job, *kept) for job in jobs]
        yield from _in_order(ray, references, what)

    def placed(self, device: str) -> str:
        """A worker sees the GPU that it was given as its first."""
        return "cuda:0" if device.startswith("cuda") else device

    def close(self) -> None:
        """End the cluster that was started here, or leave the one that was joined."""
        if self._task is not None:
            import ray

            ray.shutdown()
            self._task = None

    def _started(self, gpu: float) -> tuple[Any, Any]:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: starved beside any other program
            import ray
        except ImportError as error:
            raise UserError(f"--engine ray: ray cannot be imported ({error}). {INSTALL}") from error
        if self._task is None:
            here = {} if self.address else {"num_cpus": cores(), "object_store_memory": STORE_BYTES}
            try:
                ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,  # what workers warn of comes with their results
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": _variables()},
                    **here,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"--address {self.address}: no Ray cluster can be joined there ({reason}). Start one: ray start "
                    "--head; or leave --address out, and one is started here"
                ) from error
            self._task = ray.remote(_run)
            found = ray.cluster_resources()
            logger.info("ray: %d worker(s), %d GPU(s)", found.get("CPU", 0), found.get("GPU", 0))
        if gpu > ray.cluster_resources().get("GPU", 0):
            raise UserError("--engine ray: the cluster has no GPU. Use --device cpu, or join one that has: --address")
        return self._task, ray


ENGINES: dict[str, type[Local] | type[Ray]] = {engine.name: engine for engine in (Local, Ray)}
_current: Local | Ray = Local()


def current() -> Local | Ray:
    """The engine of this command."""
    return _current


@contextmanager
def using(name: str, address: str | None = None) -> Iterator[None]:
    """Run what follows on an engine. Raises ConfigError for an address that no engine asks for.

    What Ray prints goes to stderr: stdout is the command's own.
    """
    global _current
    if address is not None and name != Ray.name:
        raise ConfigError(f"--address {address}: belongs to --engine ray; found --engine {name}")
    before, _current = _current, Ray(address) if name == Ray.name else Local()
    try:
        with redirect_stdout(sys.stderr) if name == Ray.name else nullcontext():
            try:
                yield
            finally:
                _current.close()
    finally:
        _current = before


def _run(
    limit: tuple[int | None, bool], function: Callable[..., Any], item: Any, *shared: Any
) -> tuple[Any, list[Any]]:
    """One job in another process; its result, and what it warned of as (level, text)."""
    threads, of_torch = limit
    heard = _Heard()
    logger.addHandler(heard)
    try:
        if of_torch:
            import torch

            torch.set_num_threads(threads)
        with nullcontext() if of_torch else _limited(threads):
            return function(*shared, item), heard.told
    finally:
        logger.removeHandler(heard)


class _Heard(logging.Handler):
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelno, record.getMessage()))


def _in_order(ray: Any, references: Sequence[Any], what: str | None) -> Iterator[Any]:
    """Results in the order of the references; says how many are there as they come."""
    start = told = time.monotonic()
    pending = list(references)
    try:
        for reference in references:
            while reference in pending:
                _, pending = ray.wait(pending, num_returns=1)
                done, now = len(references) - len(pending), time.monotonic()
                if what and (now - told >= TOLD_SECONDS or not pending):
                    left = (now - start) / done * len(pending)
                    logger.info("[%d/%d] %s; about %.0f s left", done, len(references), what, left)
                    told = now
            result, warnings = _result(ray, reference, what or "a job")
            _tell(warnings)
            yield result
    finally:
        for reference in pending:  # those of a joined cluster would go on with what nobody waits for
            ray.cancel(reference)


def _tell(warnings: Sequence[tuple[int, str]]) -> None:
    """Of what a job warned elsewhere."""
    for level, text in warnings:
        logger.log(level, "%s", text)


def _result(ray: Any, reference: Any, what: str) -> tuple[Any, list[Any]]:
    try:
        found: tuple[Any, list[Any]] = ray.get(reference)
        return found
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what}: its worker died {RETRIES + 1} times ({reason}). Expected memory enough for one job per worker: "
            "free some, let fewer run side by side by a higher OMP_NUM_THREADS, or use --engine local"
        ) from error


def _limited(threads: int | None) -> Any:
    if threads is None:
        return nullcontext()
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=threads)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _variables() -> dict[str, str]:
    """What a worker needs to find this project and the workspace as this process does."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("DBT_") or name == "BASE_BACK_DIR"}
    project = str(Path(__file__).resolve().parents[2])
    return kept | {"PYTHONPATH": os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])}


def cores() -> int:
    """Of this machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
