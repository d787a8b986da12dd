"""Text for display: users' text made printable, and formatted numbers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from utils.core.program_names import as_typed

NOT_MEASURED = "not measured"
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_HARMLESS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # used by some scripts


def printable(text: object) -> str:
    """The text on one line, with invisible and unencodable characters escaped: `\\n`, `\\xff`, `\\u202e`.

    Bytes of a file name that are not UTF-8, which Python represents by lone surrogates, become `\\xNN`.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def printable_lines(text: object) -> str:
    """The text with lines and tabs kept, and each line made `printable`; for all output to a terminal.

    Commands in it are shown as the user types them (`program_names.as_typed`).
    """
    lines = as_typed(str(text)).split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def _shown(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(letter) not in _INVISIBLE or letter in _HARMLESS:
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def format_number(value: float | None, digits: int = 4) -> str:
    """A number with a fixed number of digits, or `not measured`."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def format_percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, or `not measured`."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}%"


def format_p_value(value: float) -> str:
    """`p = 0.03`, `p = 0.012` below 0.02 and `p < 0.001`."""
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.{3 if value < 0.02 else 2}f}"


def format_interval(bounds: Sequence[float] | None, digits: int = 4) -> str:
    """`[low, high]`; empty without an interval."""
    return "" if bounds is None else f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def join_names(names: Sequence[str], most: int = 6) -> str:
    """`a, b and c`; of more than `most` names the last part is their number."""
    parts = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def first_names(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """`a, b, c`; of more than `most` names the others are counted: `a, b and 3 more`."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def format_count(count: int, word: str) -> str:
    """`1 image`, `2 images`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
