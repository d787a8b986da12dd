"""ONNX files of reduced precision: the members' networks in 16-bit floats or 8-bit integers.

Preprocessing and combiner stay in 32 bits: there, small differences change labels and little memory would be saved.
"""

from __future__ import annotations

import ast
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.exporting.export_formats import entry_of_files, format_entry

TOLERANCES = {"fp16": 0.01, "int8": 0.1}
"""Largest difference of a probability: rounding errors of 2^-11 and 2^-8, accumulated over a network's layers."""
REDUCED = tuple(f"onnx_{precision}" for precision in TOLERANCES)
"""Formats that are converted from the file of `onnx`."""
MEMBERS = "members."
"""Prefix of the names of the networks' modules."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node written by `dynamo`: a list of the modules that the node belongs to, outermost first."""
QUANTIZED = ["Conv", "Gemm", "MatMul"]
"""Operators that are computed in 8-bit integers."""


def tolerance_of(format_name: str) -> float:
    """Largest allowed difference of a probability for a format in `REDUCED`."""
    return TOLERANCES[format_name.removeprefix("onnx_")]


def write_reduced(
    format_name: str, source: Path, name: str, staged: Path, calibration: Callable[[], Sequence[Sequence[np.ndarray]]]
) -> dict[str, Any]:
    """Write `<format>/<name>_<precision>.onnx` from the 32-bit file `source`; returns its entry.

    `calibration` loads training images, one array per input of the file. On an error, the entry is `failed`, with the
    error as its reason.
    """
    started = time.perf_counter()
    path = staged / format_name / f"{name}_{format_name.removeprefix('onnx_')}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if format_name == "onnx_fp16":
            to_float16(source, path)
        else:
            to_int8(source, path, calibration())
    except Exception as error:  # an error of any library fails only this format
        reason = f"{type(error).__name__}: {error}"
        return format_entry("failed", reason=reason, seconds=round(time.perf_counter() - started, 3))
    return entry_of_files(staged, [path], seconds=round(time.perf_counter() - started, 3))


def is_of_member(node: Any) -> bool:
    """Whether a node of an ONNX graph belongs to a member's network.

    Dynamo records the modules of a node; the tracing exporter uses them in its name (`/members.0/networks.0/Conv`).
    """
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), None)
    if scopes is None:
        return bool(node.name.startswith(f"/{MEMBERS}"))
    return any(str(scope).startswith(MEMBERS) for scope in ast.literal_eval(scopes))


def to_float16(source: Path, path: Path) -> None:
    """Convert the members' weights and activations to 16-bit floats."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(source))
    unconverted = [node.name for node in model.graph.node if not is_of_member(node)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about weights below the smallest 16-bit float
        onnx.save(convert_float_to_float16(model, keep_io_types=True, node_block_list=unconverted), str(path))


def to_int8(source: Path, path: Path, images: Sequence[Sequence[np.ndarray]]) -> None:
    """Quantise the members' convolutions and matrix products to 8-bit integers, with weight scales per channel.

    Static quantisation (Jacob et al. 2018): activation ranges are measured on `images`, one array per input of the
    file, one image at a time, since raw images differ in size.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class ImageReader(CalibrationDataReader):
        def __init__(self, names: Sequence[str]) -> None:
            self.batches = (dict(zip(names, (array[None] for array in row), strict=True)) for row in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    graph = onnx.load(str(source), load_external_data=False).graph
    quantized = [node.name for node in graph.node if is_of_member(node) and node.op_type in QUANTIZED]
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # suppresses the advice to run an optimisation that the exporter has run
    try:
        quantize_static(
            str(source),
            str(path),
            ImageReader([given.name for given in graph.input]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=QUANTIZED,
            nodes_to_quantize=quantized,
        )
    finally:
        logging.root.setLevel(level)
