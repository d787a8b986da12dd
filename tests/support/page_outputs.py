"""Output that a page of docs/ shows, compared with what the program prints here: other numbers, names and paths."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
CUT = re.compile(r",? ?\.\.\.$")
NUMBER = r"(?<![A-Za-z_])[-+]?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?%?"


def blocks(page: str) -> list[list[str]]:
    """The blocks of a page that show output, line by line, without empty lines and those of dots alone."""
    found, lines, language = [], [], None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language, lines = (line[3:], []) if language is None else (None, lines)
            if language is None and lines:
                found.append(lines)
        elif language == "" and line.strip() not in ("", "..."):
            lines.append(line)
    return found


def form(line: str, names: Collection[str] = ()) -> str:
    """A line with `#` for each number, `/` for each path and `name` for each name and list of names."""
    line = re.sub(r"[^\s(,;]*/[^\s,;:)]*", "/", line.strip())
    for name in sorted(names, key=len, reverse=True):
        line = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", "a_name", line)
    line = re.sub(r"\b[A-Za-z]\w*_\w+\b", "name", line)
    line = re.sub(NUMBER, "#", line)
    line = re.sub(r"\s+", " ", line)
    for item in ("name # -> #", "# name", "name", "/"):
        line = re.sub(rf"{item}(?:(?:, | and ){item})+", item, line)
    return line


def not_printed(shown: Iterable[str], printed: str, names: Collection[str]) -> list[str]:
    """Lines of a page that have a form which no printed line has; `names` are those without an underscore."""
    forms = {form(line, names) for line in printed.splitlines()}
    missing = []
    for line in shown:
        cut = CUT.search(line) is not None
        wanted = form(CUT.sub("", line), names)
        if not (any(found.startswith(wanted) for found in forms) if cut else wanted in forms):
            missing.append(line)
    return missing
