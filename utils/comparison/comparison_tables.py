"""A comparison over workspaces as text, CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import join_names
from utils.evaluation.leaderboard import HEADINGS
from utils.evaluation.table_formats import (
    aligned_lines,
    csv_text,
    escape_latex,
    escape_markdown,
    latex_table,
    markdown_table,
)

Record = Mapping[str, Any]


def as_text(record: Record) -> str:
    """Return an aligned table, followed by the results of the tests."""
    control, metric = record["control"], HEADINGS[record["metric"]]
    header = ["mean rank", "method", metric, f"gain over {control}", "better/worse", "p"]
    lines = [header, *(_cells(method, control, "{:+.4f} [{:+.4f}, {:+.4f}]") for method in record["methods"])]
    heading = f"{len(record['methods'])} methods in {len(record['workspaces'])} workspaces, {record['split']} split"
    better = "higher" if record["higher_is_better"] else "lower"
    left_out = record["left_out"]
    notes = [f"left out, not in all workspaces: {join_names(sorted(left_out), 8)}"] if left_out else []
    summary = [record["summary"]] if record["summary"] else []
    return "\n".join(
        [f"{heading}, by {metric} ({better} is better)", *aligned_lines(lines), *_tests(record), *notes, *summary]
    )


def _tests(record: Record) -> list[str]:
    lines = []
    if record["friedman"] is not None:
        test, nemenyi = record["friedman"], record["nemenyi"]
        verdict = "the mean ranks differ" if test["p_value"] < nemenyi["alpha"] else "the mean ranks do not differ"
        statistic = "infinite" if test["f"] is None else f"{test['f']:.2f}"
        degrees = " and ".join(map(str, test["degrees"]))
        lines += [
            f"p: Wilcoxon's signed-rank test against {record['control']}, Holm-corrected",
            f"Friedman's test: F {statistic} with {degrees} degrees of freedom, chi-square {test['chi_square']:.2f}, "
            f"p {test['p_value']:.4f}: {verdict}",
            f"Nemenyi's test: methods differ whose mean ranks are {nemenyi['critical_difference']:.2f} or more apart "
            f"({nemenyi['alpha']:g})",
        ]
    return lines + list(record["notes"].values())


def _cells(method: Record, control: str, interval: str) -> list[str]:
    is_control = method["name"] == control
    bounds, p_value = method["gain_ci95"], method["wilcoxon_p_holm"]
    gain = interval.format(method["gain"], *bounds) if bounds else f"{method['gain']:+.4f}"
    return [
        f"{method['mean_rank']:.2f}",
        method["name"],
        f"{method['mean']:.4f}",
        "" if is_control else gain,
        "" if is_control else f"{method['wins']}/{method['losses']}",
        "" if p_value is None else f"{p_value:.3f}",
    ]


def as_csv(record: Record) -> str:
    """Return CSV with one line per method at full precision, with its score in each workspace."""
    keys = ("name", "mean_rank", "mean", "gain")
    tests = ("wins", "losses", "rank_p", "rank_p_holm", "wilcoxon_p", "wilcoxon_p_holm")
    header = [*keys, "gain_low", "gain_high", *tests, *(workspace["name"] for workspace in record["workspaces"])]
    lines = [
        [
            *(method[key] for key in keys),
            *(method["gain_ci95"] or (None, None)),
            *(method[key] for key in tests),
            *method["scores"],
        ]
        for method in record["methods"]
    ]
    return csv_text(header, lines)


def pairs_csv(record: Record) -> str:
    """Return CSV with one line per pair of methods."""
    keys = ("first", "second", "rank_difference", "gain", "nemenyi_p", "wilcoxon_p", "wilcoxon_p_holm")
    return csv_text(keys, [[pair[key] for key in keys] for pair in record["pairs"]])


def as_markdown(record: Record) -> str:
    """Return the table of methods, the scores with their ranks by workspace, and the results of the tests."""
    control, names = record["control"], [escape_markdown(method["name"]) for method in record["methods"]]
    header = ["mean rank", "method", HEADINGS[record["metric"]], f"gain over {escape_markdown(control)}"]
    body = [
        [escape_markdown(cell) if column == 1 else cell for column, cell in enumerate(cells)]
        for cells in (_cells(method, control, "{:+.4f} [{:+.4f}, {:+.4f}]") for method in record["methods"])
    ]
    by_workspace = [
        [escape_markdown(workspace["name"])]
        + [f"{method['scores'][row]:.4f} ({method['ranks'][row]:g})" for method in record["methods"]]
        for row, workspace in enumerate(record["workspaces"])
    ]
    mean_ranks = ["mean rank", *(f"{method['mean_rank']:.3f}" for method in record["methods"])]
    parts = [
        markdown_table([*header, "better/worse", "p"], body),
        markdown_table(["workspace", *names], [*by_workspace, mean_ranks]),
        "\n".join(f"- {escape_markdown(line)}" for line in _tests(record)) + "\n",
    ]
    return "\n".join(parts)


def as_latex(record: Record) -> str:
    """Return scores with their ranks by workspace, and the mean ranks; workspaces are rows, as in Demsar (2006)."""
    header = ["workspace", *(escape_latex(method["name"]) for method in record["methods"])]
    lines = [
        [escape_latex(workspace["name"])]
        + [f"{method['scores'][row]:.4f} ({method['ranks'][row]:g})" for method in record["methods"]]
        for row, workspace in enumerate(record["workspaces"])
    ]
    lines.append(["mean rank", *(f"{method['mean_rank']:.3f}" for method in record["methods"])])
    lines.append(["mean gain", *(_latex_gain(method, record["control"]) for method in record["methods"])])
    return latex_table(header, lines, f"l{'r' * len(record['methods'])}")


def _latex_gain(method: Record, control: str) -> str:
    if method["name"] == control:
        return "--"
    bounds = method["gain_ci95"]
    interval = f" {{\\scriptsize [{bounds[0]:+.4f}, {bounds[1]:+.4f}]}}" if bounds else ""
    return f"{method['gain']:+.4f}{interval}"
