"""The record of an audit as lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.core.display_text import format_count, format_percent, join_names
from utils.core.workspace import SPLITS
from utils.discovery.imbalance import REPORTED_RATIO

SHOWN = 3  # images or groups named in the text


def lines(record: Mapping[str, Any]) -> list[str]:
    """A summary in the first line, then one line per finding."""
    splits = [split for split in SPLITS if split in record["splits"]]  # keys of a record on disk are sorted
    counts = ", ".join(f"{split} {record['splits'][split]['n']:,}" for split in splits)
    sentences = [f"audit: {format_count(record['n'], 'image')} ({counts}): {_duplicates(record)}"]
    duplicates = record["duplicates"]
    for split in splits:
        if images := duplicates["affected"].get(split):
            learned = "train or val" if split == "test" else "train"
            of_all = f"{len(images)} of {record['splits'][split]['n']:,} {split} images"
            sentences.append(f"{of_all} have a copy in {learned}, first {images[0]}")
    sentences += _scores(record)
    if duplicates["with_different_labels"]:
        group = next(group for group in duplicates["groups"] if len(group["labels"]) > 1)
        sentences.append(
            f"copies with different labels in {format_count(duplicates['with_different_labels'], 'group')}, first "
            f"{join_names(group['images'], SHOWN)}"
        )
    sentences += _probes(record)
    if record["imbalance_ratio"] and record["imbalance_ratio"] > REPORTED_RATIO:
        sentences.append(f"the largest class has {record['imbalance_ratio']:.1f} times the images of the smallest")
    if record["unreadable"]:
        first = record["unreadable"][0]
        sentences.append(
            f"{format_count(len(record['unreadable']), 'unreadable image')}, first {first['image']}: {first['reason']}"
        )
    if record["nearly_empty"]:
        sentences.append(
            f"{format_count(len(record['nearly_empty']), 'nearly empty image')}, first {record['nearly_empty'][0]}"
        )
    issues = record["label_issues"]
    if issues and issues.get("in_doubt"):
        sentences.append(
            f"labels in doubt: {issues['in_doubt']} of {issues['n']} out-of-sample rows, by {issues['model']}"
        )
    return sentences


def leak(record: Mapping[str, Any]) -> str:
    """`3 groups of copies are in more than one split`."""
    count = record["duplicates"]["across_splits"]
    return f"{format_count(count, 'group')} of copies {'is' if count == 1 else 'are'} in more than one split"


def _duplicates(record: Mapping[str, Any]) -> str:
    groups = record["duplicates"]["groups"]
    if not groups:
        return "no copies"
    images = sum(len(group["images"]) for group in groups)
    across = record["duplicates"]["across_splits"]
    return f"{format_count(len(groups), 'group')} of copies ({images:,} images), {across} across splits"


def _scores(record: Mapping[str, Any]) -> list[str]:
    name = (record["recommended"] or {}).get("name")
    entry = next((entry for entry in record["scores"] if entry["name"] == name), None)
    if entry is None or not entry["affected"]["n"]:
        return []
    before, after = entry["all"], entry["without"]
    if not after["n"]:
        return [f"{name}: no test image is left without a copy"]
    return [
        f"{name}: accuracy {before['accuracy']:.4f}, log-loss {before['log_loss']:.4f} on {before['n']} test images; "
        f"{after['accuracy']:.4f}, {after['log_loss']:.4f} on the {after['n']} without a copy"
    ]


def _probes(record: Mapping[str, Any]) -> list[str]:
    recommended = record["recommended"]
    beside = f", {recommended['name']} {format_percent(recommended['accuracy'])}" if recommended else ""
    sentences = [
        f"{probe['name']} alone predict the class of {format_percent(probe['accuracy'])} of the images (chance "
        f"{format_percent(probe['chance'])}{beside})"
        for probe in record["probes"]
        if probe["stands_out"]
    ]
    others = [probe["name"] for probe in record["probes"] if not probe["stands_out"]]
    if others:
        sentences.append(f"no better than chance: {join_names(others)}")
    if "probes" in record["notes"]:
        sentences.append(f"shortcuts were not probed: {record['notes']['probes']}")
    return sentences
