"""The form of `audit.json`, which `audit` writes and the report shows."""

from __future__ import annotations

from utils.core.record_forms import Each, Form

TEXTS = Each(str, list)
FIGURES: Form = {"n": int, "accuracy?": float, "f1_macro?": float, "log_loss?": float}
AUDIT: Form = {
    "schema": int,
    "inputs_digest": str,
    "n": int,
    "splits": Each({"n": int, "digest": str}),
    "duplicates": {
        "pairs": Each({"first": str, "second": str, "relation": str, "similarity": float}, list),
        "groups": Each({"images": TEXTS, "splits": int, "labels": TEXTS}, list),
        "across_splits": int,
        "with_different_labels": int,
        "affected": Each(TEXTS),
    },
    "scores": Each({"name": str, "kind": str, "all": FIGURES, "without": FIGURES, "affected": FIGURES}, list),
    "recommended?": {"name": str, "accuracy": float},
    "probes": Each(
        {
            "name": str,
            **dict.fromkeys(("accuracy", "chance", "chance_95", "p_value"), float),
            "stands_out": bool,
            "rows": int,
        },
        list,
    ),
    "classes": Each(
        {
            "name": str,
            "images": Each(int),
            **dict.fromkeys(("width?", "height?", "jpeg_quality?", "brightness?", "contrast?"), float),
        },
        list,
    ),
    "imbalance_ratio?": float,
    "unreadable": Each({"image": str, "reason": str}, list),
    "nearly_empty": TEXTS,
    "label_issues?": {"in_doubt?": int, "model?": str, "n?": int},
    "notes": Each(str),
}
