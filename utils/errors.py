"""The ways in which a command may end, as exceptions; every room may raise them.

    OrchestratorError
    ├── UserError                the user can mend it: what, where, remedy         exit 1
    ├── ConfigError              usage or configuration, every problem at once     exit 2
    ├── HonestyError             an honest answer is impossible                    exit 3
    │   ├── ContaminatedError    a result scored on rows its parts were fitted on
    │   └── NoHonestDataError    no row is left that the parts have not seen
    └── PartialFailure           finished, but a requested part failed or was left out   exit 4

Anything else that reaches the top is a bug (exit 70). The codes stand in `ensemble_orchestrator.EXIT_CODES`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OrchestratorError(Exception):
    """Base of every error that this project raises on purpose; its text is what the user reads."""


class UserError(OrchestratorError):
    """Something the user can mend: names the file, the value found, what was expected and the next command."""


class ConfigError(OrchestratorError):
    """Usage or configuration: lists every problem with its dotted place."""


class HonestyError(OrchestratorError):
    """The request has no honest answer."""


class ContaminatedError(HonestyError):
    """A result was asked for on rows that a part of it was fitted on."""


class NoHonestDataError(HonestyError):
    """No row is left whose predictions come from networks that have not seen it."""


class PartialFailure(OrchestratorError):
    """The command finished, but a requested part failed or was left out; the text names each."""


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `words`, or nothing when none is near."""
    near = get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
