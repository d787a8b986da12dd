"""`evaluate`, and the page it ends in: one HTML file that needs nothing else, written of what lies on disk.

Everything that came from a user, such as names of classes and files, passes through one gate on its way into the page:
made showable, then escaped.
"""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from utils.core.artifacts import digest_of, write_text
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation import score_ranking
from utils.predictions import catalog
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # raised whenever the same records would give another page
TEMPLATES = Path(__file__).with_name("templates")
KEY = re.compile(rb'<meta name="inputs" content="([0-9a-f]{64})">')
HEAD = 4096  # bytes in which the key stands
EXPLAINED = {
    "wrong": "Another class than the label's, by a high probability. Either the model or the label errs.",
    "disputed": "Members give different answers, each sure of its own. More images like these would teach most.",
    "mislabelled": "Answered by copies that never read these labels, and against them. Check the labels first.",
}


def evaluate(
    config: Config,
    workspace: Workspace,
    *,
    split: str = "test",
    model_name: str | None = None,
    force: bool = False,
    **options: Any,
) -> Result:
    """Score, rank and recommend as `evaluation.evaluate` does, then write the report; one model alone gets no report.

    Raises what `evaluation.evaluate` raises, which gets the other `options`. A report that could not be made is a
    failure of the result.
    """
    found = score_ranking.evaluate(config, workspace, split=split, model_name=model_name, force=force, **options)
    if model_name is not None:
        return found
    try:
        path = write(config, workspace, split, force=force)
    except UserError as error:
        return replace(found, failures=[*found.failures, f"report: {error}"])
    return replace(found, text=f"{found.text}\nreport: {path}", document={**found.document, "report": str(path)})


def write(config: Config, workspace: Workspace, split: str, *, force: bool = False) -> Path:
    """Write the page of a split, unless it is there for the same records; gives its place.

    Raises UserError where nothing was evaluated, or records are damaged.
    """
    path = workspace.report(split)
    key = inputs_digest(config, workspace, split)
    if not force and _key_of(path) == key:
        return path
    start = time.monotonic()
    write_text(path, render(config, Store(config, workspace, catalog.read(workspace)), split, key))
    logger.info("report of %s: %.1f s, %.1f MB", split, time.monotonic() - start, path.stat().st_size / 1e6)
    return path


def inputs_digest(config: Config, workspace: Workspace, split: str) -> str:
    """Of every record that the page shows, found without opening an image."""
    files = [workspace.ranking(split), workspace.catalog]
    files += sorted(workspace.scores.rglob(workspace.ranking(split).name.replace("ranking", "metrics")))
    files += sorted(workspace.models.glob("*/ensemble.json"))
    # By their names within the workspace, so that a page stays current when the workspace moves.
    texts = [
        (os.path.relpath(path, workspace.root), path.read_bytes().decode("utf-8", "replace"))
        for path in files
        if path.is_file()
    ]
    return digest_of([VERSION, split, texts, config.digest()])


def _key_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        found = KEY.search(file.read(HEAD))
    return found[1].decode() if found else None


def render(config: Config, store: Store, split: str, key: str) -> str:
    """The page of a split as one HTML text."""
    from utils.evaluation import example_images, report_data, report_learned, report_sections, report_summary

    data = report_data.gather(store, split)
    try:
        chosen = example_images.choose(store, split, data.focus, data.members, data.inference, data.answers)
    except (UserError, OSError) as error:
        chosen = []
        data.notes.append(f"Single images are not shown: {error}")
    members, learned = report_sections.members(data), report_learned.learned(data)
    empty = {anchor for anchor, found in (("members", members), ("learned", any(_rows(learned)))) if not found}
    context = {
        "key": key,
        "title": f"{config.project.name}: which ensemble to trust",
        "focus": data.focus,
        "split": data.split,
        "n": f"{data.evaluated['n_samples']:,}",
        "classes": data.classes,
        "counts": _counts(data.ranking),
        "order": str(data.ranking["order"][0]).replace("_", " "),
        "cards": report_sections.cards(data),
        "summary": report_summary.sentences(data),
        "warnings": report_summary.warnings(data),
        "ranking": report_sections.ranking(data),
        "cost": report_sections.cost(data),
        "calibration": report_sections.calibration(data),
        "uncertainty": report_sections.uncertainty(data),
        "errors": report_sections.errors(data),
        "most_classes": report_sections.MOST_CLASSES,
        "members": members,
        "learned": learned if any(_rows(learned)) else None,
        "doubt": data.ranking.get("label_issues"),
        "label_issues": store.workspace.relative(store.workspace.label_issues("csv")),
        "images": report_sections.images(store, data, chosen),
        "has_images": store.catalog.has_images,
        "explained": EXPLAINED,
        "provenance": report_sections.provenance(config, store, data),
        "sections": [(anchor, word) for anchor, word in _sections() if anchor not in empty],
    }
    return _template().render(context)


def _rows(learned: dict[str, Any]) -> list[Any]:
    """Of every part of `report_learned.learned`."""
    return [learned["weights"]["rows"], *(learned[part] for part in ("verdicts", "sparse", "students"))]


def _counts(ranking: dict[str, Any]) -> str:
    from utils.core.display_text import format_count

    kinds = [row["kind"] for row in ranking["rows"]]
    ensembles, members = kinds.count("ensemble"), kinds.count("member")
    return f"{format_count(ensembles, 'ensemble')} and {format_count(members, 'single member')}"


def _sections() -> list[tuple[str, str]]:
    return [
        ("summary", "Summary"),
        ("ranking", "Ranking"),
        ("cost", "Cost"),
        ("calibration", "Calibration"),
        ("uncertainty", "Uncertainty"),
        ("errors", "Errors"),
        ("members", "Members"),
        ("learned", "Combiners"),
        ("images", "Images"),
        ("provenance", "Provenance"),
    ]


def _template() -> Any:
    """The page's template: every value that is put in is made showable first and escaped after."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from utils.core.display_text import printable

    def showable(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=showable,
        trim_blocks=False,
    )
    return environment.get_template("report.html")
