"""Small ONNX files made by hand, in the form that `export` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = ("a", "b")
SIZE = 8
INPUT = {"name": "images", "kind": "float-nchw", "img_size": SIZE, "shorter_side": SIZE}


def write(path: Path, nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], kind: int) -> Path:
    """A file whose `nodes` make `probabilities` of `images`, float32 (B, 3, 8, 8), in the element type `kind`."""
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("probabilities", kind, None)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"classes": json.dumps(CLASSES), "input": json.dumps(INPUT)})
    onnx.save(model, str(path))
    return path


def fixed(path: Path, answer: np.ndarray) -> Path:
    """A file that gives the array `answer`, whatever the images and their number."""
    kind = helper.np_dtype_to_tensor_dtype(answer.dtype)
    return write(path, [helper.make_node("Identity", ["answer"], ["probabilities"])], {"answer": answer}, kind)


def constant(path: Path, row: Sequence[float]) -> Path:
    """A file that gives the probabilities `row` for every image."""
    return of_brightness(path, row, row)


def of_brightness(path: Path, bright: Sequence[float], dark: Sequence[float]) -> Path:
    """A file that gives the row `bright` for images whose mean is above one half, and `dark` for all others."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["means"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Reshape", ["means", "column"], ["brightness"]),
        helper.make_node("Greater", ["brightness", "half"], ["is_bright"]),
        helper.make_node("Where", ["is_bright", "bright", "dark"], ["probabilities"]),
    ]
    constants = {
        "column": np.array([-1, 1], dtype=np.int64),
        "half": np.array(0.5, dtype=np.float32),
        "bright": np.array([bright], dtype=np.float32),
        "dark": np.array([dark], dtype=np.float32),
    }
    return write(path, nodes, constants, TensorProto.FLOAT)
