"""CPU usage of other programs during timings."""

from __future__ import annotations

import os
import time
from pathlib import Path

COUNTERS = Path("/proc/stat")
TOLERATED = 0.25  # tolerated shortage of cores; the system itself uses a few hundredths of a core


class OtherPrograms:
    """Measures the CPU usage of other programs since its construction."""

    def __init__(self) -> None:
        self._start, self._machine, self._own = time.monotonic(), _machine_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """Average number of cores that they have used so far; None if unknown."""
        machine, seconds = _machine_seconds(), time.monotonic() - self._start
        if machine is None or self._machine is None or seconds <= 0:
            return None
        return max(0.0, (machine - self._machine - (_own_seconds() - self._own)) / seconds)

    def in_the_way(self, threads: int) -> float | None:
        """`cores()` if they and this program's `threads` together need more cores than available, else None."""
        others = self.cores()
        if others is None or others + threads <= (os.cpu_count() or 1) + TOLERATED:
            return None
        return round(others, 1)


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system


def _machine_seconds() -> float | None:
    """Busy seconds of all cores since the start of the machine, including other guests of its host."""
    try:
        user, nice, system, _, _, *interrupts = map(
            int, COUNTERS.read_text(encoding="ascii").split("\n")[0].split()[1:9]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
