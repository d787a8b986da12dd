"""The comparison of exported files, from their records alone."""

from __future__ import annotations

import pytest
from PIL import Image

from utils.core.artifacts import write_json
from utils.core.errors import UserError
from utils.core.workspace import Workspace
from utils.exporting import export_comparison, export_folder


def export_of(workspace: Workspace, name: str, accuracy: float | None, **formats: tuple[float, float]) -> None:
    """Records of an export, {format: (latency, size)}, and of its evaluation."""
    status = {
        format_name: {
            "status": "ok",
            "parity": {"max_abs_diff": 1e-7, "tolerance": 1e-4},
            "latency_ms": latency,
            "size_mb": size,
        }
        for format_name, (latency, size) in formats.items()
    }
    folder = workspace.exports / name
    write_json(folder / export_folder.METADATA, {"training": {"ensemble": name}})
    write_json(folder / export_folder.STATUS, status | {"tensorrt": {"status": "skipped"}})
    if accuracy is not None:
        write_json(workspace.ensemble_metrics(name, "test"), {"accuracy": accuracy})


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, *(tmp_path / name for name in "abcdefg"))


def test_files_that_are_worse_in_everything_are_not_pareto_optimal(workspace):
    export_of(workspace, "large", 0.9, onnx=(10.0, 5.0), torchscript=(20.0, 6.0))
    export_of(workspace, "small", 0.8, onnx=(1.0, 1.0))
    result = export_comparison.compare_exports(workspace)
    pareto = {(row["name"], row["format"]): row["pareto"] for row in result.document["rows"]}
    assert pareto == {("large", "onnx"): True, ("large", "torchscript"): False, ("small", "onnx"): True}
    with Image.open(workspace.scores / export_comparison.PICTURE) as image:
        assert image.format == "PNG"


def test_without_an_evaluation_there_is_no_picture(workspace):
    export_of(workspace, "unscored", None, onnx=(10.0, 5.0))
    result = export_comparison.compare_exports(workspace)
    assert [(row["accuracy"], row["pareto"]) for row in result.document["rows"]] == [(None, True)]
    assert result.document["picture"] is None
    assert not (workspace.scores / export_comparison.PICTURE).exists()


def test_exports_of_the_base_pipeline_are_left_out(workspace):
    write_json(workspace.exports / "backbone" / export_folder.METADATA, {"architecture": "backbone"})
    write_json(workspace.exports / "backbone" / export_folder.STATUS, {})
    with pytest.raises(UserError, match="nothing is exported"):
        export_comparison.compare_exports(workspace)
