"""The YAML header of an export's model card for the Hugging Face Hub; `model-index` has the scores on test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TASK = {"type": "image-classification", "name": "Image classification"}
METRICS = {
    "accuracy": ("accuracy", "Accuracy"),
    "f1_macro": ("f1", "F1 macro"),
    "log_loss": ("log_loss", "Log-loss"),
    "ece": ("ece", "Expected calibration error"),
}
"""{key of `metrics.json`: type and name of the metric on the hub}"""
MARKS = ("contaminated", "optimistic", "unknown_training_data")
"""Keys that mark scores that may be too high; these scores are only in the text of the card, not in the header."""


def hub_header(name: str, score: Mapping[str, Any] | None) -> str:
    """The header between lines of three hyphens, with a `model-index` if there are unbiased scores."""
    import yaml

    header: dict[str, Any] = {"pipeline_tag": TASK["type"], "tags": [TASK["type"], "ensemble"]}
    if score is not None and not any(score.get(mark) for mark in MARKS):
        split = str(score["split"])
        results = {
            "task": dict(TASK),
            "dataset": {"type": "imagefolder", "name": f"images of the workspace, {split}", "split": split},
            "metrics": [
                {"type": kind, "value": float(score[key]), "name": title} for key, (kind, title) in METRICS.items()
            ],
        }
        header["model-index"] = [{"name": name, "results": [results]}]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n"
