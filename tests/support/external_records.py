"""A record of `evaluate --data` with every key, for pages and texts of external sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from utils.core.artifacts import write_json
from utils.core.workspace import Workspace


def change(test: float, external: float, half: float | None = 0.05) -> dict[str, Any]:
    """One figure on test and on the set, with an interval of this half-width."""
    difference = external - test
    interval = None if half is None else [difference - half, difference + half]
    return {"test": test, "external": external, "change": difference, "ci95": interval}


def external_record(
    models: Sequence[str], classes: Sequence[str], *, image: str = "a/1.jpg", recommended: str | None = None
) -> dict[str, Any]:
    """`external.json` of a set whose first class drops, with a copy, an unreadable image and a renamed class."""
    entries = [
        {
            "class": name,
            "support": 50,
            "test_support": 20,
            **change(0.9, 0.4 if place == 0 else 0.85),
            "drops": place == 0,
        }
        for place, name in enumerate(classes)
    ]
    coverage = {"promised": 0.9, "test": 0.91, "external": 0.62, "test_mean_size": 1.1, "mean_size": 1.9}
    answered = {"test": {"answered": 0.8, "error": 0.02}, "external": {"answered": 0.6, "error": 0.2}}
    facts = {
        "test_n": 60,
        "drop": {"accuracy": change(0.93, 0.71)},
        "classes": entries,
        "calibration": {
            "temperature": 1.2,
            "ece": change(0.03, 0.14),
            "calibrated_ece": {"test": 0.02, "external": 0.11},
        },
        "promises": {
            "conformal": dict.fromkeys(("lac", "aps", "raps"), coverage),
            "selective": {"threshold": 0.8, "target_risk": 0.05, **answered},
        },
        "ood_auroc": {key: {"auroc": 0.83, "ci95": [0.78, 0.87]} for key in ("energy", "max_logit")},
    }
    scores = {"accuracy": 0.71, "f1_macro": 0.7, "log_loss": 0.9, "ece": 0.14}
    rows = [
        {"rank": place, "name": name, "kind": "ensemble", **scores, "ci95": {"accuracy": [0.65, 0.77]}}
        for place, name in enumerate(models, start=1)
    ]
    return {
        "split": "external",
        "n": 200,
        "order": ["log_loss", "log_loss", "name"],
        "rows": rows,
        "set": "field",
        "source": "/somewhere/field",
        "missing": "ignore",
        "classes": {
            "counts": {**dict.fromkeys(classes, 50), "absent one": 0},
            "mapped": {"Other name": classes[0]},
            "unknown": {"weed": ""},
            "dropped": [],
            "absent": ["absent one"],
        },
        "left_out_images": {
            "copies": {image: "train/a/1.jpg"},
            "unreadable": {"b/2.jpg": "no image"},
            "of_other_classes": 3,
        },
        "also_in_test": 1,
        "models": dict.fromkeys(models, facts),
        "recommended": recommended or models[0],
        "peers": {"best_single": None},
        "left_out": {},
    }


def write_external_set(workspace: Workspace, models: Sequence[str], classes: Sequence[str], **options: Any) -> None:
    """Write such a record where `evaluate --data` does."""
    write_json(workspace.external_set("field"), external_record(models, classes, **options))
