"""The command `audit`: copies of images across splits, shortcuts to the classes, and empty images.

It gathers (`audit_inputs`), computes (`audit_record`) and writes `audit.json`, the report, and a clean split
on request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.auditing import audit_inputs, audit_record, audit_text, clean_split, near_duplicates
from utils.auditing.audit_inputs import AuditInputs
from utils.auditing.near_duplicates import Pair
from utils.core.artifacts import read_record, write_json, write_text
from utils.core.config import Config
from utils.core.errors import LeakageError, UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.evaluation.audit_form import AUDIT
from utils.evaluation.report import report_page, report_sources
from utils.predictions import image_splits

logger = logging.getLogger("disease_pipeline")

CLEAN_SPLIT = "clean_split.csv"


def audit(
    config: Config,
    workspace: Workspace,
    *,
    strict: bool = False,
    write_split: str | None = None,
    force: bool = False,
) -> Result:
    """Audit the images of the workspace, write `audit.json` and renew the reports that show it.

    `write_split` is the path of a CSV manifest to write; if empty, the workspace's `clean_split.csv`. A record of the
    same images and predictions is kept unless `force`. A report that cannot be written is a failure of the result.

    Raises UserError for a damaged record or images that a manifest cannot list; with `strict`, LeakageError if copies
    of an image are in more than one split, after everything has been written.
    """
    if not workspace.has_images:
        text = "audit: this workspace has no images, only imported predictions; there is nothing to audit"
        return Result(text, audit_record.empty())
    inputs = audit_inputs.gather(config, workspace)
    record = read_record(workspace.audit, remedy="Remove it, then run audit again", form=AUDIT)
    state = "up to date"
    if force or record is None or record["inputs_digest"] != inputs.digest:
        start, state = time.monotonic(), "written"
        threads = image_splits.decoding_threads(config.dataset.num_workers)
        record = audit_record.compute(inputs, config.seed, threads=threads)
        write_json(workspace.audit, record)
        logger.info("audit of %d images: %.1f s", len(inputs.paths), time.monotonic() - start)
    lines = audit_text.lines(record)
    if write_split is not None:
        path = Path(write_split).expanduser() if write_split else workspace.base / CLEAN_SPLIT
        lines += _write_clean_split(path, inputs, record)
    lines.append(f"{state}: {workspace.audit}")
    following = None
    if record["duplicates"]["across_splits"] and write_split is None:
        following = "audit --write-split"
    result = Result("\n".join(lines), dict(record), next=following)
    result = _with_reports(config, workspace, inputs, result)
    if strict and record["duplicates"]["across_splits"]:
        raise LeakageError(
            f"audit --strict: {audit_text.leak(record)}; {workspace.audit} lists them. A split without them: "
            "python ensemble_orchestrator.py audit --write-split"
        )
    return result


def _write_clean_split(path: Path, inputs: AuditInputs, record: Mapping[str, Any]) -> list[str]:
    """Write the manifest; returns lines on the moved images and on how to use it."""
    row_of = {name: row for row, name in enumerate(inputs.names)}
    pairs = [
        Pair(row_of[pair["first"]], row_of[pair["second"]], pair["relation"], pair["similarity"])
        for pair in record["duplicates"]["pairs"]
    ]
    groups = near_duplicates.group_indices(len(row_of), pairs, inputs.groups)
    splits = clean_split.proposed_splits(inputs.splits, groups)
    readable_rows = np.setdiff1d(np.arange(len(row_of)), [row_of[entry["image"]] for entry in record["unreadable"]])
    text = clean_split.manifest(
        path,
        [inputs.paths[row].absolute() for row in readable_rows],
        [inputs.classes[inputs.labels[row]] for row in readable_rows],
        [splits[row] for row in readable_rows],
        groups[readable_rows],
    )
    write_text(path, text)
    moved = sum(splits[row] != inputs.splits[row] for row in readable_rows)
    lines = [
        f"clean split: {path} ({moved} of {len(readable_rows)} images move, each to the earliest split of its copies)"
    ]
    labels = {inputs.labels[row] for row in readable_rows}
    for split in inputs.split_digests:
        missing_labels = labels - {inputs.labels[row] for row in readable_rows if splits[row] == split}
        if missing_labels:
            names = ", ".join(inputs.classes[label] for label in sorted(missing_labels))
            lines.append(f"    {split} has no image of {names} left; move some groups there before it is used")
    lines.append(f"    python BASE-BACK/src/main.py --stages split --data {path} --workspace NEW_WORKSPACE")
    return lines


def _with_reports(config: Config, workspace: Workspace, inputs: AuditInputs, result: Result) -> Result:
    """The result, after rewriting all existing reports to show this record."""
    failures = list(result.failures)
    for split in ("test", "val"):
        is_shown = workspace.report(split).is_file() and workspace.ranking(split).is_file()
        if inputs.store is None or not is_shown or report_page.is_current(config, workspace, split):
            continue
        try:
            report_page.write(config, report_sources.read(inputs.store, split))
        except UserError as error:
            failures.append(f"report: {error}")
    return replace(result, failures=failures)
