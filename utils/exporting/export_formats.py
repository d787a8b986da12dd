"""Which files make a format, and who writes them: the base pipeline's packaging, a converter, or nobody here."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import base_back
from utils.core.errors import UserError
from utils.exporting import tflite_conversion
from utils.exporting.export_folder import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

PACKAGED = ("state_dict", "checkpoint", "torchscript", "onnx")
TFLITE, TENSORRT, CUSTOM = "tflite", "tensorrt", "custom"
FORMATS = (*PACKAGED, TFLITE, TENSORRT, CUSTOM)


def format_entry(status: str, **known: Any) -> dict[str, Any]:
    """One format's line of `export_status.json`."""
    empty = dict.fromkeys(("reason", "path", "sha256", "size_mb", "seconds", "parity"))
    return {"status": status, "versions": {"python": platform.python_version()}} | empty | known


def entry_of_files(folder: Path, paths: Sequence[Path], **known: Any) -> dict[str, Any]:
    """The entry of a format whose files are written; the first is the one that records name."""
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    first = next(iter(files))
    size = sum(path.stat().st_size for path in paths[:1])
    return format_entry("ok", path=first, sha256=files[first], size_mb=round(size / 1e6, 3), files=files, **known)


def write_packaged_formats(
    network: nn.Module,
    name: str,
    formats: Sequence[str],
    staged: Path,
    sample: Tensor,
    description: Mapping[str, Any],
    classes: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Write what the bundled base pipeline's packaging writes; {format: entry}. A failed format stops no other.

    Raises UserError for a name that cannot be a file's.
    """
    try:
        found = base_back.bundled_export().export_and_package_model(
            network,
            name,
            sample_input=sample,
            export_formats=formats,
            deploy_root=staged.parent,
            force=True,
            training_metadata=description,
            class_names=list(classes),
            logger_inst=logger,
        )
    except ValueError as error:
        raise UserError(f"{name}: cannot be exported, {error}") from error
    results: dict[str, dict[str, Any]] = found["export_results"]
    return results


def write_tflite(
    open_network: Callable[[], tuple[nn.Module, Tensor]], name: str, staged: Path, scratch: Path
) -> dict[str, Any]:
    """Write the TFLite file; its entry says `skipped` where the tools are missing or the network has no fixed size."""
    if reason := tflite_conversion.missing_tools():
        return format_entry("skipped", reason=reason)
    started = time.perf_counter()
    path = staged / TFLITE / f"{name}.tflite"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        network, sample = open_network()
        tflite_conversion.convert_network(network, sample, path, scratch)
    except UserError as error:
        path.parent.rmdir()
        return format_entry("skipped", reason=str(error))
    # Whatever stops one format is that format's reason, and the others go on.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return format_entry("failed", reason=reason, seconds=round(time.perf_counter() - started, 3))
    return entry_of_files(staged, [path], seconds=round(time.perf_counter() - started, 3))


def tensorrt_entry(name: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """Never built here; the reason holds the command that builds it from the ONNX file on the machine that runs it."""
    given = description["input"]
    shape = "x".join("{batch}" if size is None else str(size) for size in given["shape"])
    if shape.count("{batch}") > 1:
        shape = "{batch}x" + "x".join(map(str, (given["img_size"], given["img_size"], 3)))
    shapes = " ".join(
        f"--{bound}Shapes={given['name']}:{shape.format(batch=batch)}"
        for bound, batch in (("min", 1), ("opt", 16), ("max", 64))
    )
    return format_entry(
        "skipped",
        reason="an engine belongs to the GPU that runs it; build it there from the ONNX file: mkdir -p tensorrt && "
        f"trtexec --onnx=onnx/{name}.onnx --saveEngine=tensorrt/{name}_trt.engine {shapes}",
    )
