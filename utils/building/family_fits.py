"""Independent fits of one command, side by side in processes if they take seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from utils.core import engines
from utils.core.array_archives import physical_memory
from utils.core.errors import UserError
from utils.core.worker_processes import MAX_PROCESSES
from utils.numeric.setting_paths import FIT_THREADS

LONG_FIT = 20_000
"""Number of logits from which a nested fit of a learner takes seconds: 3 to 8 s at 80,000."""
BYTES_PER_LOGIT = 80  # at the peak of a fit: less than nine double arrays of the logits' shape were measured


def fit_each(
    function: Callable[..., Any],
    items: Iterable[Any],
    *,
    shared: Sequence[Any],
    description: str,
    n_logits: int,
    are_nested: bool,
    n_bytes: float = 0.0,
) -> Iterator[Any | UserError]:
    """Return `function(*shared, item)` for each item, in order, or the UserError that it raised.

    Numerical libraries use one thread, so that results depend neither on the number of cores nor on which fits run
    together; a function that uses torch limits it likewise. On a Ray cluster, the fits run in this process one after
    another, since their parts are the jobs of the cluster.

    Args:
        n_logits: size of the logits (M, N, C) that each item is fitted on. Fits that run at a time take at most half of
            the machine's memory.
        are_nested: whether some of the fits are nested cross-validations, which take seconds with many logits.
        n_bytes: memory of the largest fit, where it is more than the logits suggest.
    """
    most = int(physical_memory() / 2 / max(BYTES_PER_LOGIT * n_logits, n_bytes))
    is_long = are_nested and n_logits >= LONG_FIT
    return run_each(function, items, shared=shared, description=description, are_long=is_long, most=most)


def run_each(
    function: Callable[..., Any],
    items: Iterable[Any],
    *,
    shared: Sequence[Any],
    description: str,
    are_long: bool,
    most: int = MAX_PROCESSES,
) -> Iterator[Any | UserError]:
    """Return `function(*shared, item)` as `fit_each` does, at most `most` at a time; `are_long` is that of engines."""
    is_cluster = not engines.current().shares_memory
    return engines.Local().map(
        result_or_error,
        items,
        shared=(function, shared),
        description=description,
        n_processes=1 if is_cluster else max(1, min(engines.cores(), most)),
        threads_per_job=FIT_THREADS,
        are_long=are_long,
    )


def result_or_error(function: Callable[..., Any], shared: Sequence[Any], item: Any) -> Any | UserError:
    """Return `function(*shared, item)`, or the UserError that it raised."""
    try:
        return function(*shared, item)
    except UserError as error:
        return error
