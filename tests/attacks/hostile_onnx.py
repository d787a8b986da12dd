"""ONNX files that lie: about their metadata, inputs, outputs, sizes, other files, or that would run for ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_files
from onnx import TensorProto, helper, numpy_helper

RULE = {"input_size": 8, "resized": 8, "resize": "shorter-side", "interpolation": "bilinear"}
RULE |= {"crop_offset": "round", "exif": "ignore", "fill": [0, 0, 0]}
Make = Callable[[Path], object]


def valid(path: Path) -> Path:
    """A file that answers 0.25 and 0.75 for every image."""
    return onnx_files.constant(path, [0.25, 0.75])


def with_metadata(**entries: Any) -> Make:
    """The valid file with other metadata; None removes an entry, text stays as it is."""

    def make(path: Path) -> None:
        model = onnx.load(valid(path))
        metadata = {"classes": json.dumps(onnx_files.CLASSES), "input": json.dumps(onnx_files.INPUT)}
        metadata |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
        del model.metadata_props[:]
        helper.set_model_props(model, {key: metadata[key] for key in metadata if entries.get(key, "") is not None})
        onnx.save(model, path)

    return make


def with_input(**changes: Any) -> Make:
    """Another description of its input."""
    return with_metadata(input=onnx_files.INPUT | changes)


def with_rule(**changes: Any) -> Make:
    """Another resize rule."""
    return with_metadata(input={"kind": "float-nchw", "inputs": [{"name": "images", "resizing": RULE | changes}]})


def changed(change: Callable[[onnx.ModelProto], object]) -> Make:
    """The valid file with another graph."""

    def make(path: Path) -> None:
        model = onnx.load(valid(path))
        change(model)
        onnx.save(model, path)

    return make


def answering(answer: np.ndarray) -> Make:
    """A file that gives the same array whatever the images."""
    return lambda path: onnx_files.fixed(path, answer)


def graph(*nodes: onnx.NodeProto, **constants: np.ndarray) -> Make:
    """A file of these nodes, which make `probabilities` of `images`."""
    return lambda path: onnx_files.write(path, list(nodes), constants, TensorProto.FLOAT)


def endless_loop(path: Path) -> None:
    """A loop of 2**62 turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Identity", ["value"], ["next_value"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next_value", TensorProto.FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["turns", "always", "images"], ["probabilities"], body=body)]
    constants = {"turns": np.array(2**62, dtype=np.int64), "always": np.array(True)}
    onnx_files.write(path, nodes, constants, TensorProto.FLOAT)


def loop_in_a_branch(path: Path) -> None:
    """The same inside the branch of a condition."""
    endless_loop(path)
    model = onnx.load(path)
    loop = model.graph.node[0]
    branch = helper.make_graph([loop], "branch", [], [helper.make_tensor_value_info("probabilities", 1, None)])
    del model.graph.node[:]
    model.graph.node.append(
        helper.make_node("If", ["always"], ["probabilities"], then_branch=branch, else_branch=branch)
    )
    onnx.save(model, path)


def loop_in_a_function(path: Path) -> None:
    """The same inside a function of the file."""
    endless_loop(path)
    model = onnx.load(path)
    loop = model.graph.node[0]
    inputs, outputs = ["turns", "always", "images"], ["probabilities"]
    model.functions.append(helper.make_function("own", "f", inputs, outputs, [loop], [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("f", inputs, outputs, domain="own"))
    onnx.save(model, path)


def external(location: str) -> Make:
    """Weights in another file."""

    def make(path: Path) -> None:
        model = onnx.load(valid(path))
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "bright")
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        onnx.save(model, path)

    return make


def growing(path: Path) -> None:
    """A chain of joins: each node joins its input 256 times, to 256**4 images at its end."""
    nodes = [
        helper.make_node("Concat", ["images" if n == 0 else f"x{n}"] * 256, [f"x{n + 1}"], axis=0) for n in range(4)
    ]
    nodes.append(helper.make_node("Identity", ["x4"], ["probabilities"]))
    onnx_files.write(path, nodes, {}, TensorProto.FLOAT)


def huge_constant(path: Path) -> None:
    """Four terabytes of one value."""
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["probabilities"])]
    onnx_files.write(path, nodes, {"shape": np.array([10**6, 10**6], dtype=np.int64)}, TensorProto.FLOAT)


def large_expansion(path: Path) -> None:
    """Each image repeated to 40 GB."""
    nodes = [
        helper.make_node("Tile", ["images", "times"], ["tiled"]),
        helper.make_node("ReduceMean", ["tiled"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("Slice", ["means", "zero", "two", "one"], ["probabilities"]),
    ]
    constants = {"times": np.array([1, 1, 7000, 7000], dtype=np.int64)}
    constants |= {name: np.array([value], dtype=np.int64) for name, value in (("zero", 0), ("two", 2), ("one", 1))}
    onnx_files.write(path, nodes, constants, TensorProto.FLOAT)


def text(content: str | bytes) -> Make:
    """Not ONNX at all."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut(fraction: float) -> Make:
    """The valid file, cut off."""

    def make(path: Path) -> None:
        content = valid(path).read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])

    return make


def _renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-1].output[0] = "answers"


def _second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def _other_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def _wide(model: onnx.ModelProto) -> None:
    for size in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        size.dim_value = 60_000


def _custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "stranger"
    model.opset_import.append(helper.make_opsetid("stranger", 1))


def _wrong_weights(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "bright")
    tensor.CopyFrom(numpy_helper.from_array(np.ones((3, 7, 2), dtype=np.float32), "bright"))


def _swollen_weights(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "bright")
    tensor.dims[0] = 2**40


def _bare(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, dtype=np.float32)


HOSTILE: dict[str, Make] = {
    "no bytes": text(b""),
    "text": text("probabilities"),
    "bytes": text(bytes(range(256)) * 16),
    "a pickle": text(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR."),
    "cut to half": cut(0.5),
    "cut at the end": cut(0.99),
    "no classes": with_metadata(classes=None),
    "no input": with_metadata(input=None),
    "classes that are no JSON": with_metadata(classes="[a"),
    "classes in depth": with_metadata(classes="[" * 100_000),
    "classes that are a number": with_metadata(classes=3),
    "classes that are numbers": with_metadata(classes=[1, 2]),
    "classes that are text": with_metadata(classes='"ab"'),
    "classes that are an object": with_metadata(classes={"a": 1, "b": 2}),
    "no class": with_metadata(classes=[]),
    "one class twice": with_metadata(classes=["a", "a"]),
    "a class without a name": with_metadata(classes=["a", ""]),
    "more classes than columns": with_metadata(classes=["a", "b", "c"]),
    "classes of unpaired surrogates": with_metadata(classes='["a", "\\ud800"]'),
    "an input that is a list": with_metadata(input=[1]),
    "an input that is null": with_metadata(input="null"),
    "an input in depth": with_metadata(input='{"a":' * 100_000),
    "an endless number": with_metadata(
        input='{"kind": "float-nchw", "name": "images", "img_size": 1' + "0" * 5000 + "}"
    ),
    "a kind of nothing": with_input(kind="stream"),
    "a kind that is a list": with_input(kind=["float-nchw"]),
    "an image of no size": with_input(img_size=0),
    "an image of minus one": with_input(img_size=-1),
    "an image of a fraction": with_input(img_size=8.5),
    "an image of text": with_input(img_size="8"),
    "an image of NaN": with_metadata(
        input='{"kind": "float-nchw", "name": "images", "img_size": NaN, "shorter_side": 8}'
    ),
    "an image of a billion": with_input(img_size=10**9),
    "a shorter side of 60,000": with_input(shorter_side=60_000),
    "a shorter side of nothing": with_input(shorter_side=None),
    "a shorter side of -8": with_input(shorter_side=-8),
    "another size than the graph's": with_input(img_size=16, shorter_side=16),
    "another name than the graph's": with_input(name="pixels"),
    "a name that is a number": with_input(name=3),
    "a rule that is unknown": with_rule(resize="explode"),
    "an interpolation of an attribute": with_rule(interpolation="__class__"),
    "a fill of text": with_rule(fill="red"),
    "a fill beyond bytes": with_rule(fill=[0, 0, 256]),
    "a rule of a million": with_rule(resized=10**6),
    "a rule with more": with_rule(command="touch canary"),
    "raw images for a graph of floats": with_metadata(input={"kind": "uint8-nhwc", "name": "images"}),
    "member logits": with_metadata(input={"kind": "member-logits", "name": "images"}),
    "another output": changed(_renamed_output),
    "a second input": changed(_second_input),
    "an input of doubles": changed(_other_type),
    "an input of 60,000 pixels": changed(_wide),
    "an operator of a stranger": changed(_custom_operator),
    "weights of another shape": changed(_wrong_weights),
    "weights of 8 TB": changed(_swollen_weights),
    "one row for all images": answering(_bare(1, 2)),
    "no rows": answering(_bare(0, 2)),
    "a row too many": answering(_bare(4, 2)),
    "one axis": answering(_bare(3)),
    "three axes": answering(_bare(3, 2, 1)),
    "whole numbers": answering(np.zeros((3, 2), dtype=np.int64)),
    "text for probabilities": answering(np.array([["a", "b"]] * 3)),
    "an endless loop": endless_loop,
    "an endless loop in a branch": loop_in_a_branch,
    "an endless loop in a function": loop_in_a_function,
    "256**4 images of one": growing,
    "4 TB of one value": huge_constant,
    "40 GB from an image": large_expansion,
    "a division by shapes": graph(helper.make_node("MatMul", ["images", "wide"], ["probabilities"]), wide=_bare(7, 2)),
    "a reshape that does not fit": graph(
        helper.make_node("Reshape", ["images", "shape"], ["probabilities"]), shape=np.array([5, 7], dtype=np.int64)
    ),
    "an index out of range": graph(
        helper.make_node("Gather", ["images", "row"], ["probabilities"]), row=np.array([99], dtype=np.int64)
    ),
    "weights in /etc/passwd": external("/etc/passwd"),
    "weights above the folder": external("../weights.bin"),
    "weights that are missing": external("weights.bin"),
    "weights in a device": external("/dev/zero"),
}
"""{what: function that writes the file}; none of them may be answered with."""
INVALID_ROWS: dict[str, Make] = {
    "NaN": answering(np.full((3, 2), np.nan, dtype=np.float32)),
    "infinity": answering(np.full((3, 2), np.inf, dtype=np.float32)),
    "1e30": answering(np.full((3, 2), 1e30, dtype=np.float32)),
    "negative": answering(np.array([[-1.0, 2.0]] * 3, dtype=np.float32)),
    "a sum of 1.5": answering(np.array([[0.75, 0.75]] * 3, dtype=np.float32)),
    "zeros": answering(np.zeros((3, 2), dtype=np.float32)),
    "doubles of 1e300": answering(np.full((3, 2), 1e300)),
}
"""Files whose rows are no probabilities: an error of each image, never an answer."""
