"""The ranking as tables: text for a terminal, CSV, Markdown and LaTeX."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from utils.evaluation.table_formats import (
    aligned_lines,
    csv_text,
    escape_latex,
    escape_markdown,
    latex_table,
    markdown_table,
)
from utils.predictions import training_data

Ranking = Mapping[str, Any]
METRICS = {"accuracy": "accuracy", "f1_macro": "F1 macro", "log_loss": "log-loss", "ece": "ECE"}
"""{default column: heading}; each has an interval"""
HEADINGS = METRICS | {
    "balanced_accuracy": "balanced accuracy",
    "matthews_corrcoef": "MCC",
    "cohen_kappa": "kappa",
    "cohen_kappa_linear": "linear kappa",
    "cohen_kappa_quadratic": "quadratic kappa",
    "roc_auc_ovr_macro": "AUC macro",
    "average_precision_macro": "AP macro",
    "top_3_accuracy": "top-3 accuracy",
    "top_5_accuracy": "top-5 accuracy",
    "precision_macro": "precision macro",
    "recall_macro": "recall macro",
    "f1_weighted": "F1 weighted",
    "precision_weighted": "precision weighted",
    "recall_weighted": "recall weighted",
    "brier": "Brier",
    "ece_adaptive": "adaptive ECE",
    "mce": "MCE",
    "calibrated_log_loss": "calibrated log-loss",
}
"""{key of `metrics.json` that may be a column: heading}"""
MARKS = {
    "contaminated": "contaminated",
    "unknown_training_data": training_data.MARK,
    "optimistic": "optimistic",
    "recommended": "recommended",
    "recommended_fast": "recommended_fast",
}
"""{key of a row: mark}, in the order of the tables"""
CHOICES = ("recommended", "recommended_fast")
COMPARED = (
    *("delta_accuracy", "mcnemar_p", "mcnemar_p_holm", "test", "p_value", "p_value_holm"),
    *("delta_roc_auc", "delong_p", "delong_p_holm"),
)
"""Columns of the CSV file on the comparison with the best single member"""
NARROWEST, SHORTEST = 100, 12
"""Terminal columns that every table fits, and minimum characters of a shortened name"""
BOLD, FAINT, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream may get bold and faint text (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shown_metrics(ranking: Ranking) -> dict[str, str]:
    """Return {key: heading} of the metrics of a ranking's tables: those of `evaluate --metrics`, else `METRICS`."""
    keys = (ranking.get("options") or {}).get("metrics") or METRICS
    return {key: HEADINGS.get(key, key) for key in keys}


def marks(row: Mapping[str, Any], ranking: Ranking) -> list[str]:
    """Return the marks of `MARKS` that apply to a row of the ranking."""
    named = [key for key in CHOICES if (ranking.get(key) or {}).get("name") == row["name"]]
    return [mark for key, mark in MARKS.items() if row.get(key) or key in named]


def as_text(ranking: Ranking, *, styled: bool = False, columns: int | None = None) -> str:
    """Return an aligned table with 95% intervals and marks, followed by the recommendation.

    With `styled`, the recommended row is bold and contaminated rows are faint. If the table is wider than `columns`,
    only accuracy, or else the first metric, has an interval, and long names are shortened; with the default metrics it
    fits 100 columns.
    """
    metrics = shown_metrics(ranking)
    lines = _table(ranking, dict.fromkeys(metrics, True))
    if columns is not None and max(map(len, aligned_lines(lines, right=(0,)))) > columns:
        first = "accuracy" if "accuracy" in metrics else next(iter(metrics))
        lines = _narrow(_table(ranking, {metric: metric == first for metric in metrics}), max(columns, NARROWEST))
    aligned = aligned_lines(lines, right=(0,))
    if styled:
        styles = ["", *(_style(row, ranking) for row in ranking["rows"])]
        aligned = [f"{style}{line}{PLAIN}" if style else line for style, line in zip(styles, aligned, strict=True)]
    single = ranking["peers"]["best_single"]
    notes = (
        [f"p: {_test(ranking)} of the difference to {single}, the best single member, Holm-corrected"] if single else []
    )
    return "\n".join(
        [
            f"{ranking['split']} split, {ranking['n']} samples, ordered by {ranking['order'][0]}",
            *aligned,
            *notes,
            recommendation(ranking),
        ]
    )


def _table(ranking: Ranking, with_interval: Mapping[str, bool]) -> list[list[str]]:
    """Return the header and a line of cells for each row."""
    headings = shown_metrics(ranking)
    titles = [f"{headings[metric]} [95%]" if wide else headings[metric] for metric, wide in with_interval.items()]
    lines = [["rank", "name", "kind", *titles, "p", ""]]
    for row in ranking["rows"]:
        lines.append(
            [
                "-" if row["rank"] is None else str(row["rank"]),
                row["name"],
                row["kind"],
                *(
                    _with_interval(row, metric) if wide else _value(row, metric)
                    for metric, wide in with_interval.items()
                ),
                _p_value(row["vs_best_single"]),
                ", ".join(marks(row, ranking)),
            ]
        )
    return lines


def _narrow(lines: list[list[str]], columns: int) -> list[list[str]]:
    """Return the cells without `kind`, with names and marks shortened as far as necessary to fit the columns."""
    lines = [[line[0], line[1], *line[3:]] for line in lines]
    for cell in (1, -1):  # the name, then the marks
        excess = max(map(len, aligned_lines(lines, right=(0,)))) - columns
        if excess > 0:
            width = max(SHORTEST, max(len(line[cell]) for line in lines) - excess)
            for line in lines:
                if len(line[cell]) > width:
                    line[cell] = f"{line[cell][: width - 1]}\N{HORIZONTAL ELLIPSIS}"
    return lines


def recommendation(ranking: Ranking) -> str:
    """Return one line each on the recommended model and the recommended fast one, with their evidence and cost."""
    recommended, fast = ranking["recommended"], ranking.get("recommended_fast")
    evidence = recommended["evidence"]
    rule = evidence.get("after_selection")  # not in rankings of earlier versions
    loss = f"log-loss {_loss(evidence)}"
    scores = loss if rule is None else f"log-loss after selection {_loss(rule)}, its own {_loss(evidence)}"
    lines = [
        f"recommended: {recommended['name']} ({recommended['reason']}; {evidence['n']} out-of-sample rows, "
        f"{evidence['rows']}: {scores}, accuracy {evidence['accuracy']:.4f}{_cost(recommended)})"
    ]
    if recommended.get("note"):
        lines.append(f"  {recommended['note']}")
    if fast and fast["name"]:
        near = fast["evidence"]
        lines.append(
            f"recommended_fast: {fast['name']} ({fast['reason']}: log-loss {_loss(near)}, "
            f"accuracy {near['accuracy']:.4f}{_cost(fast)})"
        )
    elif fast:
        lines.append(f"recommended_fast: none ({fast['reason']})")
    return "\n".join(lines)


def _loss(scores: Mapping[str, Any]) -> str:
    interval = scores["log_loss_ci95"]
    return f"{scores['log_loss']:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _cost(choice: Mapping[str, Any]) -> str:
    latency = choice.get("latency_ms")
    return "" if latency is None else f", {latency:.3g} ms for one image"


def _style(row: Mapping[str, Any], ranking: Ranking) -> str:
    row_marks = marks(row, ranking)
    is_faint = {"contaminated", training_data.MARK} & set(row_marks)
    return FAINT if is_faint else BOLD if "recommended" in row_marks else ""


def _with_interval(row: Mapping[str, Any], metric: str) -> str:
    interval = (row["ci95"] or {}).get(metric)
    return _value(row, metric) + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _value(row: Mapping[str, Any], metric: str) -> str:
    return "-" if row[metric] is None else f"{row[metric]:.4f}"


def _test(ranking: Ranking) -> str:
    """Return the name of the test of the p-values."""
    tests = {row["vs_best_single"].get("test") for row in ranking["rows"] if row["vs_best_single"]}
    return "exact sign-flip test of groups" if tests == {"sign_flip"} else "McNemar's exact test"


def _p_value(comparison: Mapping[str, Any] | None) -> str:
    """Return the Holm-corrected p-value of a comparison; "" if there is none."""
    p = None if comparison is None else comparison.get("p_value_holm", comparison.get("mcnemar_p_holm"))
    return "" if p is None else f"{p:.3f}"


def as_csv(ranking: Ranking) -> str:
    """Return CSV with one line per row of the ranking, numbers at full precision."""
    metrics = shown_metrics(ranking)
    bounds = [f"{metric}_{end}" for metric in metrics for end in ("", "low", "high")]
    header = ["rank", "name", "kind", *(bound.rstrip("_") for bound in bounds), *COMPARED, *MARKS]
    lines = []
    for row in ranking["rows"]:
        values = []
        for metric in metrics:
            values += [row[metric], *((row["ci95"] or {}).get(metric) or ("", ""))]
        comparison = row["vs_best_single"] or {}
        compared = [comparison.get(key) for key in COMPARED]
        flags = [str(mark in marks(row, ranking)).lower() for mark in MARKS.values()]
        lines.append([row["rank"], row["name"], row["kind"], *values, *compared, *flags])
    return csv_text(header, lines)


def as_markdown(ranking: Ranking) -> str:
    """Return a table in GitHub Flavored Markdown."""
    header, *body = _cells(ranking, escape_markdown, "{} [{}, {}]")
    return markdown_table(header, body)


def as_latex(ranking: Ranking) -> str:
    """Return a LaTeX `tabular` with booktabs rules."""
    header, *body = _cells(ranking, escape_latex, "{} {{\\scriptsize [{}, {}]}}")
    return latex_table(header, body, f"rl{'l' * (len(header) - 2)}")


WRITERS: dict[str, Callable[[Ranking], str]] = {"csv": as_csv, "md": as_markdown, "tex": as_latex}
"""{suffix of the file: function that makes its text}"""


def _cells(ranking: Ranking, escaped: Callable[[str], str], interval: str) -> list[Sequence[str]]:
    metrics = shown_metrics(ranking)
    lines: list[Sequence[str]] = [["rank", "name", *metrics.values(), "p"]]
    for row in ranking["rows"]:
        values = []
        for metric in metrics:
            bounds = (row["ci95"] or {}).get(metric)
            numbers = [] if row[metric] is None else [f"{value:.4f}" for value in (row[metric], *(bounds or ()))]
            values.append(interval.format(*numbers) if len(numbers) == 3 else (numbers or ["--"])[0])
        p = _p_value(row["vs_best_single"])
        row_marks = marks(row, ranking)
        name = escaped(row["name"]) + (escaped(f" ({', '.join(row_marks)})") if row_marks else "")
        lines.append(["--" if row["rank"] is None else str(row["rank"]), name, *values, p])
    return lines
