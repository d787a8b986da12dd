"""The command line inside this process, for many runs in many workspaces without starting Python for each."""

from __future__ import annotations

import html
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import ensemble_orchestrator
from utils.core import messages
from utils.core.artifacts import digest_of, replacing
from utils.core.display_text import printable
from utils.evaluation import score_plots
from utils.evaluation.report import figure_cache


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
    """Draw one kind of plots, since all six took a third of a pipeline and each has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_plots, "KINDS", {"reliability": score_plots.reliability})
        yield


def write_pixel(picture: score_plots.Picture) -> None:
    """Write a single pixel, which counts as the current plot of these scores."""
    source = PngImagePlugin.PngInfo()
    source.add_text("Source", picture.digest)
    with replacing(picture.path) as temporary:
        Image.new("L", (1, 1)).save(temporary, format="PNG", pnginfo=source)


@contextmanager
def empty_figures() -> Iterator[None]:
    """Write one kind of plots as a single pixel and the figures of the report as empty SVG: matplotlib took a seventh
    of all tests. Tests of plots and of the report draw them."""

    def empty(job: tuple[str, str, tuple[Any, ...], dict[str, Any]]) -> str:
        label = html.escape(printable(job[2][-1]))
        digest = digest_of(json.dumps(job, default=figure_cache._plain))  # so that pages of other figures differ
        return f'<svg class="figure" role="img" aria-label="{label}" data-digest="{digest}" viewBox="0 0 1 1"></svg>'

    def filled(requests: Mapping[str, Any], page: str) -> str:  # keeps no figure, which another test may draw
        for placeholder, request in requests.items():
            page = page.replace(placeholder, empty((request.module, request.name, request.args, request.kwargs)))
        return page

    with few_plots(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_plots, "_draw", write_pixel)
        patch.setattr(figure_cache, "_filled", filled)
        yield


@contextmanager
def every_plot() -> Iterator[None]:
    """Let `run` write all kinds of plots within the block, so that a program of its own finds none missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "few_plots", nullcontext)
        yield


def run(*argv: str | Path, workspace: Path | None = None) -> Done:
    """`python ensemble_orchestrator.py ARGV --workspace WORKSPACE`, with empty figures."""
    place = () if workspace is None else ("--workspace", str(workspace))
    out, err = io.StringIO(), io.StringIO()
    with own_settings(), empty_figures(), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        for name in ("DBT_ENSEMBLE_DIR", "DBT_BASE_DIR", "DBT_GROUP_REGEX"):
            os.environ.pop(name, None)
        try:
            code = ensemble_orchestrator.main([*map(str, argv), *place])
        except SystemExit as end:  # a mistake of usage, or a signal
            code = end.code if isinstance(end.code, int) else 1
    return Done(code, out.getvalue(), err.getvalue())
