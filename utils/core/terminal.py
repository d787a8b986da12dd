"""Standard output and error of the command line: of any encoding, closed, full, or without a reader."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from utils.core.display_text import printable_lines
from utils.core.errors import UserError

STYLE = re.compile("(\x1b\\[[012]m)")
"""Bold, faint and plain text, which tables on a terminal use and which do no harm in a name."""


def prepare_streams() -> None:
    """Let the standard streams take every text, whatever their encoding; a stream that was closed discards it.

    A descriptor that stayed closed would be given to the next file that is opened, which printed text would then reach.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            _reopen(descriptor)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="replace", closefd=False))
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def write_output(text: str) -> None:
    """Write a text and a line end to standard output, with control characters but those of `STYLE` written out.

    A reader that has gone away, as in `| head`, is no error. Raises UserError where the text cannot be written.
    """
    try:
        print("".join(map(_shown, STYLE.split(text))), flush=True)
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        raise UserError(
            f"standard output: cannot be written ({error.strerror or error}); expected a terminal, a pipe or a file "
            "with free space. What the command has stored is complete; run it again with its output elsewhere"
        ) from error


def write_error(text: str) -> None:
    """Write a text and a line end to standard error, as far as it takes it."""
    with suppress(OSError):
        print(printable_lines(text), file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write what standard output still holds, or discard it where that fails."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _shown(part: str) -> str:
    return part if STYLE.fullmatch(part) else printable_lines(part)


def _discard_output() -> None:
    """Lead standard output to nowhere, so that the interpreter's own flush at its end does not fail as well."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # it is no file
        return
    _reopen(descriptor)


def _reopen(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    os.set_inheritable(descriptor, True)
