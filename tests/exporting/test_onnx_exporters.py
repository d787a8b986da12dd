"""`--onnx-exporter dynamo` from the members' networks to files of every precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from export_runs import NAME, folder_of, run
from finished_workspace import at
from torch import nn

from export import programs
from utils.exporting import export_checks
from utils.exporting.reduced_precision import is_of_member
from utils.inference import graph_checks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs.refusal(nn.Identity()) is not None, reason="this torch captures no programs"),
]


@pytest.fixture
def base(tmp_path, built) -> Path:
    return Path(shutil.copytree(built, tmp_path / "workspace"))


def exporter_of(path: Path) -> str:
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["exporter"]


def test_files_of_every_precision_answer_and_the_members_alone_are_reduced(base):
    result = run(base, NAME, "onnx", precision=["fp32", "fp16", "int8"], onnx_exporter="dynamo")
    assert result.failures == []
    formats, folder = result.document["formats"], folder_of(base)
    for name, share in (("onnx", 1.0), ("onnx_fp16", 0.7), ("onnx_int8", 0.7)):
        assert formats[name]["parity"]["max_abs_diff"] < formats[name]["parity"]["tolerance"]
        assert formats[name]["size_mb"] <= share * formats["onnx"]["size_mb"]
        graph_checks.require_bounded(folder / formats[name]["path"])
    model = onnx.load(str(folder / formats["onnx"]["path"]))
    of_members = [is_of_member(node) for node in model.graph.node]
    assert 0 < sum(of_members) < len(of_members)
    integers = onnx.load(str(folder / formats["onnx_int8"]["path"]))
    assert "QuantizeLinear" in {node.op_type for node in integers.graph.node}
    assert export_checks.verify(at(base), folder).document["formats"].keys() >= {"onnx", "onnx_int8"}
    assert exporter_of(folder / formats["onnx"]["path"]).endswith("dynamo=True")
    again = run(base, NAME, "onnx", onnx_exporter="dynamo")
    assert "up to date" in again.text
    traced = run(base, NAME, "onnx").document["formats"]["onnx"]
    assert exporter_of(folder / traced["path"]).endswith("dynamo=False")


def test_images_of_any_size_are_written_by_tracing(base):
    result = run(base, "hard_voting", "onnx", input="uint8-nhwc", onnx_exporter="dynamo")
    assert result.failures == []
    path = folder_of(base, "hard_voting_ensemble") / result.document["formats"]["onnx"]["path"]
    assert exporter_of(path).endswith("dynamo=False")
