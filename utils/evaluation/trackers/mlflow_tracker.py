"""Runs in MLflow: `evaluate --mlflow URI`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.core.errors import ConfigError, UserError
from utils.evaluation.trackers.tracked_runs import TrackedRun

INSTALL = 'Install the extra mlflow: pip install "ensemble-system[mlflow]", or pip install "mlflow-skinny>=3,<4"'
EXPERIMENT = "ensemble-system"  # unless MLFLOW_EXPERIMENT_NAME names another, as for every MLflow client
DIGEST = "scores_digest"  # tag by which a later evaluation identifies the run of the same scores
MAX_BATCH = 1000  # metrics per request, a limit of MLflow
MAX_MESSAGE = 300  # characters of an MLflow error that are shown
EXPECTED = (
    "Expected the address of an MLflow server, such as http://localhost:5000, or a folder, such as mlruns; "
    "a database, such as sqlite:///mlflow.db, needs the whole package: pip install mlflow"
)
SETTINGS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder is named by the user; without this MLflow 3 refuses all of them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # an unreachable server is an error after seconds, not minutes
}
"""Environment variables of MLflow, set unless the user has set them."""


class MlflowTracker:
    """A tracking server, or a folder in MLflow's format."""

    title = "mlflow"

    def __init__(self, uri: str) -> None:
        """Connect. Raises UserError without MLflow and if nothing responds at `uri`, ConfigError for a file."""
        self.place = re.sub(r"(?<=://)[^/@]*@", "", uri)  # without user and password
        self._uri = _address(uri, self.place)
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise UserError(f"evaluate --mlflow: MLflow cannot be imported ({error}). {INSTALL}") from error
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        with self._errors_in_words():
            self._client = MlflowClient(tracking_uri=self._uri)
            experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise UserError(
                f"evaluate --mlflow {self.place}: its experiment {self._experiment} is deleted. Restore it, or name "
                "another by the environment variable MLFLOW_EXPERIMENT_NAME"
            )

    def write(self, runs: Sequence[TrackedRun]) -> int:
        """Write the runs whose scores are not stored yet, update the tags of the others; return the number of new runs.

        Raises UserError if the server or folder refuses; a run that was started is then marked as failed.
        """
        with self._errors_in_words():
            experiment = self._client.get_experiment_by_name(self._experiment)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
            return sum(self._write(run, experiment_id) for run in runs)

    def _write(self, run: TrackedRun, experiment_id: str) -> bool:
        """Write a run or update its tags; return whether it is new."""
        finished = f"tags.{DIGEST} = '{run.scores_digest}' and attributes.status = 'FINISHED'"
        if earlier := self._client.search_runs([experiment_id], finished, max_results=1):
            for key, value in run.tags.items():
                if earlier[0].data.tags.get(key) != value:
                    self._client.set_tag(earlier[0].info.run_id, key, value)
            return False
        run_id = self._client.create_run(
            experiment_id, tags={**run.tags, DIGEST: run.scores_digest}, run_name=run.name
        ).info.run_id
        try:
            for metrics in _batches(run):
                self._client.log_batch(run_id, metrics=metrics)
            self._client.log_artifact(run_id, str(run.metrics_file))
            for path in run.pictures.values():
                self._client.log_artifact(run_id, str(path))
        except BaseException:
            self._client.set_terminated(run_id, status="FAILED")
            raise
        self._client.set_terminated(run_id)
        return True

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, OSError) as error:
            message = " ".join(str(error).replace(self._uri, self.place).split())
            message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]} ..."
            raise UserError(f"evaluate --mlflow {self.place}: MLflow answers: {message}. {EXPECTED}") from error


def _address(typed: str, shown: str) -> str:
    """Return the URI for MLflow, with scheme `file` for a folder. Raises ConfigError for an empty URI or a file."""
    if ":" in typed.partition("/")[0] or typed == "databricks":
        return typed
    path = Path(typed).expanduser().absolute()
    if not typed.strip() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"evaluate --mlflow {shown or repr(typed)}: no folder and no address. {EXPECTED}")
    return path.as_uri()


def _batches(run: TrackedRun) -> Iterator[list[Any]]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in run.scalars.items()]
    for start in range(0, len(metrics), MAX_BATCH):
        yield metrics[start : start + MAX_BATCH]
