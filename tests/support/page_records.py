"""Records of `audit`, `evaluate --maps` and test-time augmentation, for pages of synthetic workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.activation_maps.map_maker import ImageMap
from utils.activation_maps.overlays import overlay
from utils.core.artifacts import write_json
from utils.core.config import Config
from utils.core.workspace import Workspace
from utils.evaluation.report import example_maps, report_sources, thumbnails
from utils.evaluation.report.report_data import report_data
from utils.predictions import catalog, view_members
from utils.predictions.store import Store

PROBES = ("border pixels", "background colours", "file properties", "file names")


def write_audit(workspace: Workspace, models: Sequence[str]) -> None:
    """An audit of the workspace's images with everything that the section may show: copies, scores, shortcuts."""
    found = catalog.read(workspace)
    names = {
        split: [f"{split}/{path.relative_to(workspace.split_dir / split)}" for path in _files(workspace, split)]
        for split in found.splits
    }
    pairs = [(names["train"][place], names["test"][place]) for place in range(10)]
    figures = {"accuracy": 0.91, "f1_macro": 0.9, "log_loss": 0.3}
    write_json(
        workspace.audit,
        {
            "schema": 1,
            "inputs_digest": "0" * 64,
            "n": sum(facts["n"] for facts in found.splits.values()),
            "splits": {split: {"n": facts["n"], "digest": facts["digest"]} for split, facts in found.splits.items()},
            "duplicates": {
                "pairs": [
                    {"first": first, "second": second, "relation": "mirrored or turned", "similarity": 0.97}
                    for first, second in pairs
                ],
                "groups": [
                    {"images": [*pair, *names["val"][:3]], "splits": 2, "labels": list(found.classes[:2])}
                    for pair in pairs
                ],
                "across_splits": 10,
                "with_different_labels": 10,
                "affected": {"val": names["val"][:3], "test": [second for _, second in pairs]},
            },
            "scores": [
                {"name": name, "kind": "ensemble"}
                | {rows: {"n": n, **figures} for rows, n in (("all", 300), ("without", 290), ("affected", 10))}
                for name in models
            ],
            "recommended": {"name": models[0], "accuracy": 0.91},
            "probes": [
                {"name": name, "accuracy": 0.74, "chance": 0.31, "chance_95": 0.35, "p_value": 0.002, "rows": 300}
                | {"stands_out": name in PROBES[:2]}
                for name in PROBES
            ],
            "classes": [
                {"name": name, "images": dict.fromkeys(found.splits, 40), "width": 4000, "height": 3000}
                | {"jpeg_quality": 90, "brightness": 0.4, "contrast": 0.2}
                for name in found.classes
            ],
            "imbalance_ratio": 3.5,
            "unreadable": [{"image": names["val"][0], "reason": "image file is truncated (12 bytes not processed)"}],
            "nearly_empty": names["train"][:2],
            "label_issues": {"in_doubt": 7, "model": models[0], "n": 300},
            "notes": {"file names": "fewer than two patterns"},
        },
    )


def write_maps(workspace: Workspace, config: Config) -> None:
    """A map of every example image of the test report, whose mass lies on its edge; one member has none."""
    data = report_data(report_sources.read(Store(config, workspace, catalog.read(workspace)), "test"))
    mass = np.zeros((96, 96), np.float32)
    mass[:12] = 1
    small = thumbnails.of_pixels(overlay(ImageMap(np.full((96, 96, 3), 128, np.uint8), mass / mass.sum())))
    picture: dict[str, Any] = {"uri": small.uri, "width": small.width, "height": small.height, "outside_centre": 0.8}
    pictures = {example_maps.image_key(item): picture for item in data.examples}
    without = {data.members[0].name: "no layer with a grid of 4 x 4 positions or more that its logits depend on"}
    record = {"key": example_maps.record_key(data), "pictures": pictures, "without": without}
    write_json(workspace.report_maps("test"), record)


def write_view_choices(workspace: Workspace) -> None:
    """Choices of views for three members: some, none because folds disagree, and none to choose from."""
    chosen = {"views": ["flip", "five_crop"], "chosen_on_all_rows": ["flip", "five_crop"], "accuracy_gain": 0.01}
    unstable = {"views": [], "chosen_on_all_rows": ["rotations"], "log_loss_gain": 0.001, "log_loss_gain_ci95": None}
    choices = (
        chosen | {"log_loss_gain": 0.042, "log_loss_gain_ci95": [0.01, 0.074]},
        unstable | {"accuracy_gain": 0.0},
        {"views": [], "reason": "no out-of-sample rows"},
    )
    for member, choice in zip(catalog.read(workspace).members.values(), choices, strict=False):
        networks = view_members.networks_digest(member)
        write_json(workspace.view_choice(member.name), {"key": "0" * 64, "networks": networks, **choice})


def _files(workspace: Workspace, split: str) -> list[Any]:
    return sorted(path for path in (workspace.split_dir / split).rglob("*") if path.is_symlink() or path.is_file())
