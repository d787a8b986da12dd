"""The selection benchmark: its arrays, its parts, and what it says where the peer is missing."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from conftest import PROJECT, run_python

from utils.numeric.metrics import METRICS

PROGRAM = PROJECT / "benchmarks" / "selection.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("selection_benchmark", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """Three members of four classes, on which the arrays are based."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 50)
    logits = rng.normal(size=(3, 50, 4)) + 3 * np.eye(4)[labels]
    np.savez(tmp_path / "base.npz", logits=logits.astype(np.float32), labels=labels)
    return tmp_path


def test_arrays_have_the_size_asked_for_and_keep_what_members_know(benchmark, folder):
    found = benchmark.resampled(folder, ["7", "2000"])
    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    assert probabilities.shape == (7, 2000, benchmark.CLASSES)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=2), 1, atol=1e-5)
    assert set(labels) == set(range(benchmark.CLASSES))
    winners = probabilities.argmax(axis=2)
    assert ((winners == labels).mean(axis=1) > 0.6).all()
    assert found["agreed"] == (winners == winners[0]).all(axis=0).mean()
    assert len(np.unique(probabilities.reshape(7, -1), axis=0)) == 7
    benchmark.resampled(folder, ["7", "2000"])
    assert (np.load(folder / "probabilities.npy") == probabilities).all()


def test_both_sides_are_scored_by_one_function(benchmark, folder):
    benchmark.resampled(folder, ["5", "600"])
    found = benchmark.selected(folder, ["2"])
    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    for metric, entry in found.items():
        weights = np.load(folder / f"{metric}.npy")
        score = METRICS[metric].function(np.tensordot(weights, probabilities.astype(float), axes=1), labels)
        assert entry["loss"] == pytest.approx(1 - score if METRICS[metric].higher_is_better else score)
        assert entry["seconds"] > 0
        np.save(folder / f"peer_{metric}.npy", weights)
    assert benchmark.losses(folder, []) == {metric: entry["loss"] for metric, entry in found.items()}


def test_weights_come_with_their_certificates(benchmark, folder):
    benchmark.resampled(folder, ["4", "300"])
    found = benchmark.weights(folder, [])
    assert found.keys() == benchmark.WEIGHTS.keys()
    for entry in found.values():
        assert 0 <= entry["gap"] <= benchmark.CERTAIN
        assert entry["seconds"] > 0


def test_a_large_selection_tells_time_and_memory(benchmark, folder):
    benchmark.resampled(folder, ["6", "500"])
    for members, rows in (("6", "500"), ("3", "200")):
        found = benchmark.large(folder, ["f1_macro", members, rows])
        assert found["megabytes"] is None or found["megabytes"] > 10
        assert found["seconds"] > 0


def test_without_the_peer_its_figures_are_null(benchmark, folder, monkeypatch):
    monkeypatch.setattr(benchmark, "PEER", folder / "none")
    rows = benchmark.race_rows(folder, 15, 200, turns=1)
    assert len(rows) == 1 + len(benchmark.METRICS)
    assert all(entry["figure"] is None and entry["holds"] is None and entry["peer"] is None for entry in rows[1:])
    assert rows[0]["figure"] > 0
    assert benchmark.peer_version() is None


def test_a_workspace_without_ensembles_is_named(tmp_path):
    done = run_python(str(PROGRAM), "--workspace", str(tmp_path))
    assert done.returncode == 1
    assert "no ensembles in it; run build-ensemble there first" in done.stderr


@pytest.mark.slow
def test_the_quick_form_ends_with_its_report():
    done = run_python(str(PROGRAM), "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["rows"]) == 2 * 4 + 2 + 2 * 4
    assert found["quick"]
