"""Standard output and error of the command line, robust to any encoding, closed streams and full disks."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import TextIO

from utils.core.display_text import printable_lines
from utils.core.errors import UserError

STYLE = re.compile("(\x1b\\[[012]m)")
"""Escape sequences of bold, faint and plain text, which tables on a terminal use and which are harmless in names."""


def prepare_streams() -> None:
    """Make the standard streams accept any text, regardless of their encoding; closed streams discard it.

    A descriptor that stayed closed would be reused for the next opened file, which would then receive printed text.
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
    """Write a text and a line end to standard output, with control characters except those of `STYLE` escaped.

    A closed pipe, as in `| head`, is not an error. Raises UserError if the text cannot be written.
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
    """Write a text and a line end to standard error, ignoring errors."""
    with suppress(OSError):
        print(printable_lines(text), file=sys.stderr, flush=True)


def flush_output() -> None:
    """Flush standard output, or discard its buffer if that fails."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_output()


def _shown(part: str) -> str:
    return part if STYLE.fullmatch(part) else printable_lines(part)


def _discard_output() -> None:
    """Redirect standard output to the null device, so that the interpreter's flush on exit does not fail too."""
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
