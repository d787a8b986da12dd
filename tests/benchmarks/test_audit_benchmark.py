"""The audit benchmark: planted copies and shortcuts of real photographs are counted, and goals can be missed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from conftest import PROJECT
from photo_crops import crops


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit_benchmark", PROJECT / "benchmarks" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path):
    paths = [tmp_path / "photographs" / f"{number}.jpg" for number in range(12)]
    paths[0].parent.mkdir()
    for path, image in zip(paths, crops(), strict=False):
        image.save(path, quality=95)
    return paths


def test_recall_and_precision_are_of_planted_copies(audit, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "_embeddings", lambda paths: None)
    rows = {row["what"]: row for row in audit.copy_rows(sources, tmp_path)}
    assert rows["audit, pixels alone: planted copies found"]["figure"] > 0.8
    assert rows["audit, pixels alone: reported pairs that are right"]["figure"] == 1


def test_a_missed_copy_and_a_wrong_pair_count(audit):
    kinds = ["cropped", "flipped", "cropped"]
    rows = audit._pair_rows("x", {(0, 3), (1, 5)}, kinds, np.arange(3), 3, has_goal=True)
    figures = {row["what"]: (row["figure"], row["holds"]) for row in rows}
    assert figures["x: planted copies found"] == (0.333, False)
    assert figures["x: reported pairs that are right"] == (0.5, False)
    assert figures["x: cropped"] == (0.5, None)


def test_each_shortcut_is_planted_and_found(audit, sources, tmp_path):
    rows = audit.shortcut_rows(sources * 8, tmp_path, 1)
    assert [row["holds"] for row in rows] == [True, True, True, True]
