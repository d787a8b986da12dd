"""What holds of a workspace whatever was done to it; each check returns the violations in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from equality import unfinished

OURS = ("ensembles", "metrics_output/ensembles", "deployment_models")
CURRENT = "current"
ALLOWED = (0, 1, 2, 3, 4)
SIGNALS = (-9, -15, 130, 143)


def of_an_end(line: str, code: int, stderr: str, *, was_stopped: bool) -> Iterator[str]:
    """A command ends well, with an error of the project's own, or by the signal that it was sent."""
    if code not in ALLOWED and not (was_stopped and code in SIGNALS):
        yield f"{line}: exit code {code}: {stderr[-1500:]}"
    if "Traceback" in stderr:
        yield f"{line}: a traceback: {stderr[-1500:]}"


def of_files(workspace: Path) -> Iterator[str]:
    """Every record of ours is whole, and what it names is there as it says."""
    for place in OURS:
        for path in sorted((workspace / place).rglob("*.json")):
            if path.name.startswith("."):
                continue
            try:
                json.loads(path.read_text())
            except FileNotFoundError:
                continue
            except ValueError as error:
                yield f"{path.relative_to(workspace)} is no JSON: {error}"
    for path in sorted((workspace / "ensembles" / "models").glob("*/ensemble.json")):
        yield from _of_an_ensemble(path)
    yield from _of_exports(workspace)


def _of_an_ensemble(path: Path) -> Iterator[str]:
    record = json.loads(path.read_text())
    for name in ("combiner.safetensors", "crossfit.npz", "provenance.npz", *record["texts"]):
        if not (path.parent / name).is_file():
            yield f"{path.parent.name}: {name} is not there"
    for name, entry in record["texts"].items():
        file = path.parent / name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            yield f"{path.parent.name}: {name} is not what its record says"
    for name in ("crossfit.npz", "provenance.npz"):
        try:
            with np.load(path.parent / name) as arrays:
                rows = {key: len(arrays[key]) for key in arrays.files}
        except (OSError, ValueError) as error:
            yield f"{path.parent.name}: {name}: {error}"
            continue
        if name == "crossfit.npz" and len({rows[key] for key in ("probabilities", "labels", "sample_ids")}) != 1:
            yield f"{path.parent.name}: {name} has {rows} rows"


def _of_exports(workspace: Path) -> Iterator[str]:
    for path in sorted((workspace / "deployment_models").glob("*/export_status.json")):
        for kind, entry in json.loads(path.read_text()).items():
            for name, digest in (entry.get("files") or {}).items() if entry.get("status") == "ok" else ():
                file = path.parent / name
                if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                    yield f"export {path.parent.name}: {kind} names {name}, which is not there as it says"


def of_status(workspace: Path, status: dict[str, Any], *, undisturbed: bool) -> Iterator[str]:
    """What `status` says is so; `undisturbed` where nothing was killed since the last `clean`."""
    saved = {path.parent.name for path in (workspace / "ensembles" / "models").glob("*/ensemble.json")}
    listed = {name for name, state in status["ensembles"].items() if state["state"] != "missing"}
    if status["catalog"]["state"] not in ("missing", "damaged") and saved != listed:
        yield f"status tells of the ensembles {sorted(listed)}; there are {sorted(saved)}"
    if status["writer"] is not None and not status["writer"]["dead"]:
        yield f"status tells of a writer, and there is none: {status['writer']}"
    if status["catalog"]["state"] == CURRENT:
        catalog = json.loads((workspace / "ensembles" / "ensemble_catalog.json").read_text())
        for name, member in catalog["members"].items():
            for entry in member.get("checkpoints") or ():
                if not (workspace / entry["path"]).is_file():
                    yield f"a current catalog names {entry['path']} of {name}, which is not there"
        for name, state in status["ensembles"].items():
            if state["state"] == CURRENT:
                record = json.loads((workspace / "ensembles" / "models" / name / "ensemble.json").read_text())
                members = record["members"]
                missing = [each for each in members if each not in catalog["members"]]
                if missing:
                    yield f"{name} is current, and {missing} are no members"
    if status["evaluation"]["state"] == CURRENT:
        ranking = json.loads((workspace / "metrics_output" / "ensembles" / "ranking.json").read_text())
        for row in ranking["rows"]:
            folder = "members/" if row["kind"] == "member" else ""
            if not (workspace / "metrics_output" / "ensembles" / f"{folder}{row['name']}" / "metrics.json").is_file():
                yield f"a current ranking names {row['name']}, which has no metrics.json"
            if row["kind"] == "ensemble" and row["name"] not in saved:
                yield f"a current ranking names {row['name']}, which is no ensemble"
    if undisturbed:
        if left := unfinished(workspace):
            yield f"temporary files are left: {left}"
        if (workspace / "ensembles" / ".lock").exists():
            yield "a lock is left"


def of_a_build(before: dict[str, Any], document: dict[str, Any]) -> Iterator[str]:
    """A build makes what `status` called stale or missing, and keeps what it called current."""
    if before["catalog"]["state"] != CURRENT or before["problems"]:
        return
    states = {name: state["state"] for name, state in before["ensembles"].items()}
    if wrong := [name for name in document["built"] if states.get(name) == CURRENT]:
        yield f"status called {wrong} current, and build-ensemble built them"
    if wrong := [name for name in document["up_to_date"] if states.get(name) != CURRENT]:
        yield f"build-ensemble keeps {wrong}, and status called them {[states.get(name) for name in wrong]}"
