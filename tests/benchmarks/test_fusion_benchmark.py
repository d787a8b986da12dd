"""The fusion benchmark: its rows are of the form, and its goals can be missed."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import PROJECT

KEYS = {"what", "figure", "unit", "goal", "holds", "peer"}


@pytest.fixture(scope="module")
def fusion():
    spec = importlib.util.spec_from_file_location("fusion", PROJECT / "benchmarks" / "fusion.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_head_is_timed_beside_its_arithmetic_and_a_loader(fusion, monkeypatch):
    monkeypatch.setattr(fusion, "TURNS", 1)
    outside, ratio = fusion.head_rows("small", 8, (4,), rows=300, epochs=1)
    assert outside.keys() == ratio.keys() == KEYS
    assert outside["holds"] == (outside["figure"] <= fusion.OUTSIDE)
    assert ratio["figure"] > 0
    assert "correct" in ratio["peer"]


def test_the_shared_space_is_timed(fusion, monkeypatch):
    found = fusion.shared_space_row(rows=600, width=48)
    assert found["holds"] is True
    monkeypatch.setattr(fusion, "SECONDS_OF_CCA", 0.0)
    assert fusion.shared_space_row(rows=600, width=48)["holds"] is False


def test_memory_holds_only_below_its_goal(fusion, tmp_path, monkeypatch):
    peaks = iter([100, 111, 100, 109])
    monkeypatch.setattr(fusion.extraction, "part", lambda *_: {})
    monkeypatch.setattr(fusion, "_part", lambda *_: {"megabytes": next(peaks)})
    assert fusion.memory_row(tmp_path / "a", "tiny", None)["holds"] is False
    assert fusion.memory_row(tmp_path / "b", "tiny", None)["holds"] is True
