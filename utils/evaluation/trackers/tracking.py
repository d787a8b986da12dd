"""Experiment trackers that `evaluate` can log to; their packages are imported only on request."""

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
    """A server or folder that runs are written to."""

    title: str
    """Name of its option, without `--`."""
    place: str
    """The address or folder as the user typed it, without a password."""

    def write(self, runs: Sequence[TrackedRun]) -> int:
        """Write the runs that are not stored yet and return their number. Raises UserError if it cannot write."""


def open_trackers(mlflow: str | None, tensorboard: str | None) -> list[Tracker]:
    """Open the requested trackers, before anything is evaluated.

    Raises UserError for a missing package and for a server or folder that cannot be used, ConfigError for a wrong
    address.
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
    """Write an evaluation to the trackers; add a line and `trackers` {title: {place, new, unchanged}} to the result.

    `model_name` is the model that was evaluated alone, if any. A tracker that cannot write is a failure of the result.
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
