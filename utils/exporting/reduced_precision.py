"""ONNX files of fewer bits: the members' networks in 16-bit floats or 8-bit integers, all else as it was.

Preprocessing and combiner stay in 32 bits, where small differences would move labels and little would be gained.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.exporting.export_formats import entry_of_files, format_entry

TOLERANCES = {"fp16": 0.01, "int8": 0.1}
"""On probabilities: rounding of 2^-11 and 2^-8, grown over the layers of a network."""
REDUCED = tuple(f"onnx_{precision}" for precision in TOLERANCES)
"""Formats, beside `onnx`, from whose file they are made."""
MEMBERS = "/members."  # begins the names of the networks' nodes
QUANTIZED = ["Conv", "Gemm", "MatMul"]


def tolerance_of(format_name: str) -> float:
    """Of a format in `REDUCED`, on probabilities."""
    return TOLERANCES[format_name.removeprefix("onnx_")]


def write_reduced(
    format_name: str, source: Path, name: str, staged: Path, calibration: Callable[[], Sequence[np.ndarray]]
) -> dict[str, Any]:
    """Write `<format>/<name>_<precision>.onnx` from the 32-bit file; its entry. `calibration` opens images of train.

    Whatever stops it is its entry's reason.
    """
    started = time.perf_counter()
    path = staged / format_name / f"{name}_{format_name.removeprefix('onnx_')}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if format_name == "onnx_fp16":
            to_float16(source, path)
        else:
            to_int8(source, path, calibration())
    except Exception as error:  # whatever stops one format, the others go on
        reason = f"{type(error).__name__}: {error}"
        return format_entry("failed", reason=reason, seconds=round(time.perf_counter() - started, 3))
    return entry_of_files(staged, [path], seconds=round(time.perf_counter() - started, 3))


def to_float16(source: Path, path: Path) -> None:
    """The members' weights and sums in 16-bit floats."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(source))
    outside = [node.name for node in model.graph.node if not node.name.startswith(MEMBERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of weights so small that they become the smallest there is
        onnx.save(convert_float_to_float16(model, keep_io_types=True, node_block_list=outside), str(path))


def to_int8(source: Path, path: Path, images: Sequence[np.ndarray]) -> None:
    """The members' convolutions and products in 8-bit integers, weights by channel, ranges as the `images` have them.

    Static quantisation (Jacob et al. 2018); one image at a time, since raw ones are of unequal size.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, given: str) -> None:
            self.rows = ({given: image[None]} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    graph = onnx.load(str(source), load_external_data=False).graph
    inside = [node.name for node in graph.node if node.name.startswith(MEMBERS) and node.op_type in QUANTIZED]
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to optimise first, which the exporter has done
    try:
        quantize_static(
            str(source),
            str(path),
            Reader(graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=QUANTIZED,
            nodes_to_quantize=inside,
        )
    finally:
        logging.root.setLevel(level)
