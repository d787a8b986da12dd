"""Experiment trackers that `evaluate` can also write to; their packages are imported only where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation.trackers import tracked_runs
from utils.evaluation.trackers.mlflow_tracker import MlflowTracker
from utils.evaluation.trackers.tensorboard_tracker import TensorboardTracker
from utils.evaluation.trackers.tracked_runs import TrackedRun


class Tracker(Protocol):
    """A place that runs are written to."""

    title: str
    """Name of its option, without `--`."""
    place: str
    """What the user typed, without a password."""

    def write(self, runs: Sequence[TrackedRun]) -> int:
        """Write the runs that are not there yet and return their number. Raises UserError."""


def open_trackers(mlflow: str | None, tensorboard: str | None) -> list[Tracker]:
    """Those that are asked for, before anything is evaluated.

    Raises UserError for a package that is missing and a place that cannot be used, ConfigError for a wrong address.
    """
    trackers: list[Tracker] = []
    if mlflow is not None:
        trackers.append(MlflowTracker(mlflow))
    if tensorboard is not None:
        trackers.append(TensorboardTracker(tensorboard))
    return trackers


def track(
    trackers: Sequence[Tracker], workspace: Workspace, split: str, result: Result, model_name: str | None
) -> Result:
    """Write an evaluation to the trackers; the result has a line and `trackers` {title: {place, new, unchanged}} more.

    `model_name` is the member or ensemble that was evaluated alone. A tracker that refuses is a failure of the result.
    """
    if not trackers:
        return result
    lines, counts, failures = [result.text], {}, list(result.failures)
    runs = tracked_runs.of_evaluation(workspace, split, model_name)
    for tracker in trackers:
        try:
            new = tracker.write(runs)
        except UserError as error:
            failures.append(f"{tracker.title}: {error}")
            continue
        counts[tracker.title] = {"place": tracker.place, "new": new, "unchanged": len(runs) - new}
        lines.append(f"{tracker.title}: {new} new runs, {len(runs) - new} unchanged: {tracker.place}")
    return replace(result, text="\n".join(lines), document={**result.document, "trackers": counts}, failures=failures)
