"""The conversion to TFLite: missing tools, and converters that crash, are killed or hang."""

from __future__ import annotations

import sys

import pytest
import torch

from utils.exporting import export_formats, tflite_conversion


def fake_python(path, program: str) -> str:
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    path.chmod(0o755)
    return str(path)


def test_tflite_without_its_tools_is_skipped_with_the_install_command(monkeypatch, tmp_path):
    monkeypatch.setenv("DBT_TFLITE_PYTHON", str(tmp_path / "no-python"))
    entry = export_formats.write_tflite(None, "it", tmp_path, tmp_path)
    assert entry["status"] == "skipped"
    assert entry["reason"].endswith("Install: make tflite")


def test_the_environment_of_make_tflite_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("DBT_TFLITE_PYTHON", raising=False)
    monkeypatch.setattr(tflite_conversion, "ENVIRONMENT", tmp_path)
    assert tflite_conversion.python_interpreter() == sys.executable
    (tmp_path / "bin").mkdir()
    own = fake_python(tmp_path / "bin" / "python", "print(['litert_torch', 'ai_edge_litert'])")
    assert tflite_conversion.python_interpreter() == own
    assert tflite_conversion.missing_tools() is None
    monkeypatch.setenv("DBT_TFLITE_PYTHON", "another")
    assert tflite_conversion.python_interpreter() == "another"


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ("['litert_torch', 'ai_edge_litert']", None),
        ("['litert_torch', 'tensorflow']", None),
        ("['litert_torch']", "ai_edge_litert"),
        ("['tensorflow']", "litert_torch"),
    ],
)
def test_the_tools_are_looked_for_in_the_named_interpreter(monkeypatch, tmp_path, installed, missing):
    monkeypatch.setenv("DBT_TFLITE_PYTHON", fake_python(tmp_path / "python", f"print({installed})"))
    reason = tflite_conversion.missing_tools()
    assert (reason is None) if missing is None else reason.startswith(f"{missing} not installed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('the converter says why'); sys.exit(3)", "ended with 3: the converter says why"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
        ("import time; time.sleep(60)", "did not end within 2 s"),
    ],
)
def test_a_converter_that_crashes_is_killed_or_hangs_is_named(tmp_path, monkeypatch, program, reason):
    monkeypatch.setenv("DBT_TFLITE_PYTHON", fake_python(tmp_path / "python", program))
    network = torch.nn.Flatten()
    with pytest.raises(tflite_conversion.ConversionError, match=reason):
        tflite_conversion.convert_network(
            network, (torch.zeros(1, 2, 2),), tmp_path / "a.tflite", tmp_path / "s", seconds=2
        )
