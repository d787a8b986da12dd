"""What is compared when an exported file is proved: batches, tolerances, steps, runtimes in processes of their own."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from utils.exporting.parity_check import (
    FileOutputs,
    FileRunError,
    ReferenceBatches,
    RuntimeProcess,
    compare_outputs,
    make_batches,
)


def test_images_of_unequal_size_are_dealt_to_batches_of_their_own():
    images = [np.full((size, 4, 3), row, dtype=np.uint8) for row, size in enumerate([5, 7] * 11)]
    batches, rows = make_batches([(image,) for image in images])
    assert sorted(np.unique(np.concatenate(rows))) == list(range(22))
    assert {len(batch) for (batch,) in batches} == {1, 3, 17}
    for (batch,), own in zip(batches, rows, strict=True):
        assert batch[:, 0, 0, 0].tolist() == own.tolist()


def answered(probabilities, **outputs) -> FileOutputs:
    return FileOutputs(
        np.arange(len(probabilities)), {"probabilities": np.array(probabilities, dtype=np.float32), **outputs}
    )


def test_a_label_that_flips_where_it_is_clear_fails():
    probe = ReferenceBatches([(np.zeros((2, 1)),)], [np.arange(2)], np.array([[0.50001, 0.49999], [0.7, 0.3]]))
    near = compare_outputs(probe, answered([[0.49999, 0.50001], [0.7, 0.3]]))
    assert (near["passed"], near["parity"]["label_flips"]) == (True, 0)
    clear = compare_outputs(probe, answered([[0.5, 0.5], [0.3, 0.7]]))
    assert (clear["passed"], clear["parity"]["label_flips"]) == (False, 1)
    assert not compare_outputs(probe, answered([[0.5, np.nan], [0.7, 0.3]]))["passed"]
    other_shape = compare_outputs(probe, answered(np.zeros((2, 3))))
    assert (other_shape["passed"], other_shape["parity"]) == (False, None)


class Step:
    """The first member's most probable class, for certain."""

    def predict_proba(self, logits):
        return np.eye(2)[logits[0].argmax(axis=1)]


def test_rows_at_a_step_are_counted_and_left_out_of_the_end_to_end_comparison():
    logits = np.tile(np.array([[1.0, 0.0]], dtype=np.float32), (40, 1))
    logits[0] = [1e-6, 0]
    probe = ReferenceBatches(
        [(np.zeros((40, 1)),)], [np.arange(40)], np.tile([[1.0, 0.0]], (40, 1)), logits[None], None, Step()
    )
    own = logits.copy()
    own[0] = [0, 1e-6]
    found = compare_outputs(probe, answered(np.eye(2)[own.argmax(axis=1)], member_logits=own[:, None]))
    assert (found["passed"], found["parity"]["near_threshold"], found["parity"]["max_abs_diff"]) == (True, 1, 0)
    wrong = compare_outputs(probe, answered(np.eye(2)[logits.argmax(axis=1)], member_logits=own[:, None]))
    assert "its combiner differs by 1 on the file's member outputs" in wrong["reason"]
    own[:3] = [0, 1e-6]
    probe.member_logits[0, :3] = [1e-6, 0]
    many = compare_outputs(probe, answered(np.eye(2)[own.argmax(axis=1)], member_logits=own[:, None]))
    assert "3 of 40 rows lie at a discontinuity" in many["reason"]
    own[5] = [3, 0]
    assert (
        "members' probabilities differ"
        in compare_outputs(probe, answered(np.eye(2)[own.argmax(axis=1)], member_logits=own[:, None]))["reason"]
    )


def outputs_of(*arguments):
    with RuntimeProcess(*arguments) as process:
        return process.outputs()


def test_a_runtime_that_fails_says_why(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"no model")
    probe = ReferenceBatches([(np.zeros((1, 3, 2, 2), dtype=np.float32),)], [np.arange(1)], np.ones((1, 1)))
    with pytest.raises(FileRunError, match=r"its runtime ended with 1: .*a.onnx: .*Protobuf"):
        outputs_of("onnx", [path], probe, ["probabilities"], tmp_path / "scratch")


def test_a_runtime_that_takes_too_long_is_ended(tmp_path):
    probe = ReferenceBatches([(np.zeros((1, 2), dtype=np.float32),)], [np.arange(1)], np.ones((1, 1)))
    with RuntimeProcess("onnx", [tmp_path / "a.onnx"], probe, ["probabilities"], tmp_path / "scratch") as process:
        with pytest.raises(FileRunError, match="did not end within 0 s"):
            process.outputs(seconds=0.001)
        assert process._process.poll() is None
    assert process._process.returncode == -signal.SIGKILL


def test_the_files_of_a_format_share_a_process_and_answer_each_for_itself(tmp_path):
    from onnx import TensorProto, checker, helper, save

    files = []
    for name, operator in (("same", "Identity"), ("negative", "Neg")):
        given, found = (helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", 2]) for value in ("x", "y"))
        graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], name, [given], [found])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        checker.check_model(model)
        files.append(tmp_path / f"{name}.onnx")
        save(model, files[-1])
    rows = np.array([[1, 2], [3, 4]], dtype=np.float32)
    probe = ReferenceBatches([(rows[:1],), (rows,)], [np.array([0]), np.array([0, 1])], np.ones((2, 2)))
    same, negative = outputs_of("onnx", files, probe, ["y"], tmp_path / "scratch")
    assert same.outputs["y"].tolist() == [[1, 2], [1, 2], [3, 4]]
    assert negative.outputs["y"].tolist() == [[-1, -2], [-1, -2], [-3, -4]]
    assert same.facts["latency_ms"] > 0
    files[1].write_bytes(b"no model")
    with pytest.raises(FileRunError, match=r"negative.onnx: "):
        outputs_of("onnx", files, probe, ["y"], tmp_path / "scratch")
