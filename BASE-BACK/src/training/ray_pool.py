"""Units on the workers of a Ray cluster instead of local processes; see `training.pool`.

Every machine needs this folder, its packages and the workspace under the same paths. A worker that dies is replaced;
its unit runs again and resumes from the last saved epoch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils.threads import PASSIVE, REQUESTED, requested_threads

RETRIES = 3
STORE_BYTES = 100_000_000  # units exchange paths and numbers, no arrays
INSTALL = "install it: pip install 'ray>=2.40,<3'; or leave --engine ray out"


class RayError(ValueError):
    """Ray is not installed, or no cluster can be reached; the message names the remedy."""


class RayPool:
    """A pool of Ray workers with the interface of `ProcessPoolExecutor`; raises `RayError` if it cannot start."""

    def __init__(self, jobs: int, threads: int | None, address: str | None) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which other programs starve
            import ray
        except ImportError as error:
            raise RayError(f"--engine ray: ray cannot be imported ({error}); {INSTALL}") from error
        self._ray, self._threads = ray, threads
        local_resources: dict[str, Any] = {} if address else {"num_cpus": jobs, "object_store_memory": STORE_BYTES}
        variables = {name: value for name, value in os.environ.items() if name.startswith("DBT_")}
        variables.pop("DBT_PARENT", None)  # a process id is valid only on this machine
        variables |= PASSIVE | {REQUESTED: str(requested_threads() or 0)}  # Ray sets OMP_NUM_THREADS itself
        source = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": variables | {"PYTHONPATH": paths}},
                **local_resources,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RayError(f"--address {address}: cannot join a Ray cluster there ({reason})") from error
        resources = ray.cluster_resources()
        self.jobs = max(1, int(resources.get("CPU", 1) if threads else resources.get("GPU", 1)))
        gpus = 0 if threads else 1
        self._task = ray.remote(num_cpus=threads or 1, num_gpus=gpus, max_retries=RETRIES)(_work)
        self._waiting = ThreadPoolExecutor(self.jobs)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Schedule `function(*arguments)` on a worker and return its future."""
        return self._waiting.submit(self._result, function, *arguments)

    def _result(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._ray.get(self._task.remote(self._threads, function, *arguments))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise RuntimeError(f"its worker died {RETRIES + 1} times (killed, or out of memory?)") from error

    def shutdown(self, *, wait: bool = True) -> None:
        """Stop a cluster that was started here, or disconnect from an existing one, which stops the job's workers."""
        self._ray.shutdown()
        self._waiting.shutdown(wait=wait)

    def kill(self) -> None:
        """The same as `shutdown`, which stops the job's workers."""
        self.shutdown(wait=False)


def _work(threads: int | None, function: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    if threads:
        torch.set_num_threads(threads)
    return function(*arguments)
