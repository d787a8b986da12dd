"""ONNX files of reduced precision: the members' nodes are converted, and no others."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from utils.exporting import reduced_precision

WIDTH = 16


@pytest.fixture
def source(tmp_path):
    """Two matrix products: one in a member's network, one in the combiner."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), name) for name in ("member", "top")
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "member"], ["hidden"], name="/members.0/MatMul"),
        helper.make_node("MatMul", ["hidden", "top"], ["y"], name="/combiner/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "it", ends[:1], ends[1:], weights)
    path = tmp_path / "it.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def initializer_types(path) -> set[int]:
    return {tensor.data_type for tensor in onnx.load(str(path)).graph.initializer if len(tensor.dims) == 2}


@pytest.mark.parametrize(
    ("name", "scopes", "is_of_member"),
    [
        ("/members.0/MatMul", None, True),
        ("/combiner/MatMul", None, False),
        ("node_linear", "['', 'members.1', 'members.1.networks.0', 'linear']", True),
        ("node_stack", "['', 'stack']", False),
        ("/members.0/MatMul", "['', 'combiner', 'linear']", False),
        ("node_linear", "['', 'combiner.members', 'linear']", False),
    ],
)
def test_a_members_node_is_known_by_its_modules_and_without_them_by_its_name(name, scopes, is_of_member):
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name=name)
    if scopes is not None:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert reduced_precision.is_of_member(node) is is_of_member


def run(path, batch: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": batch})[0]


def test_half_precision_is_that_of_the_members_alone(source, tmp_path):
    path = tmp_path / "fp16.onnx"
    reduced_precision.to_float16(source, path)
    assert initializer_types(path) == {TensorProto.FLOAT16, TensorProto.FLOAT}
    batch = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)
    difference = np.abs(run(path, batch) - run(source, batch)).max()
    assert 0 < difference < 0.1


def test_eight_bit_integers_are_those_of_the_members_alone(source, tmp_path):
    path = tmp_path / "int8.onnx"
    images = [(row.astype(np.float32),) for row in np.random.default_rng(1).normal(size=(8, WIDTH))]
    reduced_precision.to_int8(source, path, images)
    assert initializer_types(path) == {TensorProto.INT8, TensorProto.FLOAT}


def test_an_error_fails_its_format_alone(tmp_path):
    entry = reduced_precision.write_reduced("onnx_fp16", tmp_path / "absent.onnx", "it", tmp_path, list)
    assert (entry["status"], entry["path"]) == ("failed", None)
    assert "absent.onnx" in entry["reason"]


def test_an_entry_names_the_file_and_calibration_is_loaded_for_integers_alone(source, tmp_path):
    def no_calibration():
        raise AssertionError("not needed for floats")

    entry = reduced_precision.write_reduced("onnx_fp16", source, "it", tmp_path, no_calibration)
    assert (entry["status"], entry["path"]) == ("ok", "onnx_fp16/it_fp16.onnx")
    assert (
        "not needed" in reduced_precision.write_reduced("onnx_int8", source, "it", tmp_path, no_calibration)["reason"]
    )
    assert reduced_precision.tolerance_of("onnx_int8") > reduced_precision.tolerance_of("onnx_fp16")
