"""Text tables: aligned for a terminal, and as CSV, GitHub Flavored Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Container, Iterable, Sequence


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return CSV with a header line; None becomes an empty cell."""
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(header)
    table.writerows(rows)
    return stream.getvalue()


def aligned_lines(rows: Sequence[Sequence[str]], *, right: Container[int] = ()) -> list[str]:
    """Return one line per row, cells padded to the width of their column; the columns `right` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are already escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex_table(header: Sequence[str], rows: Iterable[Sequence[str]], columns: str) -> str:
    """Return a `tabular` with booktabs rules, of cells that are already escaped; `columns` are its column types."""
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *(" & ".join(line) + r" \\" for line in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def escape_markdown(text: str) -> str:
    """Escape the characters that Markdown interprets."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def escape_latex(text: str) -> str:
    """Escape the characters that LaTeX interprets."""
    signs = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    signs |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(signs.get(letter, letter) for letter in text).replace("\n", " ")
