"""What a command hands back to the command line, which alone prints and chooses the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """The outcome of a command that came to its end."""

    text: str
    """For a person in a terminal."""
    document: dict[str, Any]
    """The same for a program: printed by `--json`."""
    failures: list[str] = field(default_factory=list)
    """Requested parts that failed or were left out, each with its reason; any makes the exit code 4."""
    next: str | None = None
    """The command to type next, such as `evaluate`; the command line adds the common options that were typed."""
