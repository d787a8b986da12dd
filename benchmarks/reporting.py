"""What every benchmark prints: a table for people, and one JSON object as its last line."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def row(what: str, figure: float | None, unit: str, goal: str | None, holds: bool | None, peer: str | None) -> dict:
    """One row of the report; None where something was not measured, or is no number, or has no goal."""
    value = None if figure is None or not np.isfinite(figure) else round(figure, 3)
    return {"what": what, "figure": value, "unit": unit, "goal": goal, "holds": holds, "peer": peer}


def report(
    benchmark: str, rows: list[dict], *, quick: bool, packages: Sequence[str], card: str | None = None, **facts: Any
) -> None:
    """Print the rows; `packages` are those whose versions matter, `facts` go into the JSON object beside them.

    `card` describes the GPU that was measured, and becomes a fact of the machine.
    """
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    machine = {"processor": _processor(), "cores": _cores(), "system": f"{platform.system()} {platform.release()}"}
    machine |= {"card": card} if card else {}
    packages_text = ", ".join(f"{name} {found}" for name, found in versions.items())
    print("; ".join([f"{machine['processor']}, {machine['cores']} cores", *([card] if card else []), packages_text]))
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


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    Linux counts it in `ru_maxrss` together with that of the process which started this one, but not in `VmHWM`.
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def clean_environment() -> dict[str, str]:
    """This process's, without the settings of whoever runs it.

    Programs keep their bytecode, as users' do: without it each compiles 400 modules.
    """
    settings = ("BASE_BACK_DIR", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith("DBT_") and name not in settings}


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of a few values by Student's t; None for one value."""
    if len(values) < 2:
        return None
    half = _quantile(len(values)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def mean_with_interval(values: Sequence[float], form: str) -> str:
    """The mean of a few values and its `interval` where there is one, each in the format `form`."""
    bounds = interval(values)
    return f"{np.mean(values):{form}}" + (f" [{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else "")


def _quantile(count: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
