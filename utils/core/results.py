"""The return value of a command, which the command line prints and maps to an exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """The outcome of a command that finished."""

    text: str
    """Text for the terminal."""
    document: dict[str, Any]
    """The same content as JSON, printed with `--json`."""
    failures: list[str] = field(default_factory=list)
    """Requested parts that failed or were omitted, each with the reason; if there are any, the exit code is 4."""
    next: str | None = None
    """The suggested next command, such as `evaluate`; the command line adds the common options of this one."""
