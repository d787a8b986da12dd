"""What a command returns to the command line, which prints it and chooses the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """The outcome of a command that finished."""

    text: str
    """Printed to the terminal."""
    document: dict[str, Any]
    """The same content as JSON, printed with `--json`."""
    failures: list[str] = field(default_factory=list)
    """Requested parts that failed or were left out, each with the reason; any of them makes the exit code 4."""
    next: str | None = None
    """The suggested next command, such as `evaluate`; the command line adds the common options of this one."""
