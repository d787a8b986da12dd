"""What can be exported here, and whether an export of earlier, or of another machine, still holds."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from utils import base_back
from utils.core.artifacts import read_arrays, read_record
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.exporting import custom_format, export_folder, exported_programs, parity_check, tflite_conversion
from utils.exporting.export_formats import CUSTOM, FORMATS, TENSORRT, TFLITE
from utils.exporting.parity_check import MAX_DISCONTINUITY_FRACTION, FileRunError, ReferenceBatches, run_in_subprocess
from utils.exporting.reduced_precision import REDUCED

logger = logging.getLogger("disease_pipeline")

REQUIRED_PACKAGES: dict[str, tuple[str, ...]] = {
    "state_dict": ("torch", "safetensors"),
    "checkpoint": ("torch",),
    "torchscript": ("torch",),
    "onnx": ("torch", "onnx", "onnxruntime"),
    TFLITE: ("litert_torch", "ai_edge_litert"),
    TENSORRT: ("tensorrt",),
    CUSTOM: (),
}
WITHOUT_WORKSPACE = ("torchscript", "onnx", *REDUCED, TFLITE)


def list_tools() -> Result:
    """For each format what it needs, what of it is here, and the line that installs the rest."""
    found = {name: _tool(name) for name in FORMATS}
    lines = [f"{name:<12} {'ready' if facts['ready'] else 'no   '}  {facts['words']}" for name, facts in found.items()]
    return Result("\n".join(lines), {"formats": found})


def _tool(name: str) -> dict[str, Any]:
    if name == TFLITE:
        reason = tflite_conversion.missing_tools()
        words = reason or f"litert-torch and an interpreter in {tflite_conversion.python_interpreter()}"
        return {"ready": reason is None, "words": words}
    if name == TENSORRT:
        words = "built by trtexec on the machine that runs it; export_status.json holds the command"
        return {"ready": False, "words": words}
    versions = {need: _version(need) for need in REQUIRED_PACKAGES[name]}
    lacking = [need for need, known in versions.items() if known is None]
    words = ", ".join(f"{need} {known or 'is not installed'}" for need, known in versions.items()) or "needs nothing"
    install = f". Install: pip install {' '.join(lacking)}" if lacking else ""
    return {"ready": not lacking, "words": words + install}


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return "unknown"


def verify(workspace: Workspace, folder: Path, *, trust: bool = False) -> Result:
    """Checksums and parity of an export again, by the rows that lie in it.

    `folder` is relative to the working directory, else to the workspace. State dicts and checkpoints are put into
    networks of the workspace, where it has the ensemble. Programs run if this workspace wrote them, or with `trust`.
    Raises UserError for a folder that is no export, for files that were tampered with, each named, and for programs
    that may not run.
    """
    folder = _located(workspace, folder)
    if wrong := export_folder.checksum_mismatches(folder):
        raise UserError(f"{folder}: not as it was exported: {'; '.join(wrong)}. {export_folder.EXPORT_AGAIN}")
    status = _record(folder / export_folder.STATUS)
    description = _record(folder / export_folder.METADATA)["training"]
    exported_programs.require_runnable(workspace, folder, status, trust=trust)
    kept = read_arrays(folder / CUSTOM / custom_format.PARITY_FILE, remedy=export_folder.EXPORT_AGAIN)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        for name in (*FORMATS, *REDUCED):
            entry = status.get(name)
            if entry is not None and entry["status"] == "ok" and entry.get("parity"):
                found[name] = _again(folder, name, entry, description, kept, Path(scratch))
    lines = [f"{folder}: checksums hold"]
    lines += [f"  {name:<12} {facts['status']}: {facts['words']}" for name, facts in found.items()]
    failures = [f"{name}: {facts['words']}" for name, facts in found.items() if facts["status"] == "failed"]
    if failures:
        raise UserError(f"{folder}: {'; '.join(failures)}. {export_folder.EXPORT_AGAIN}")
    left = [f"{name}: {facts['words']}" for name, facts in found.items() if facts["status"] == "skipped"]
    return Result("\n".join(lines), {"folder": str(folder), "formats": found}, left)


def _located(workspace: Workspace, folder: Path) -> Path:
    """The absolute folder. Raises UserError where there is none."""
    places = list(dict.fromkeys([folder.absolute(), workspace.root / folder]))
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"--verify {folder}: no such folder ({' and '.join(map(str, places))} looked for). Give the folder that export "
        f"wrote, such as {workspace.exports / 'NAME'}"
    )


def _record(path: Path) -> dict[str, Any]:
    record = read_record(path, remedy=export_folder.EXPORT_AGAIN)
    if record is None:
        raise UserError(f"{path}: no such file, so this is no export. Give the folder that export wrote")
    return record


def _again(
    folder: Path,
    name: str,
    entry: Mapping[str, Any],
    description: Mapping[str, Any],
    kept: Mapping[str, np.ndarray],
    scratch: Path,
) -> dict[str, Any]:
    """One format run and compared again."""
    if name == TFLITE and (reason := tflite_conversion.missing_tools()):
        return {"status": "skipped", "words": reason, "parity": None}
    python = {"python": tflite_conversion.python_interpreter()} if name == TFLITE else {}
    probe = stored_batches(kept, fixed=name == TFLITE)
    form = {
        "input": description["input"]["kind"],
        "member_probabilities": "member_probabilities" in description["outputs"],
    }
    job = {"project": str(base_back.PROJECT), "name": description["ensemble"], "form": form, "environment": {}}
    parity: dict[str, Any] | None = None
    files = [folder / file for file in export_folder.entry_files(folder, entry) if not file.endswith(".data")]
    try:
        answered = run_in_subprocess(name, files, probe, description["outputs"], scratch / name, job=job, **python)
    except FileRunError as error:
        return {"status": "failed" if name in WITHOUT_WORKSPACE else "skipped", "words": str(error), "parity": None}
    for file, answers in zip(files, answered, strict=True):
        tolerance = entry["parity"]["tolerance"]
        outcome = parity_check.compare_outputs(probe, answers, tolerance)
        parity = outcome["parity"]
        if not outcome["passed"] and not (description["jumps"] and _differ_at_steps(probe, answers, tolerance)):
            return {"status": "failed", "words": f"{file.name}: {outcome['reason']}", "parity": parity}
    assert parity is not None
    words = f"{parity['rows']} rows, largest difference {parity['max_abs_diff']:.1e}"
    return {"status": "ok", "words": words, "parity": parity}


def _differ_at_steps(probe: ReferenceBatches, answers: parity_check.FileOutputs, tolerance: float) -> bool:
    """Whether few enough rows differ for a combiner with steps, which is not at hand to tell where they are."""
    differing = np.abs(probe.probabilities[answers.rows] - answers.outputs["probabilities"]).max(axis=1)
    return bool((differing > tolerance).mean() <= MAX_DISCONTINUITY_FRACTION)


def stored_batches(kept: Mapping[str, np.ndarray], *, fixed: bool) -> ReferenceBatches:
    """The rows that an export keeps; `fixed`: one at a time, cut to size."""
    numbers = sorted(name.removeprefix("batch_") for name in kept if name.startswith("batch_"))
    probe = ReferenceBatches(
        [kept[f"batch_{number}"] for number in numbers],
        [kept[f"rows_{number}"] for number in numbers],
        kept["probabilities"],
    )
    if not fixed:
        return probe
    if "squares" in kept:
        batches, rows = parity_check.make_batches(list(kept["squares"]), (1,))
        return replace(probe, batches=batches, rows=rows)
    single = [
        (batch[place : place + 1], rows[place : place + 1])
        for batch, rows in zip(probe.batches, probe.rows, strict=True)
        for place in range(len(batch))
    ]
    return replace(probe, batches=[batch for batch, _ in single], rows=[rows for _, rows in single])
