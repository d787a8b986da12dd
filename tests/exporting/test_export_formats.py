"""Status entries of export formats, and conversions that fail without stopping other formats."""

from __future__ import annotations

import hashlib

import pytest

from utils.core.errors import UserError
from utils.exporting import export_formats, tflite_conversion
from utils.exporting.export_formats import entry_of_files, format_entry, summarize_entry

PARITY = {"rows": 64, "max_abs_diff": 2e-7, "tolerance": 1e-4, "label_flips": 0, "near_threshold": 0}


def test_an_entry_names_its_first_file_and_the_digests_of_all(tmp_path):
    (tmp_path / "onnx").mkdir()
    for name, content in (("a.onnx", b"1" * 2000), ("b.data", b"2")):
        (tmp_path / "onnx" / name).write_bytes(content)
    entry = entry_of_files(tmp_path, [tmp_path / "onnx" / "a.onnx", tmp_path / "onnx" / "b.data"], seconds=1)
    assert (entry["status"], entry["path"], entry["size_mb"], entry["seconds"]) == ("ok", "onnx/a.onnx", 0.002, 1)
    assert entry["sha256"] == hashlib.sha256(b"1" * 2000).hexdigest()
    assert entry["files"].keys() == {"onnx/a.onnx", "onnx/b.data"}


def test_every_entry_has_the_same_keys():
    assert format_entry("skipped", reason="no tools").keys() == format_entry("ok", path="a").keys()


def test_a_summary_holds_size_parity_and_what_is_unusual():
    entry = format_entry("ok", path="a.onnx", size_mb=1.5, parity=PARITY)
    assert summarize_entry(entry).startswith("ok, a.onnx, 1.50 MB: 64 real rows, largest difference 2.0e-07")
    assert "discontinuity" not in summarize_entry(entry)
    near = entry | {"parity": PARITY | {"near_threshold": 3}, "test_accuracy": {"change": -0.01}}
    assert "3 at a discontinuity" in summarize_entry(near)
    assert "-0.0100" in summarize_entry(near)
    assert summarize_entry(format_entry("failed", reason="why")) == "failed: why"
    assert summarize_entry(format_entry("ok", path="custom/a.bin")) == "ok, custom/a.bin"


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("no fixed size"), "skipped"), (RuntimeError("bug"), "failed")]
)
def test_an_error_of_tflite_is_its_entry(tmp_path, monkeypatch, error, status):
    def open_network():
        raise error

    monkeypatch.setattr(tflite_conversion, "missing_tools", lambda: None)
    entry = export_formats.write_tflite(open_network, "it", tmp_path, tmp_path / "scratch")
    assert entry["status"] == status
    assert str(error) in entry["reason"]
    assert (tmp_path / "tflite").exists() is (status == "failed")


@pytest.mark.parametrize(
    ("shape", "expected"), [([None, 3, 32, 32], "{}x3x32x32"), ([None, None, None, 3], "{}x32x32x3")]
)
def test_the_command_for_tensorrt_has_the_shapes_of_the_input(shape, expected):
    entry = export_formats.tensorrt_entry("it", {"input": {"name": "images", "shape": shape, "img_size": 32}})
    assert entry["status"] == "skipped"
    for bound, batch in (("min", 1), ("opt", 16), ("max", 64)):
        assert f"--{bound}Shapes=images:{expected.format(batch)}" in entry["reason"]


def test_the_command_for_tensorrt_has_the_shapes_of_all_inputs():
    inputs = [{"name": f"images_{size}", "shape": [None, 3, size, size]} for size in (32, 48)]
    entry = export_formats.tensorrt_entry("it", {"input": {"inputs": inputs}})
    assert "--optShapes=images_32:16x3x32x32,images_48:16x3x48x48" in entry["reason"]
