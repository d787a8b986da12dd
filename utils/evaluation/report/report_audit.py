"""The report's section on the audit of the images: copies across splits, shortcuts, classes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.core.artifacts import read_record
from utils.core.display_text import format_count, format_number, format_percent
from utils.core.program_names import as_typed
from utils.core.workspace import SPLITS, Workspace
from utils.evaluation.audit_form import AUDIT
from utils.evaluation.report.thumbnails import thumbnail
from utils.predictions.catalog import Catalog

GROUPS = 8  # groups of copies that are shown
IMAGES = 3  # images that are shown of each group
MODELS = 12  # models in the table of scores
NONE = "-"


def current_record(workspace: Workspace, catalog: Catalog) -> dict[str, Any] | None:
    """Return `audit.json`; None unless it describes the catalog's images. Raises UserError for a damaged record."""
    record = read_record(workspace.audit, remedy="Remove it, then run audit again", form=AUDIT)
    if record is None or not record["n"]:
        return None
    audited = {split: facts["digest"] for split, facts in record["splits"].items()}
    if audited != {split: facts.get("digest") for split, facts in catalog.splits.items()}:
        return None
    return record


def section(workspace: Workspace, catalog: Catalog) -> dict[str, Any] | None:
    """Return the values of the section; None without an audit of the catalog's images.

    Raises UserError for a damaged record.
    """
    record = current_record(workspace, catalog)
    if record is None:
        return None
    duplicates = record["duplicates"]
    groups = duplicates["groups"]
    return {
        "sentences": _sentences(record, workspace),
        "groups": [_group(workspace, duplicates["pairs"], group) for group in groups[:GROUPS]],
        "more_groups": max(0, len(groups) - GROUPS),
        "scores": [_scores(entry) for entry in record["scores"][:MODELS]]
        if any(duplicates["affected"].values())
        else [],
        "probes": [_probe(probe) for probe in record["probes"]],
        "model": record["recommended"],
        "model_accuracy": format_percent((record["recommended"] or {}).get("accuracy")),
        "splits": [split for split in SPLITS if split in record["splits"]],  # a record on disk has its keys sorted
        "classes": [_class(entry) for entry in record["classes"]],
        "unreadable": [f"{entry['image']}: {entry['reason']}" for entry in record["unreadable"][:20]],
        "nearly_empty": record["nearly_empty"][:20],
        "notes": sorted(record["notes"].items()),
        "file": workspace.relative(workspace.audit),
    }


def _sentences(record: Mapping[str, Any], workspace: Workspace) -> list[str]:
    duplicates = record["duplicates"]
    count = len(duplicates["groups"])
    if not count:
        return [f"No image of {record['n']:,} is a copy of another one."]
    images = sum(len(group["images"]) for group in duplicates["groups"])
    sentences = [
        f"{images:,} of {record['n']:,} images are copies of one another, in {format_count(count, 'group')}: the same "
        f"photograph re-encoded, resized, cut, mirrored or edited, or taken again. {duplicates['across_splits']} of "
        "these groups are in more than one split."
    ]
    for split in SPLITS:
        if names := duplicates["affected"].get(split):
            learned = "train or val" if split == "test" else "train"
            of_all = f"{len(names)} of {record['splits'][split]['n']:,}"
            sentences.append(f"{of_all} {split} images have a copy in {learned}, so that a model may know them.")
    if duplicates["with_different_labels"]:
        count = duplicates["with_different_labels"]
        sentences.append(
            f"In {format_count(count, 'group')} the copies have different labels, so that some of these are wrong."
        )
    if duplicates["across_splits"]:
        words = ["python", "ensemble_orchestrator.py", "audit", "--write-split", "--workspace", str(workspace.base)]
        sentences.append(f"A split that keeps the copies together: {as_typed(shlex.join(words))}")
    return sentences


def _group(workspace: Workspace, pairs: list[Mapping[str, Any]], group: Mapping[str, Any]) -> dict[str, Any]:
    names = group["images"]
    group_pairs = [pair for pair in pairs if pair["first"] in names and pair["second"] in names]
    relations = ", ".join(dict.fromkeys(pair["relation"] for pair in group_pairs))
    return {
        "title": f"{format_count(len(names), 'image')}: {relations}",
        "labels": group["labels"] if len(group["labels"]) > 1 else [],
        "images": [
            {"id": name, "thumbnail": thumbnail(workspace.split_dir / Path(name)), "alt": f"Image {name}"}
            for name in names[:IMAGES]
        ],
        "more": max(0, len(names) - IMAGES),
    }


def _scores(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": entry["name"],
        **{
            f"{rows}_{figure}": format_number(entry[rows].get(figure)) if entry[rows].get(figure) is not None else NONE
            for rows in ("all", "without", "affected")
            for figure in ("accuracy", "log_loss")
        },
        **{f"{rows}_n": entry[rows]["n"] for rows in ("all", "without", "affected")},
    }


def _probe(probe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": probe["name"],
        "accuracy": format_percent(probe["accuracy"]),
        "chance": format_percent(probe["chance"]),
        "chance_95": format_percent(probe["chance_95"]),
        "p_value": format_number(probe["p_value"], 3),
        "verdict": "predicts the class" if probe["stands_out"] else "no better than chance",
    }


def _class(entry: Mapping[str, Any]) -> dict[str, Any]:
    width, height = entry["width"], entry["height"]
    quality = entry["jpeg_quality"]
    return {
        "name": entry["name"],
        "images": entry["images"],
        "size": NONE if width is None or height is None else f"{width:.0f} x {height:.0f}",
        "quality": NONE if quality is None else f"{quality:.0f}",
        "brightness": format_percent(entry["brightness"]) if entry["brightness"] is not None else NONE,
        "contrast": format_percent(entry["contrast"]) if entry["contrast"] is not None else NONE,
    }
