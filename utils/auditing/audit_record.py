"""The record of an audit, `audit.json`, computed from its inputs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from utils.auditing import (
    affected_scores,
    audit_inputs,
    class_facts,
    image_signatures,
    near_duplicates,
    shortcut_probes,
)
from utils.auditing.audit_inputs import AuditInputs
from utils.auditing.image_signatures import Signatures
from utils.auditing.near_duplicates import Pair

SCHEMA = 1
LEARNED_FROM = {"val": ("train",), "test": ("train", "val")}
"""Evaluation split -> splits whose images a model may have been fitted or selected on."""


def empty() -> dict[str, Any]:
    """The record of a workspace without images."""
    return {
        "schema": SCHEMA,
        "inputs_digest": "",
        "n": 0,
        "splits": {},
        "duplicates": {"pairs": [], "groups": [], "across_splits": 0, "with_different_labels": 0, "affected": {}},
        "scores": [],
        "recommended": None,
        "probes": [],
        "classes": [],
        "imbalance_ratio": None,
        "unreadable": [],
        "nearly_empty": [],
        "label_issues": None,
        "notes": {},
    }


def compute(inputs: AuditInputs, seed: int, *, threads: int) -> dict[str, Any]:
    """Compute the record of an audit, with `threads` threads for decoding and comparing."""
    signatures = image_signatures.read(inputs.paths, threads=threads)
    embeddings = audit_inputs.embeddings(inputs)
    pairs = near_duplicates.find_pairs(signatures, inputs.contents, embeddings, threads=threads)
    duplicates = duplicates_record(inputs, pairs)
    probes, notes = _probes(
        inputs, signatures, near_duplicates.group_indices(len(inputs.paths), pairs, inputs.groups), seed
    )
    names, ranking = inputs.names, inputs.ranking
    scores: list[dict[str, Any]] = []
    if inputs.store is None or ranking is None:
        notes["scores"] = "nothing is evaluated yet; run evaluate, then audit again"
    else:
        affected = [name.partition("/")[2] for name in duplicates["affected"].get("test", ())]
        scores = affected_scores.scores(inputs.store, ranking, affected)
    return empty() | {
        "inputs_digest": inputs.digest,
        "n": len(inputs.paths),
        "splits": {
            split: {"n": inputs.splits.count(split), "digest": digest} for split, digest in inputs.split_digests.items()
        },
        "duplicates": duplicates,
        "scores": scores,
        "recommended": _recommended(ranking),
        "probes": probes,
        "classes": class_facts.by_class(signatures, inputs.labels, inputs.splits, inputs.classes),
        "imbalance_ratio": class_facts.imbalance_ratio(inputs.labels, inputs.classes),
        "unreadable": [{"image": names[row], "reason": reason} for row, reason in signatures.problems.items()],
        "nearly_empty": [names[row] for row in class_facts.nearly_empty(signatures)],
        "label_issues": (ranking or {}).get("label_issues"),
        "notes": notes,
    }


def duplicates_record(inputs: AuditInputs, pairs: list[Pair]) -> dict[str, Any]:
    """Pairs, the groups that they form (those across splits first), and images with a copy in an earlier split."""
    names = inputs.names
    groups = near_duplicates.group_indices(len(names), pairs)
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    listed: list[dict[str, Any]] = []
    affected: dict[str, list[str]] = {split: [] for split in LEARNED_FROM if split in inputs.splits}
    for rows in (part for part in parts if len(part) > 1):
        splits = {inputs.splits[row] for row in rows}
        labels = sorted({inputs.classes[inputs.labels[row]] for row in rows})
        listed.append({"images": [names[row] for row in rows], "splits": len(splits), "labels": labels})
        for split, earlier in LEARNED_FROM.items():
            if splits & set(earlier):
                affected.get(split, []).extend(names[row] for row in rows if inputs.splits[row] == split)
    listed.sort(key=lambda group: (-group["splits"], -len(group["labels"]), -len(group["images"]), group["images"][0]))
    return {
        "pairs": [
            {
                "first": names[pair.first],
                "second": names[pair.second],
                "relation": pair.relation,
                "similarity": pair.similarity,
            }
            for pair in pairs
        ],
        "groups": listed,
        "across_splits": sum(group["splits"] > 1 for group in listed),
        "with_different_labels": sum(len(group["labels"]) > 1 for group in listed),
        "affected": {split: sorted(images) for split, images in affected.items()},
    }


def _probes(
    inputs: AuditInputs, signatures: Signatures, groups: np.ndarray, seed: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    readable = np.flatnonzero(signatures.readable)
    labels, units = inputs.labels[readable], groups[readable]
    reason = shortcut_probes.reason_for_none(labels, units)
    if reason is not None:
        return [], {"probes": reason}
    file_names = [PurePosixPath(sample_id).name for sample_id in inputs.sample_ids]
    features = shortcut_probes.features(signatures, file_names, inputs.classes)
    readable_features = {name: values[readable] for name, values in features.items()}
    probes = shortcut_probes.run(readable_features, labels, units, seed=seed)
    return [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(p).items()}
        for p in probes
    ], {}


def _recommended(ranking: dict[str, Any] | None) -> dict[str, Any] | None:
    """Name and accuracy of the recommended model on test."""
    if ranking is None:
        return None
    name = ranking["recommended"]["name"]
    row = next((row for row in ranking["rows"] if row["name"] == name), None)
    return None if row is None else {"name": name, "accuracy": row["accuracy"]}
