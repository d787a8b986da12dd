"""The form of `external.json`, which `evaluate --data` writes for each external set."""

from __future__ import annotations

from utils.core.record_forms import Each, Form
from utils.evaluation.evaluation_records import INTERVAL, SCORES

CHANGE: dict[str, Form] = {"test?": float, "external?": float, "change?": float, "ci95?": INTERVAL}
EXTERNAL_SET: Form = {
    "set": str,
    "source": str,
    "n": int,
    "missing": str,
    "recommended?": str,
    "classes": {
        "counts": Each(int),
        "mapped": Each(str),
        "unknown": Each(str),
        "dropped": Each(str, list),
        "absent": Each(str, list),
    },
    "left_out_images": {"copies": Each(str), "unreadable": Each(str), "of_other_classes": int},
    "also_in_test": int,
    "rows": Each({"name": str, "kind": str, "rank": (int, type(None)), **SCORES, "ci95?": Each(INTERVAL)}, list),
    "models": Each(
        {
            "test_n": int,
            "drop": Each(CHANGE),
            "classes": Each({**CHANGE, "class": str, "support": int, "test_support": int, "drops": bool}, list),
            "calibration": {"temperature?": float, "ece": CHANGE, "calibrated_ece": CHANGE},
            "promises": {"conformal?": Each(dict), "selective?": dict},
            "ood_auroc?": Each({"auroc": float, "ci95": INTERVAL}),
        }
    ),
}
