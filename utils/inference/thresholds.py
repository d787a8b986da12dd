"""Thresholds of prediction sets and of abstention, measured by `evaluate`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import read_record
from utils.core.workspace import Workspace
from utils.evaluation.evaluation_records import THRESHOLDS
from utils.numeric import uncertainty

logger = logging.getLogger("disease_pipeline")


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that `evaluate` measured for a model: of prediction sets and of abstention."""

    kind: str
    """Kind of the prediction sets, a key of `uncertainty.NONCONFORMITY_SCORES`"""
    limit: float | None
    """Classes with scores up to this limit are in the set; None if not measured."""
    abstain: float | None
    """The model abstains below this probability of the top class; None if not measured."""

    def apply(self, probabilities: np.ndarray, classes: Sequence[str], images: Sequence[Path]) -> list[dict[str, Any]]:
        """`set` and `abstain` of each image, from probabilities (N, C); None without a measured threshold.

        The files `images` (N,) are read if sets are randomised: the content of an image determines its random number,
        so that a prediction is reproducible.
        """
        results: list[dict[str, Any]] = [{"set": None, "abstain": None} for _ in probabilities]
        if self.limit is not None:
            uniforms = uncertainty.uniform_numbers(map(_digest, images)) if self.kind == "raps" else None
            sets = uncertainty.prediction_sets(self.kind, probabilities, self.limit, uniforms)
            for result, in_set in zip(results, sets, strict=True):
                result["set"] = [classes[index] for index in np.flatnonzero(in_set).tolist()]
        if self.abstain is not None:
            for result, highest in zip(results, probabilities.max(axis=1), strict=True):
                result["abstain"] = bool(highest < self.abstain)
        return results


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_thresholds(workspace: Workspace, name: str, *, is_ensemble: bool, sets: str = "lac") -> Thresholds:
    """The thresholds of a model's newest evaluation on test; a warning names those that are missing or outdated."""
    path = (workspace.ensemble_metrics if is_ensemble else workspace.member_metrics)(name, "test")
    record: Mapping[str, Any] = read_record(path, remedy="Remove it, then evaluate again", form=THRESHOLDS) or {}
    built = workspace.ensemble(name) / "ensemble.json"
    is_outdated = bool(record) and is_ensemble and built.stat().st_mtime_ns > path.stat().st_mtime_ns
    if is_outdated:
        record = {}
    thresholds = Thresholds(
        sets,
        ((record.get("conformal") or {}).get(sets) or {}).get("threshold"),
        (record.get("selective") or {}).get("threshold"),
    )
    missing = [key for key, value in (("set", thresholds.limit), ("abstain", thresholds.abstain)) if value is None]
    if missing:
        reason = "was built again since it was evaluated" if is_outdated else "has no measured thresholds"
        logger.warning(
            "%s %s, so %s stay empty; run: python ensemble_orchestrator.py evaluate",
            name,
            reason,
            " and ".join(missing),
        )
    return thresholds
