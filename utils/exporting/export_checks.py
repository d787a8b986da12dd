"""Lists the formats that can be written here, and verifies an earlier export, also one from another machine."""

from __future__ import annotations

import importlib.util
import sys
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
from utils.core.record_forms import Each, Form
from utils.core.results import Result
from utils.core.workspace import Workspace
from utils.exporting import (
    custom_format,
    export_folder,
    exported_programs,
    parity_check,
    runtimes,
    tflite_conversion,
)
from utils.exporting.export_formats import CUSTOM, FORMATS, TENSORRT, TFLITE
from utils.exporting.parity_check import (
    MAX_DISCONTINUITY_FRACTION,
    FileOutputs,
    FileRunError,
    ReferenceBatches,
    RuntimeProcess,
)
from utils.exporting.reduced_precision import REDUCED

REQUIRED_PACKAGES: dict[str, tuple[str, ...]] = {
    "state_dict": ("torch", "safetensors"),
    "checkpoint": ("torch",),
    "torchscript": ("torch",),
    "exported_program": ("torch",),
    "onnx": ("torch", "onnx", "onnxruntime"),
    TFLITE: ("litert_torch", "ai_edge_litert"),
    TENSORRT: ("tensorrt",),
    CUSTOM: (),
}
STANDALONE = ("torchscript", "exported_program", "onnx", *REDUCED, TFLITE)
"""Formats whose files contain the networks, so that they run without the workspace."""

DESCRIPTION_FORM: Form = {"ensemble": str, "input": {"kind": str}, "outputs": Each(str, list), "jumps": bool}


def list_tools() -> Result:
    """List the packages that each format needs, their versions, and how to install missing ones."""
    tools = {name: _tools_of(name) for name in FORMATS}
    lines = [f"{name:<12} {'ready' if facts['ready'] else 'no   '}  {facts['words']}" for name, facts in tools.items()]
    return Result("\n".join(lines), {"formats": tools})


def _tools_of(format_name: str) -> dict[str, Any]:
    if format_name == TFLITE:
        reason = tflite_conversion.missing_tools()
        message = reason or f"litert-torch and an interpreter in {tflite_conversion.python_interpreter()}"
        return {"ready": reason is None, "words": message}
    if format_name == TENSORRT:
        message = "trtexec builds the engine on the machine that runs it; export_status.json holds the command"
        return {"ready": False, "words": message}
    versions = {package: _installed_version(package) for package in REQUIRED_PACKAGES[format_name]}
    missing = [package for package, installed in versions.items() if installed is None]
    states = [f"{package} {installed or 'is not installed'}" for package, installed in versions.items()]
    install = f". Install: pip install {' '.join(missing)}" if missing else ""
    return {"ready": not missing, "words": (", ".join(states) or "no packages needed") + install}


def _installed_version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return "unknown"


def verify(workspace: Workspace, folder: Path, *, trust: bool = False) -> Result:
    """Check the checksums of an export, and its parity on the rows in it.

    `folder` is relative to the working directory, else to the workspace. State dicts and checkpoints are loaded into
    networks of the workspace, and are skipped if it lacks the ensemble. Programs run if this workspace wrote them, or
    with `trust`. Raises UserError for a folder that is not an export, for changed files (naming each), for programs
    that may not run, and for a failed parity check.
    """
    folder = _existing_folder(workspace, folder)
    if mismatches := export_folder.checksum_mismatches(folder):
        raise UserError(f"{folder}: changed since the export: {'; '.join(mismatches)}. {export_folder.EXPORT_AGAIN}")
    status = _required(folder / export_folder.STATUS, export_folder.read_status(folder))
    metadata = folder / export_folder.METADATA
    record = read_record(metadata, remedy=export_folder.EXPORT_AGAIN, form={"training": DESCRIPTION_FORM})
    description = _required(metadata, record)["training"]
    exported_programs.require_runnable(workspace, folder, status, trust=trust)
    arrays = read_arrays(folder / CUSTOM / custom_format.PARITY_FILE, remedy=export_folder.EXPORT_AGAIN)
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        for name in (*FORMATS, *REDUCED):
            entry = status.get(name)
            if entry is not None and entry["status"] == "ok" and entry.get("parity"):
                checks[name] = _check_format(folder, name, entry, description, arrays, Path(scratch))
    lines = [f"{folder}: checksums match"]
    lines += [f"  {name:<12} {facts['status']}: {facts['words']}" for name, facts in checks.items()]
    failures = [f"{name}: {facts['words']}" for name, facts in checks.items() if facts["status"] == "failed"]
    if failures:
        raise UserError(f"{folder}: {'; '.join(failures)}. {export_folder.EXPORT_AGAIN}")
    skipped = [f"{name}: {facts['words']}" for name, facts in checks.items() if facts["status"] == "skipped"]
    return Result("\n".join(lines), {"folder": str(folder), "formats": checks}, skipped)


def _existing_folder(workspace: Workspace, folder: Path) -> Path:
    """The absolute path of the folder. Raises UserError if it does not exist."""
    candidates = list(dict.fromkeys([folder.absolute(), workspace.root / folder]))
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise UserError(
        f"--verify {folder}: no such folder (searched: {', '.join(map(str, candidates))}). Give the folder that export "
        f"wrote, such as {workspace.exports / 'NAME'}"
    )


def _required(path: Path, record: dict[str, Any] | None) -> dict[str, Any]:
    """The record of an export at `path`. Raises UserError if there is none."""
    if record is None:
        raise UserError(f"{path}: no such file, so the folder is not an export. Give the folder that export wrote")
    return record


def _check_format(
    folder: Path,
    format_name: str,
    entry: Mapping[str, Any],
    description: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    scratch: Path,
) -> dict[str, Any]:
    """Run the files of one format on the stored rows and compare: `status`, `words` and `parity`."""
    is_tflite = format_name == TFLITE
    if is_tflite and (reason := tflite_conversion.missing_tools()):
        return {"status": "skipped", "words": reason, "parity": None}
    reference = stored_batches(arrays, fixed=is_tflite)
    signature = {
        "input": description["input"]["kind"],
        "member_probabilities": "member_probabilities" in description["outputs"],
    }
    job = {
        "project": str(base_back.PROJECT),
        "name": description["ensemble"],
        "signature": signature,
        "environment": {},
        "threads": entry.get("threads"),  # as when the export was written; missing in earlier exports
    }
    files = [folder / file for file in export_folder.entry_files(folder, entry) if not file.endswith(".data")]
    try:
        with RuntimeProcess(
            format_name,
            files,
            reference,
            description["outputs"],
            scratch / format_name,
            job=job,
            python=tflite_conversion.python_interpreter() if is_tflite else sys.executable,
        ) as process:
            outputs_of_files = process.outputs()
    except FileRunError as error:
        status = "failed" if format_name in STANDALONE else "skipped"
        return {"status": status, "words": str(error), "parity": None}
    parity: dict[str, Any] | None = None
    tolerance = entry["parity"]["tolerance"]
    for file, file_outputs in zip(files, outputs_of_files, strict=True):
        outcome = parity_check.compare_outputs(reference, file_outputs, tolerance)
        parity = outcome["parity"]
        # The combiner, which determines the discontinuities, is not part of the export.
        is_excused = description["jumps"] and _few_rows_differ(reference, file_outputs, tolerance)
        if not outcome["passed"] and not is_excused:
            return {"status": "failed", "words": f"{file.name}: {outcome['reason']}", "parity": parity}
    assert parity is not None
    message = f"{parity['rows']} rows, largest difference {parity['max_abs_diff']:.1e}"
    return {"status": "ok", "words": message, "parity": parity}


def _few_rows_differ(reference: ReferenceBatches, file_outputs: FileOutputs, tolerance: float) -> bool:
    """Whether the number of differing rows is within the allowance for discontinuities of the combiner."""
    expected = reference.probabilities[file_outputs.rows]
    differences = np.abs(expected - file_outputs.outputs["probabilities"]).max(axis=1)
    return bool((differences > tolerance).mean() <= MAX_DISCONTINUITY_FRACTION)


def stored_batches(arrays: Mapping[str, np.ndarray], *, fixed: bool) -> ReferenceBatches:
    """The rows of `parity.npz` in batches; with `fixed`, in batches of one row of the network's image size."""
    batches_by_name = runtimes.grouped_batches({name: arrays[name] for name in arrays if name.startswith("batch_")})
    reference = ReferenceBatches(
        list(batches_by_name.values()),
        [arrays[name.replace("batch_", "rows_")] for name in batches_by_name],
        arrays["probabilities"],
    )
    if not fixed:
        return reference
    if "squares" in arrays:
        batches, rows = parity_check.make_batches([(square,) for square in arrays["squares"]], (1,))
        return replace(reference, batches=batches, rows=rows)
    single = [
        (tuple(array[index : index + 1] for array in batch), rows[index : index + 1])
        for batch, rows in zip(reference.batches, reference.rows, strict=True)
        for index in range(len(rows))
    ]
    return replace(reference, batches=[batch for batch, _ in single], rows=[rows for _, rows in single])
