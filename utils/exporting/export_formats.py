"""The export formats: the packaging or converter that writes their files, and their status entries."""

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

PACKAGED = ("state_dict", "checkpoint", "torchscript", "exported_program", "onnx")
"""Formats that the bundled base pipeline writes."""
TFLITE, TENSORRT, CUSTOM = "tflite", "tensorrt", "custom"
FORMATS = (*PACKAGED, TFLITE, TENSORRT, CUSTOM)


def format_entry(status: str, **values: Any) -> dict[str, Any]:
    """One format's entry in `export_status.json`; `status` is ok, failed or skipped."""
    empty = dict.fromkeys(("reason", "path", "sha256", "size_mb", "seconds", "parity"))
    return {"status": status, "versions": {"python": platform.python_version()}} | empty | values


def entry_of_files(folder: Path, paths: Sequence[Path], **values: Any) -> dict[str, Any]:
    """The entry of a format with written files; `path`, `sha256` and `size_mb` are those of the first file."""
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    first_name = next(iter(files))
    size_mb = round(paths[0].stat().st_size / 1e6, 3)
    return format_entry("ok", path=first_name, sha256=files[first_name], size_mb=size_mb, files=files, **values)


def summarize_entry(entry: Mapping[str, Any]) -> str:
    """One line for the user: status, path, size and parity of a format."""
    if entry["status"] != "ok":
        return f"{entry['status']}: {entry['reason']}"
    parity = entry.get("parity")
    if not parity:
        return f"ok, {entry['path']}"
    n_near_threshold, accuracy = parity["near_threshold"], entry.get("test_accuracy")
    return (
        f"ok, {entry['path']}, {entry['size_mb']:.2f} MB: {parity['rows']} real rows, largest difference "
        f"{parity['max_abs_diff']:.1e} (allowed {parity['tolerance']:g}), {parity['label_flips']} label flips"
        + (f", {n_near_threshold} at a discontinuity of the combiner" if n_near_threshold else "")
        + (f", test accuracy {accuracy['change']:+.4f}" if accuracy else "")
    )


def write_packaged_formats(
    network: nn.Module,
    name: str,
    formats: Sequence[str],
    staged: Path,
    sample: Tensor | Sequence[Tensor],
    description: Mapping[str, Any],
    classes: Sequence[str],
    on_entry: Callable[[str, dict[str, Any]], object] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write formats with the bundled base pipeline's packaging: {format: entry}. A failed format does not stop others.

    `on_entry(format, entry)` is called as soon as a format is written. `sample` holds the inputs of the network, or its
    only input, with a batch dimension. Raises UserError for a name that is not a valid file name.
    """
    try:
        summary = base_back.bundled_export().export_and_package_model(
            network,
            name,
            sample_input=sample,
            export_formats=formats,
            deploy_root=staged.parent,
            force=True,
            training_metadata=description,
            class_names=list(classes),
            logger_inst=logger,
            on_entry=on_entry,
        )
    except ValueError as error:
        raise UserError(f"{name}: cannot be exported, {error}") from error
    results: dict[str, dict[str, Any]] = summary["export_results"]
    return results


def write_tflite(
    open_network: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], name: str, staged: Path, scratch: Path
) -> dict[str, Any]:
    """Write the TFLite file; its entry is `skipped` if the tools are missing or the network has no fixed size."""
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
    # Any error of the converter fails only this format.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return format_entry("failed", reason=reason, seconds=round(time.perf_counter() - started, 3))
    return entry_of_files(staged, [path], seconds=round(time.perf_counter() - started, 3))


def tensorrt_entry(name: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """A `skipped` entry: an engine is built on the machine that runs it, with the command in the reason."""
    described = description["input"]

    def shape(entry: Mapping[str, Any], batch: int) -> str:
        _, *sizes = entry["shape"]
        if None in sizes:
            sizes = [described["img_size"], described["img_size"], 3]
        return f"{entry['name']}:{'x'.join(map(str, (batch, *sizes)))}"

    shapes = " ".join(
        f"--{bound}Shapes={','.join(shape(entry, batch) for entry in described.get('inputs', [described]))}"
        for bound, batch in (("min", 1), ("opt", 16), ("max", 64))
    )
    return format_entry(
        "skipped",
        reason="a TensorRT engine is specific to its GPU; build it there from the ONNX file: mkdir -p tensorrt && "
        f"trtexec --onnx=onnx/{name}.onnx --saveEngine=tensorrt/{name}_trt.engine {shapes}",
    )
