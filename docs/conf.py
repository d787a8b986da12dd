"""Sphinx builds the site from these pages (`make docs`); the pages of commands and keys are generated first."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
import reference_pages  # noqa: E402

import ensemble_system  # noqa: E402

project = "Ensemble system"
author = "the ensemble-system authors"
version = release = ensemble_system.__version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"{project} {version}"
exclude_patterns = ["_build", "generated/project/README.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links such as contract.md#exported-files
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # output of commands, which is no language

reference_pages.write(DOCS / "generated")


def _lead_to_site(_app: object, name: str, source: list[str]) -> None:
    """Pages outside docs/, such as CONTRIBUTING.md, are part of the site as copies."""
    source[0] = reference_pages.with_site_links(source[0], name)


def setup(app: object) -> None:
    """Register the change of links."""
    app.connect("source-read", _lead_to_site)  # type: ignore[attr-defined]
