"""Exceptions that end a command; every module may raise them.

    OrchestratorError
    ├── UserError                the user can correct it: what, where, remedy      exit 1
    ├── ConfigError              usage or configuration, every problem at once     exit 2
    ├── LeakageError             no out-of-sample rows or predictions exist        exit 3
    │   └── ContaminatedError    a result scored on rows that its parts were fitted on
    └── PartialFailure           finished, but a requested part failed or was left out   exit 4

Any other exception is a bug (exit 70). The codes are in `ensemble_orchestrator.EXIT_CODES`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

OUTPUT_HINT = "write elsewhere with --output DIR (or DBT_ENSEMBLE_DIR)"
_FREE = f"Free some space (`python ensemble_orchestrator.py clean` lists files that can be removed), or {OUTPUT_HINT}"
_ACCESS = f"Expected a writable folder; {OUTPUT_HINT}"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FREE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _ACCESS),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), f"Expected every parent of it to be a folder; {OUTPUT_HINT}"),
    errno.ENOENT: "It was removed meanwhile. Restore it, or run `python ensemble_orchestrator.py discover` again",
}


class OrchestratorError(Exception):
    """Base class of all errors that this project raises deliberately; the user sees their text."""


class UserError(OrchestratorError):
    """A problem that the user can correct: the message names the file, the value, the expected value and a remedy."""


class ConfigError(OrchestratorError):
    """Invalid usage or configuration; the message lists every problem with its configuration key."""


class LeakageError(OrchestratorError):
    """The request needs out-of-sample predictions that do not exist."""


class ContaminatedError(LeakageError):
    """A result was requested on rows that a part of it was fitted on."""


class PartialFailure(OrchestratorError):
    """The command finished, but requested parts failed or were omitted; the message names each."""


def did_you_mean(word: object, words: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'x'?` for the closest of `words`, or `otherwise`, for example a full stop, if none is similar."""
    matches = get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else otherwise


def nearest_first(word: object, words: Iterable[str], title: str = "Available", *, none: str = "none") -> str:
    """`; did you mean 'x'? Available: x, y`, or `; available: x, y` if no word is similar."""
    words = list(dict.fromkeys(words))
    suggestion = did_you_mean(word, words)
    return f"{suggestion or ';'} {title if suggestion else title.lower()}: {', '.join(words) or none}"


def cannot_write(path: Path, error: OSError) -> UserError:
    """The UserError for a `path` that cannot be written, with the reason and a remedy."""
    return UserError(f"{path}: cannot be written ({_reason(error)}). {_remedy(error)}")


def describe_os_error(error: OSError, folder: Path | None) -> str:
    """The message for an unhandled OSError: its file, or a file in `folder`, the reason and a remedy."""
    name = error.filename if error.filename is not None else f"a file in {folder}" if folder else "a file"
    return f"{name}: {_reason(error)}. {_remedy(error)}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _remedy(error: OSError) -> str:
    if error.errno is None:  # NumPy's error for a short write, without a cause
        return _FREE
    return _REMEDIES.get(error.errno, "Check the file and its disk, then run the command again")
