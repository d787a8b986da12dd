"""Memory and time of a nested fit of a learner, estimated from its size: with thousands of classes some never end.

The estimates are rough; they serve to refuse a fit before it takes the machine's memory or several days.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from utils.core.array_archives import physical_memory

MEMORY_SHARE = 0.8  # of the machine's memory that a fit may take
MAX_HOURS = 24.0  # for all fits of one learner


@dataclass(frozen=True)
class FitDemand:
    """What one fit of a learner under all of its settings takes."""

    n_bytes: float
    """At its peak"""
    seconds: float
    """Of one core"""

    def max_at_a_time(self, n_side_by_side: int = 1) -> int:
        """Return how many fits have room in the memory at a time, at least 1, for each of `n_side_by_side` learners."""
        return max(1, int(MEMORY_SHARE * physical_memory() / n_side_by_side / max(self.n_bytes, 1.0)))

    def refusal(self, n_fits: int, cores: int) -> str | None:
        """Return why `n_fits` fits cannot run on this machine with so many cores; None if they can."""
        n_at_a_time = min(n_fits, cores, self.max_at_a_time())
        memory, hours = physical_memory(), n_fits * self.seconds / n_at_a_time / 3600
        if self.n_bytes > MEMORY_SHARE * memory:
            return f"a fit needs about {self.n_bytes / 1e9:.0f} GB of memory; this machine has {memory / 1e9:.0f} GB"
        if hours > MAX_HOURS:
            return (
                f"its {n_fits} fits, {n_at_a_time} at a time, need about {hours:,.0f} hours; the limit is "
                f"{MAX_HOURS:.0f}"
            )
        return None


@runtime_checkable
class EstimatesDemand(Protocol):
    """A learner that knows what its fits take."""

    def demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return what one fit on logits (M, N, C) of this size takes."""
