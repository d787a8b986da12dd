"""How much of the processor other programs use while something is timed."""

from __future__ import annotations

import os
import time
from pathlib import Path

COUNTERS = Path("/proc/stat")
TOLERATED = 0.25  # cores that are short; the system itself uses a few hundredths of one


class OtherPrograms:
    """Counts from its construction on what other programs use."""

    def __init__(self) -> None:
        self._start, self._machine, self._own = time.monotonic(), _machine_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """How many cores they have used on average so far; None where the system does not tell."""
        machine, seconds = _machine_seconds(), time.monotonic() - self._start
        if machine is None or self._machine is None or seconds <= 0:
            return None
        return max(0.0, (machine - self._machine - (_own_seconds() - self._own)) / seconds)

    def in_the_way(self, threads: int) -> float | None:
        """`cores()` where they and this program's `threads` together need more cores than there are, else None."""
        others = self.cores()
        if others is None or others + threads <= (os.cpu_count() or 1) + TOLERATED:
            return None
        return round(others, 1)


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system


def _machine_seconds() -> float | None:
    """Seconds of work of all cores since the start of the machine, other guests of its host included."""
    try:
        user, nice, system, _, _, *interrupts = map(
            int, COUNTERS.read_text(encoding="ascii").split("\n")[0].split()[1:9]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
