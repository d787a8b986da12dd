"""The ranking as tables: for a terminal, and as CSV, Markdown and LaTeX for papers."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

Ranking = Mapping[str, Any]
METRICS = {"accuracy": "accuracy", "f1_macro": "F1 macro", "log_loss": "log-loss", "ece": "ECE"}
"""Columns with an interval, and their headings."""
MARKS = ("contaminated", "optimistic", "recommended")
BOLD, FAINT, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """Whether bold and faint letters may be written to it (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def marks(row: Mapping[str, Any], ranking: Ranking) -> list[str]:
    """Which of contaminated, optimistic and recommended a row of the ranking is."""
    chosen = ranking["recommended"]["name"] == row["name"]
    return [mark for mark in MARKS if row.get(mark) or (mark == "recommended" and chosen)]


def text(ranking: Ranking, *, styled: bool = False) -> str:
    """An aligned table with 95 % intervals, marks, and what is recommended by which evidence.

    `styled` makes the recommended row bold and contaminated ones faint; without it this is plain text.
    """
    header = ["rank", "name", "kind", *(f"{title} [95 %]" for title in METRICS.values()), "p", ""]
    lines = [header]
    for row in ranking["rows"]:
        against = row["vs_best_single"]
        lines.append(
            [
                "-" if row["rank"] is None else str(row["rank"]),
                row["name"],
                row["kind"],
                *(_with_interval(row, metric) for metric in METRICS),
                "" if against is None or against["mcnemar_p_holm"] is None else f"{against['mcnemar_p_holm']:.3f}",
                ", ".join(marks(row, ranking)),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = [
        "  ".join(
            cell.rjust(width) if column == 0 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if styled:
        styles = ["", *(_style(row, ranking) for row in ranking["rows"])]
        aligned = [f"{style}{line}{PLAIN}" if style else line for style, line in zip(styles, aligned, strict=True)]
    single = ranking["peers"]["best_single"]
    notes = [f"p: McNemar's exact test against {single}, the best single member, Holm-corrected"] if single else []
    return "\n".join(
        [
            f"{ranking['split']} split, {ranking['n']} samples, ordered by {ranking['order'][0]}",
            *aligned,
            *notes,
            recommendation(ranking),
        ]
    )


def recommendation(ranking: Ranking) -> str:
    """Which one to use and why, in one line."""
    chosen = ranking["recommended"]
    evidence = chosen["evidence"]
    low, high = evidence["log_loss_ci95"]
    return (
        f"recommended: {chosen['name']} ({chosen['reason']}; {evidence['n']} honest rows, {evidence['rows']}: log-loss "
        f"{evidence['log_loss']:.4f} [{low:.4f}, {high:.4f}], accuracy {evidence['accuracy']:.4f})"
    )


def _style(row: Mapping[str, Any], ranking: Ranking) -> str:
    found = marks(row, ranking)
    return FAINT if "contaminated" in found else BOLD if "recommended" in found else ""


def _with_interval(row: Mapping[str, Any], metric: str) -> str:
    around = (row["ci95"] or {}).get(metric)
    return f"{row[metric]:.4f}" + (f" [{around[0]:.4f}, {around[1]:.4f}]" if around else "")


def as_csv(ranking: Ranking) -> str:
    """One line per row of the ranking, numbers in full."""
    bounds = [f"{metric}_{end}" for metric in METRICS for end in ("", "low", "high")]
    columns = ["rank", "name", "kind", *(bound.rstrip("_") for bound in bounds)]
    columns += ["delta_accuracy", "mcnemar_p", "mcnemar_p_holm", *MARKS]
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(columns)
    for row in ranking["rows"]:
        values = []
        for metric in METRICS:
            values += [row[metric], *((row["ci95"] or {}).get(metric) or ("", ""))]
        against = row["vs_best_single"] or {}
        compared = [against.get(key) for key in ("delta_accuracy", "mcnemar_p", "mcnemar_p_holm")]
        flags = [str(mark in marks(row, ranking)).lower() for mark in MARKS]
        table.writerow([row["rank"], row["name"], row["kind"], *values, *compared, *flags])
    return stream.getvalue()


def as_markdown(ranking: Ranking) -> str:
    """A table in GitHub's Markdown."""
    header, *body = _cells(ranking, _plain_markdown, "{} [{}, {}]")
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_latex(ranking: Ranking) -> str:
    """A `tabular` with booktabs rules, to be read in by `\\input`."""
    header, *body = _cells(ranking, _plain_latex, "{} {{\\scriptsize [{}, {}]}}")
    rows = [" & ".join(line) + r" \\" for line in body]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            rf"\begin{{tabular}}{{rl{'l' * (len(header) - 2)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


WRITERS: dict[str, Callable[[Ranking], str]] = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
"""Suffix of the file -> what makes its text."""


def _cells(ranking: Ranking, escaped: Callable[[str], str], interval: str) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [["rank", "name", *METRICS.values(), "p"]]
    for row in ranking["rows"]:
        values = []
        for metric in METRICS:
            around = (row["ci95"] or {}).get(metric)
            shown = [f"{value:.4f}" for value in (row[metric], *(around or ()))]
            values.append(interval.format(*shown) if around else shown[0])
        against = row["vs_best_single"]
        p = "" if against is None or against["mcnemar_p_holm"] is None else f"{against['mcnemar_p_holm']:.3f}"
        said = marks(row, ranking)
        name = escaped(row["name"]) + (escaped(f" ({', '.join(said)})") if said else "")
        lines.append(["--" if row["rank"] is None else str(row["rank"]), name, *values, p])
    return lines


def _plain_markdown(words: str) -> str:
    for sign in "\\`*_|<>[]":
        words = words.replace(sign, f"\\{sign}")
    return words.replace("\n", " ")


def _plain_latex(words: str) -> str:
    signs = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(signs.get(letter, letter) for letter in words).replace("\n", " ")
