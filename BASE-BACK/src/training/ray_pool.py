"""Units on the workers of a Ray cluster, in place of processes of this machine; see `training.pool`.

Every machine needs this folder, its packages and the workspace under the same paths. A worker that dies is replaced and
its unit run again, which goes on from the last saved epoch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

RETRIES = 3
STORE_BYTES = 100_000_000  # units hand over paths and figures, no arrays
INSTALL = "install it: pip install 'ray>=2.40,<3'; or leave --engine ray out"


class RayError(ValueError):
    """Ray is not installed, or no cluster answers; the text says what to do."""


class RayPool:
    """Submits units as `ProcessPoolExecutor` does; raises `RayError` where it cannot begin."""

    def __init__(self, jobs: int, threads: int | None, address: str | None) -> None:
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            import ray
        except ImportError as error:
            raise RayError(f"--engine ray: ray cannot be imported ({error}); {INSTALL}") from error
        self._ray, self._threads = ray, threads
        here: dict[str, Any] = {} if address else {"num_cpus": jobs, "object_store_memory": STORE_BYTES}
        variables = {name: value for name, value in os.environ.items() if name.startswith("DBT_")}
        variables.pop("DBT_PARENT", None)  # a process of this machine alone
        source = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": variables | {"PYTHONPATH": paths}},
                **here,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RayError(f"--address {address}: no Ray cluster can be joined there ({reason})") from error
        found = ray.cluster_resources()
        self.jobs = max(1, int(found.get("CPU", 1) if threads else found.get("GPU", 1)))
        gpus = 0 if threads else 1
        self._task = ray.remote(num_cpus=threads or 1, num_gpus=gpus, max_retries=RETRIES)(_work)
        self._running: list[Any] = []

    def submit(self, function: Callable[..., Any], unit: Any) -> Future:
        """What the function gives for the unit, once it is there."""
        reference = self._task.remote(self._threads, function, unit)
        self._running.append(reference)
        own: Future = Future()
        reference.future().add_done_callback(lambda done: self._hand_over(done, own))
        return own

    def _hand_over(self, done: Future, own: Future) -> None:
        error = done.exception()
        if error is None:
            own.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayTaskError):
            own.set_exception(error.cause)
        else:
            own.set_exception(RuntimeError(f"its worker died {RETRIES + 1} times (killed, or out of memory?)"))

    def shutdown(self, *, wait: bool = True) -> None:
        """End the cluster that was started here, or leave the one that was joined."""
        self._ray.shutdown()

    def kill(self) -> None:
        """As `shutdown`, after what is running has been told to stop."""
        _, left = self._ray.wait(self._running, num_returns=max(1, len(self._running)), timeout=0)
        for reference in left:
            self._ray.cancel(reference)
        self._ray.shutdown()


def _work(threads: int | None, work: Callable[..., Any], unit: Any) -> Any:
    import torch

    if threads:
        torch.set_num_threads(threads)
    return work(unit)
