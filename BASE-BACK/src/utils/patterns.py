"""Regular expressions of the configuration, matched in a separate process, since some never end: `^((a+)+)$`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 5.0
NAMES_PER_SECOND = 20_000  # a hundredth of the throughput of a simple expression
_PROGRAM = """
import json, re, resource, sys
pattern, names, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # also where nobody is left to end it
search = re.compile(pattern).search
json.dump([match[1] if (match := search(name)) else None for name in names], sys.stdout)
"""


class PatternError(ValueError):
    """A regular expression takes too long or cannot be matched."""


def captured(pattern: str, names: Sequence[str]) -> list[str | None]:
    """The text that the only group of a regular expression captures in each name; None where it does not match.

    Raises PatternError if matching takes longer than NAMES_PER_SECOND allows.
    """
    seconds = SECONDS + len(names) / NAMES_PER_SECOND
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=json.dumps([pattern, list(names), int(seconds) + 1]),
            capture_output=True,
            text=True,
            encoding="ascii",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError(
            f"the regular expression {pattern!r} does not end within {seconds:.0f} s on {len(names)} file names; "
            "expected one without repetitions inside repetitions, such as '^(patient[0-9]+)_'"
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise PatternError(f"the regular expression {pattern!r} cannot be searched for: {reason}")
    captures: list[str | None] = json.loads(done.stdout)
    return captures
