"""The command `compare`: the same methods over several workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.comparison import comparison_tables, critical_difference
from utils.comparison.comparison import compare_methods
from utils.comparison.workspace_scores import BEST_SINGLE, read_workspaces
from utils.core.artifacts import write_json, write_text
from utils.core.errors import ConfigError, UserError, nearest_first
from utils.core.links import remove_file
from utils.core.results import Result
from utils.evaluation.leaderboard import HEADINGS

LOSSES = ("log_loss", "calibrated_log_loss", "brier", "ece", "ece_adaptive", "mce")
"""Metrics where lower is better."""
DIAGRAMS = ("critical_difference.png", "critical_difference.pdf")


def compare(
    config: object = None,
    workspace: object = None,
    *,
    workspaces: Sequence[str] = (),
    metric: str = "accuracy",
    split: str = "test",
    models: Sequence[str] | None = None,
    control: str = BEST_SINGLE,
    to: str | None = None,
    force: bool = False,
) -> Result:
    """Compare methods over workspaces by their records of `evaluate`, and write the result to the folder `to`.

    No configuration and no workspace is opened. Raises ConfigError for an unknown metric; UserError for fewer than two
    workspaces or common methods, unknown models, a workspace that is not evaluated, and damaged files.
    """
    if metric not in HEADINGS:
        raise ConfigError(
            f"compare --metric: no such metric {metric}{nearest_first(metric, HEADINGS, 'Expected one of')}"
        )
    folder = None if to is None else Path(to).expanduser().absolute()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder}: a file; expected a folder, which is created if it does not exist")
    record = compare_methods(
        read_workspaces(workspaces, split, metric),
        metric=metric,
        higher_is_better=metric not in LOSSES,
        models=models,
        control=control,
    )
    record |= {"split": split, "folder": None if folder is None else str(folder)}
    text = comparison_tables.as_text(record)
    if folder is not None:
        _write(folder, record)
        text += f"\nwritten: {folder / 'comparison.json'}"
    return Result(text, record)


def _write(folder: Path, record: dict[str, object]) -> None:
    write_text(folder / "comparison.csv", comparison_tables.as_csv(record))
    write_text(folder / "comparison.md", comparison_tables.as_markdown(record))
    write_text(folder / "comparison.tex", comparison_tables.as_latex(record))
    if record["pairs"] is None:  # remove files of an earlier comparison of more workspaces
        for name in ("pairs.csv", *DIAGRAMS):
            remove_file(folder / name)
    else:
        write_text(folder / "pairs.csv", comparison_tables.pairs_csv(record))
        critical_difference.draw(record, [folder / name for name in DIAGRAMS])
    write_json(folder / "comparison.json", record)
