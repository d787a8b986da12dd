"""A student is exported as any ensemble is: files for small devices, with parity and the change in accuracy."""

from __future__ import annotations

import pytest
from stored_predictions import workspace_at
from student_runs import SMALL, config, distill

from utils.exporting import tflite_conversion
from utils.exporting.export import export

NAME = "distilled_convnext"


def exported(workspace, **options) -> dict[str, dict]:
    return export(config(SMALL, "exports.enable=true"), workspace, model_name=NAME, **options).document["formats"]


@pytest.fixture
def taught(own_copy):
    workspace = workspace_at(own_copy)
    settings = ("distillation.teacher=CustomConvNeXt", "distillation.epochs=1", "distillation.batch_size=32")
    distill(workspace, SMALL, *settings)
    return workspace


def test_eight_bit_integers_state_the_change_in_accuracy(taught):
    formats = exported(taught, formats=("onnx",), precision=("fp32", "int8"))
    exact, reduced = formats["onnx"], formats["onnx_int8"]
    assert (exact["status"], exact["parity"]["label_flips"]) == ("ok", 0)
    assert exact["parity"]["max_abs_diff"] < 1e-4
    assert (reduced["status"], reduced["parity"]["tolerance"]) == ("ok", 0.1), reduced["reason"]
    assert reduced["size_mb"] < 0.6 * exact["size_mb"]
    accuracy = reduced["test_accuracy"]
    assert accuracy["rows"] > 0
    assert accuracy["change"] == accuracy["file"] - accuracy["ensemble"]


@pytest.mark.slow
@pytest.mark.skipif(tflite_conversion.missing_tools() is not None, reason="needs litert-torch, see DBT_TFLITE_PYTHON")
def test_a_tflite_file_answers_as_the_student(taught):
    entry = exported(taught, formats=("tflite",))["tflite"]
    assert entry["status"] == "ok", entry["reason"]
    assert (entry["parity"]["rows"], entry["parity"]["label_flips"]) == (64, 0)
    assert entry["latency_ms"] > 0
