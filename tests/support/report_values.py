"""What the sections of a report read, made of figures instead of a workspace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from utils.evaluation.report.report_data import ReportData


def report_values(metrics: dict[str, dict], focus: str, *, classes: tuple[str, ...] = (), **more: Any) -> ReportData:
    """Data of a report about `focus`, one of the models of `metrics`; `more` are other fields of `ReportData`."""
    empty = {
        **{"workspace": None, "ranking": {}, "records": {}, "members": (), "predictions": None, "peers": {}},
        **{"contributions": None, "examples": (), "notes": ()},
    }
    catalog = SimpleNamespace(classes=classes)
    return ReportData(**empty | {"catalog": catalog, "split": "test", "metrics": metrics, "focus": focus} | more)
