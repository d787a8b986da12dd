"""What every benchmark prints: a table for people, and one JSON object as its last line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def row(what: str, figure: float | None, unit: str, goal: str | None, holds: bool | None, peer: str | None) -> dict:
    """One row of the report; None where something was not measured or has no goal."""
    value = None if figure is None else round(figure, 3)
    return {"what": what, "figure": value, "unit": unit, "goal": goal, "holds": holds, "peer": peer}


def report(benchmark: str, rows: list[dict], *, quick: bool, packages: Sequence[str], **facts: Any) -> None:
    """Print the rows; `packages` are those whose versions matter, `facts` go into the JSON object beside them."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    machine = {"processor": _processor(), "cores": _cores(), "system": f"{platform.system()} {platform.release()}"}
    said = ", ".join(f"{name} {found}" for name, found in versions.items())
    print(f"{machine['processor']}, {machine['cores']} cores; {said}")
    for entry in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[entry["holds"]]
        figure = "-" if entry["figure"] is None else f"{entry['figure']:.3f}"
        print(f"{entry['what']:72} {figure:>9} {entry['unit']}")
        if entry["goal"] or entry["peer"]:
            print(f"{'':72} goal: {entry['goal'] or '-'}; beside it: {entry['peer'] or '-'}  {verdict}")
    print(
        json.dumps(
            {"benchmark": benchmark, "quick": quick, "machine": machine, "versions": versions, "rows": rows} | facts
        )
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
