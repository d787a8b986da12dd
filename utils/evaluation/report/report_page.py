"""The report: one HTML page that needs no other file.

Every value that came from a user, such as names of classes and files, is made printable, then escaped.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from utils.core.artifacts import digest_of, read_record, write_text
from utils.core.config import Config
from utils.core.config_sections import Project
from utils.core.workspace import Workspace
from utils.evaluation.report.report_sources import ReportSources

logger = logging.getLogger("disease_pipeline")

VERSION = 9  # incremented when the same records would give a different page
TEMPLATES = Path(__file__).with_name("templates")
KEY = re.compile(rb'<meta name="inputs" content="([0-9a-f]{64})">')
SPLIT_RECORD = "split_manifest.json"
"""Record of the base pipeline's stage `split`, with the folder of the images as `raw_dir`."""
GENERIC = ("data", "dataset", "images", "work", "workspace")
"""Generic names of folders, which are replaced by the name of the parent folder"""
DIGEST = re.compile(r"-[0-9a-f]{8}$")
"""Suffix of the workspaces of the demo"""
HEAD_BYTES = 4096  # first bytes of a page, which contain the key
EXPLANATIONS = {
    "wrong": "The predicted class has a high probability and differs from the label: the model or the label is wrong.",
    "disagreement": "At least two members give different classes a probability above one half. Further training images "
    "like these help most.",
    "mislabelled": "Out-of-sample predictions contradict these labels. Check the labels first.",
}


def write(config: Config, sources: ReportSources) -> Path:
    """Write the page of a split, after its records are written; return its path."""
    path, start = sources.workspace.report(sources.split), time.monotonic()
    write_text(path, render(config, sources, inputs_digest(config, sources.workspace, sources.split)))
    logger.info("report of %s: %.1f s, %.1f MB", sources.split, time.monotonic() - start, path.stat().st_size / 1e6)
    return path


def is_current(config: Config, workspace: Workspace, split: str) -> bool:
    """Return whether the page of a split exists and shows the current records on disk."""
    path = workspace.report(split)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        key = KEY.search(file.read(HEAD_BYTES))
    return key is not None and key[1].decode() == inputs_digest(config, workspace, split)


def inputs_digest(config: Config, workspace: Workspace, split: str) -> str:
    """Return the digest of every record that the page shows; no image is opened."""
    files = [workspace.ranking(split), workspace.catalog, workspace.audit, workspace.report_maps(split)]
    files += sorted(workspace.scores.rglob(workspace.ranking(split).name.replace("ranking", "metrics")))
    files += sorted(workspace.models.glob("*/ensemble.json"))
    files += workspace.view_choices()
    files += workspace.external_sets() if split == "test" else []
    # With paths relative to the workspace, so that a page stays current when the workspace moves.
    texts = [
        (os.path.relpath(path, workspace.root), path.read_bytes().decode("utf-8", "replace"))
        for path in files
        if path.is_file()
    ]
    return digest_of([VERSION, split, texts, config.digest()])


def render(config: Config, sources: ReportSources, key: str) -> str:
    """Return the page as one HTML text, with the digest of its records as `key`."""
    from utils.evaluation.report.figure_cache import drawn_together

    with drawn_together() as fill:
        return fill(_template().render(_context(config, sources, key)))


def _context(config: Config, sources: ReportSources, key: str) -> dict[str, Any]:
    """Return the values of the template."""
    from utils.evaluation.report import (
        example_maps,
        report_audit,
        report_external,
        report_images,
        report_learned,
        report_ranking,
        report_scores,
        report_sections,
        report_summary,
    )
    from utils.evaluation.report.report_data import report_data

    data = report_data(sources)
    members, learned = report_sections.members(data), report_learned.learned(data)
    sets = report_external.read_sets(data.workspace) if data.split == "test" else []
    audit = report_audit.section(data.workspace, data.catalog)
    scores, maps = report_scores.scores(data), example_maps.read(data)
    shown = {"members": members, "learned": any(_rows(learned)), "external": sets, "audit": audit, "scores": scores}
    empty = {anchor for anchor, content in shown.items() if not content}
    return {
        "key": key,
        "title": f"{subject(config, data.workspace)}: evaluation report",
        "focus": data.focus,
        "split": data.split,
        "n": f"{data.evaluated['n_samples']:,}",
        "classes": data.classes,
        "counts": _counts(data.ranking),
        "order": data.ordered_by,
        "cards": report_sections.cards(data),
        "summary": report_summary.summary(data),
        "warnings": report_summary.warnings(data, example_maps.background_warning(data, maps)),
        "ranking": report_ranking.ranking(data),
        "scores": scores,
        "cost": report_sections.cost(data),
        "calibration": report_sections.calibration(data),
        "uncertainty": report_sections.uncertainty(data),
        "errors": report_sections.errors(data),
        "max_open_classes": report_sections.MAX_OPEN_CLASSES,
        "external": [report_external.section(record) for record in sets],
        "members": members,
        "learned": learned if any(_rows(learned)) else None,
        "doubt": data.ranking.get("label_issues"),
        "label_issues": data.workspace.relative(data.workspace.label_issues("csv")),
        "audit": audit,
        "images": report_images.images(data, maps),
        "maps": report_images.maps_notes(data, maps),
        "has_images": data.catalog.has_images,
        "explanations": EXPLANATIONS,
        "next_steps": report_sections.next_steps(config, data),
        "provenance": report_sections.provenance(config, data),
        "sections": [(anchor, title) for anchor, title in _sections() if anchor not in empty],
    }


def subject(config: Config, workspace: Workspace) -> str:
    """Return the subject of the report: the configured project name, or else the name of the folder of the images."""
    if config.project.name != Project().name:
        return config.project.name
    path = workspace.split_dir / SPLIT_RECORD
    split = read_record(path, remedy="Split the images again", form={"raw_dir?": str}) or {}
    source = Path(split.get("raw_dir") or DIGEST.sub("", str(workspace.base)))
    return source.parent.name if source.name.lower() in GENERIC and source.parent.name else source.name


def _rows(learned: dict[str, Any]) -> list[Any]:
    """Return the rows of every table of `report_learned.learned`."""
    return [learned["weights"]["rows"], *(learned[part] for part in ("verdicts", "sparse", "views", "students"))]


def _counts(ranking: Mapping[str, Any]) -> str:
    from utils.core.display_text import format_count

    kinds = [row["kind"] for row in ranking["rows"]]
    ensembles, members = kinds.count("ensemble"), kinds.count("member")
    return f"{format_count(ensembles, 'ensemble')} and {format_count(members, 'single member')}"


def _sections() -> list[tuple[str, str]]:
    return [
        ("summary", "Summary"),
        ("ranking", "Ranking"),
        ("scores", "Scores"),
        ("cost", "Cost"),
        ("calibration", "Calibration"),
        ("uncertainty", "Uncertainty"),
        ("errors", "Errors"),
        ("external", "External sets"),
        ("members", "Members"),
        ("learned", "Combiners"),
        ("images", "Images"),
        ("audit", "Audit"),
        ("provenance", "Provenance"),
        ("next", "Next steps"),
    ]


@cache
def _template() -> Any:
    """Return the page's template, parsed once per process; every value is made printable, then escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    from utils.core.display_text import printable

    def as_printable(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    def breakable(name: str) -> Markup:
        """Allow line breaks after underscores; copied text does not contain them."""
        return Markup(escape(printable(name)).replace("_", Markup("_<wbr>")))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=as_printable,
        trim_blocks=False,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html")
