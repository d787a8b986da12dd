"""The tools that formats need: listed, missing, crashing."""

from __future__ import annotations

import sys

import pytest
import torch

from utils.exporting import export_checks, export_formats, tflite_conversion


def test_tools_are_listed_with_what_they_need():
    facts = export_checks.list_tools().document["formats"]
    assert facts["onnx"]["ready"]
    assert "onnxruntime" in facts["onnx"]["words"]
    assert not facts["tensorrt"]["ready"]


def test_tflite_without_its_tools_is_skipped_with_the_install_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DBT_TFLITE_PYTHON", str(tmp_path / "no-python"))
    entry = export_formats.write_tflite(None, "it", tmp_path, tmp_path)
    assert entry["status"] == "skipped"
    assert "pip install torch litert-torch" in entry["reason"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('the converter says why'); sys.exit(3)", "ended with 3: the converter says why"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
        ("import time; time.sleep(60)", "did not end within 2 s"),
    ],
)
def test_a_converter_that_crashes_is_killed_or_hangs_fails_with_its_last_words(tmp_path, monkeypatch, program, reason):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    python.chmod(0o755)
    monkeypatch.setenv("DBT_TFLITE_PYTHON", str(python))
    network = torch.nn.Flatten()
    with pytest.raises(tflite_conversion.ConversionError, match=reason):
        tflite_conversion.convert_network(
            network, torch.zeros(1, 2, 2), tmp_path / "a.tflite", tmp_path / "s", seconds=2
        )
