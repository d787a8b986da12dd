"""Runs independent jobs in this process or on the workers of a Ray cluster; results are in the order of the jobs.

A job is a function that a worker can import by name, arguments that all jobs share, and one item. On the CPU, its
result does not depend on where it runs, because its number of intra-op threads is part of the job.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from utils.core import worker_processes
from utils.core.errors import ConfigError, UserError
from utils.core.worker_processes import JobWarning, limited, log_warnings, run_recorded

logger = logging.getLogger("disease_pipeline")

RETRIES = 3  # for a job whose worker died
STORE_BYTES = 200_000_000  # shared memory of a cluster that is started here; larger objects are spilled to disk
PROGRESS_SECONDS = 1.0  # minimum time between two progress lines
INSTALL = "Install it: pip install 'ray>=2.40,<3'; or leave --engine ray out"

ThreadLimit = tuple[int | None, bool]
"""Number of intra-op threads of a job, and whether the limit applies to torch only."""


class Engine(Protocol):
    """Runs independent jobs."""

    name: str
    shares_memory: bool
    """Whether jobs in threads share the objects of this process, so that they can reuse results of earlier jobs."""

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        description: str | None = None,
        n_threads: int = 1,
        n_processes: int = 1,
        threads_per_job: int | None = None,
        are_long: bool = False,
        gpu: float = 0.0,
    ) -> Iterator[Any]:
        """`function(*shared, item)` for each item, in order; the caller must consume all results.

        Args:
            shared: arguments of every job; a job must not modify them.
            description: name of the jobs in progress messages.
            n_threads: number of jobs that run concurrently in threads of this process (a cluster ignores it).
            n_processes: maximum number of processes, used if they save time; their jobs use one thread (a cluster
                ignores it).
            threads_per_job: number of intra-op threads of a job; None: torch's number in this process.
            are_long: whether jobs are known to take seconds, so that processes start at once.
            gpu: fraction of a GPU that a job needs.

        An exception of a job is raised here. Raises UserError if workers die repeatedly.
        """

    def worker_device(self, device: str) -> str:
        """The name of a device of this machine in the process of a job."""

    def close(self) -> None:
        """Release the resources of the engine; called when the command ends."""


class Local:
    """Runs jobs in this process and in local child processes."""

    name = "local"
    shares_memory = True

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        description: str | None = None,
        n_threads: int = 1,
        n_processes: int = 1,
        threads_per_job: int | None = None,
        are_long: bool = False,
        gpu: float = 0.0,
        start_order: Sequence[int] | None = None,
    ) -> Generator[Any, None, None]:
        """`Engine.map`; with one thread and one process, a job starts after the previous result has been consumed.

        Processes take the items in the order of the indices `start_order`, by default in order.
        Within a job, no further processes are used, and threads have its share of the cores: all of them once no other
        job of its set runs.
        """
        if n_processes > 1 and not worker_processes.is_within_job():
            yield from worker_processes.run_jobs(
                function,
                list(items),
                shared,
                description=description or "jobs",
                n_processes=n_processes,
                are_long=are_long,
                start_order=start_order,
            )
            return
        if worker_processes.is_within_job():
            n_threads = max(1, min(n_threads, cores() // worker_processes.n_side_by_side()))
        with limited(threads_per_job):
            if n_threads == 1:
                for item in items:
                    yield function(*shared, item)
                return
            pool = ThreadPoolExecutor(n_threads)
            try:
                yield from pool.map(partial(function, *shared), items)
            finally:
                pool.shutdown(cancel_futures=True)

    def worker_device(self, device: str) -> str:
        """The same device."""
        return device

    def close(self) -> None:
        """Do nothing."""


class Ray:
    """Runs jobs on the workers of a Ray cluster: the one at `address`, or a new one for the duration of the command.

    Every machine needs this project, its packages and the workspace under the same paths. Moritz et al. 2018, "Ray: a
    distributed framework for emerging AI applications" (OSDI).
    """

    name = "ray"
    shares_memory = False

    def __init__(self, address: str | None = None) -> None:
        self.address = address
        self._task: Any = None

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        shared: Sequence[Any] = (),
        description: str | None = None,
        n_threads: int = 1,
        n_processes: int = 1,
        threads_per_job: int | None = None,
        are_long: bool = False,
        gpu: float = 0.0,
    ) -> Iterator[Any]:
        """`Engine.map`; a job whose worker died is run again, up to `RETRIES` times."""
        jobs = list(items)
        if not jobs:
            return
        task, ray = self._start(gpu)
        shared_references = [ray.put(value) for value in shared]
        threads = _torch_threads() if threads_per_job is None else threads_per_job
        largest_node = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        options = {"num_cpus": min(threads, largest_node), "num_gpus": gpu, "max_retries": RETRIES}
        limit = (threads, threads_per_job is None)
        references = [task.options(**options).remote(limit, function, job, *shared_references) for job in jobs]
        yield from _in_order(ray, references, description)

    def worker_device(self, device: str) -> str:
        """The device name in a worker, where the assigned GPU is the first one."""
        return "cuda:0" if device.startswith("cuda") else device

    def close(self) -> None:
        """Stop a cluster that was started here, or disconnect from an existing one."""
        if self._task is not None:
            import ray

            ray.shutdown()
            self._task = None

    def _start(self, gpu: float) -> tuple[Any, Any]:
        """The remote task and the module `ray`; the first call connects to the cluster or starts one."""
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which other programs starve
            import ray
        except ImportError as error:
            raise UserError(f"--engine ray: ray cannot be imported ({error}). {INSTALL}") from error
        if self._task is None:
            local_resources: dict[str, Any] = (
                {} if self.address else {"num_cpus": cores(), "object_store_memory": STORE_BYTES}
            )
            try:
                ray.init(
                    address=self.address or "local",
                    include_dashboard=None if self.address else False,
                    log_to_driver=False,  # warnings of workers are returned with their results
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": _worker_environment()},
                    **local_resources,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"--address {self.address}: cannot join a Ray cluster there ({reason}). Start one with `ray start "
                    "--head`, or omit --address to start one for this command"
                ) from error
            self._task = ray.remote(_run_job)
            resources = ray.cluster_resources()
            logger.info("ray: %d worker(s), %d GPU(s)", resources.get("CPU", 0), resources.get("GPU", 0))
        if gpu > ray.cluster_resources().get("GPU", 0):
            raise UserError("--engine ray: the cluster has no GPU. Use --device cpu, or join one that has: --address")
        return self._task, ray


_current: Engine = Local()


def current() -> Engine:
    """The engine of this command."""
    return _current


@contextmanager
def using(name: str, address: str | None = None) -> Iterator[None]:
    """Use an engine inside the block. Raises ConfigError for an address that the engine does not accept.

    Ray's output goes to stderr; stdout is reserved for the command.
    """
    global _current
    if address is not None and name != Ray.name:
        raise ConfigError(f"--address {address}: requires --engine ray, but the engine is {name}")
    previous, _current = _current, Ray(address) if name == Ray.name else Local()
    try:
        with redirect_stdout(sys.stderr) if name == Ray.name else nullcontext():
            try:
                yield
            finally:
                _current.close()
    finally:
        _current = previous


def _run_job(limit: ThreadLimit, function: Callable[..., Any], item: Any, *shared: Any) -> tuple[Any, list[JobWarning]]:
    """Run one job in a worker of the cluster; returns its result and the warnings that it logged."""
    threads, torch_only = limit
    if torch_only and threads is not None:
        import torch

        torch.set_num_threads(threads)
    with nullcontext() if torch_only else limited(threads):
        return run_recorded(function, *shared, item)


def _in_order(ray: Any, references: Sequence[Any], description: str | None) -> Iterator[Any]:
    """Results in the order of the references; logs progress as they arrive."""
    start = last_message = time.monotonic()
    pending = list(references)
    try:
        for reference in references:
            while reference in pending:
                _, pending = ray.wait(pending, num_returns=1)
                done, now = len(references) - len(pending), time.monotonic()
                if description and (now - last_message >= PROGRESS_SECONDS or not pending):
                    seconds_left = (now - start) / done * len(pending)
                    logger.info("[%d/%d] %s; about %.0f s left", done, len(references), description, seconds_left)
                    last_message = now
            result, warnings = _result(ray, reference, description or "a job")
            log_warnings(warnings)
            yield result
    finally:
        for reference in pending:  # an existing cluster would continue to compute results that are no longer needed
            ray.cancel(reference)


def _result(ray: Any, reference: Any, description: str) -> tuple[Any, list[JobWarning]]:
    try:
        result: tuple[Any, list[JobWarning]] = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{description}: its worker died {RETRIES + 1} times ({reason}). Each worker needs enough memory for one "
            "job: free some, run fewer at a time by a higher OMP_NUM_THREADS, or use --engine local"
        ) from error


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _worker_environment() -> dict[str, str]:
    """Environment variables for workers, to find this project and the workspace."""
    variables = {
        name: value for name, value in os.environ.items() if name.startswith("DBT_") or name == "BASE_BACK_DIR"
    }
    project = str(Path(__file__).resolve().parents[2])
    return variables | {"PYTHONPATH": os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])}


def cores() -> int:
    """Number of cores available to this process by CPU affinity and container quota, at least 1."""
    from joblib import cpu_count

    return int(cpu_count())
