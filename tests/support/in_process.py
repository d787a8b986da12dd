"""The command line inside this process, for many runs in many workspaces without starting Python for each."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ensemble_orchestrator
from utils.core import messages
from utils.evaluation import score_plots


@dataclass(frozen=True)
class Done:
    """What a run left on the screen and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Of `--json`."""
        return json.loads(self.stdout)


@contextmanager
def own_settings() -> Iterator[None]:
    """Let the base pipeline's settings be read anew, as a process of its own would; all is as before afterwards."""
    environment, kept = dict(os.environ), sys.modules.pop("config.settings", None)
    package = sys.modules.get("config")
    logger = logging.getLogger(messages.LOGGER_NAME)
    level = logger.level
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # as OMP_NUM_THREADS of `conftest` has it, whatever ran here before
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.modules.pop("config.settings", None)
        if kept is not None:
            sys.modules["config.settings"] = kept
        if package is not None and kept is not None:
            package.settings = kept
        for handler in [h for h in logger.handlers if type(h).__module__ == messages.__name__]:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)


@contextmanager
def few_plots() -> Iterator[None]:
    """Draw one kind of plots: all six took a third of a pipeline, and a test of their own sees to each."""
    kinds = score_plots.KINDS
    score_plots.KINDS = {"reliability": score_plots.reliability}
    try:
        yield
    finally:
        score_plots.KINDS = kinds


def run(*argv: str | Path, workspace: Path | None = None) -> Done:
    """`python ensemble_orchestrator.py ARGV --workspace WORKSPACE`, with one kind of plots."""
    place = () if workspace is None else ("--workspace", str(workspace))
    out, err = io.StringIO(), io.StringIO()
    with own_settings(), few_plots(), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        for name in ("DBT_ENSEMBLE_DIR", "DBT_BASE_DIR", "DBT_GROUP_REGEX"):
            os.environ.pop(name, None)
        try:
            code = ensemble_orchestrator.main([*map(str, argv), *place])
        except SystemExit as end:  # a mistake of usage, or a signal
            code = end.code if isinstance(end.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())
