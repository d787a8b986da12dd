"""The mixture benchmark: a gate that is spread evenly, rows that say what was measured."""

from __future__ import annotations

import numpy as np
import pytest

import mixture
import prepare
from utils.combiners.routing import routed_members
from utils.moe_methods import MixtureOfExperts


def test_the_random_gate_is_spread_over_all_experts():
    logits = np.random.default_rng(3).normal(scale=0.01, size=(96, mixture.CLASSES)) + np.arange(mixture.CLASSES)
    gate = mixture.even_gate(logits.astype(np.float32), 2)
    scores = gate.scores(np.broadcast_to(logits.astype(np.float32), (5, *logits.shape)))
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(scores.std(axis=0), 1, atol=1e-3)
    ran = routed_members(MixtureOfExperts(model=gate), np.broadcast_to(logits.astype(np.float32), (5, *logits.shape)))
    shares = ran.mean(axis=1)
    assert shares[2] == 1
    assert np.delete(shares, 2).min() > 0.1
    assert 2 <= shares.sum() <= 3


def test_small_networks_are_timed_with_what_was_run():
    ratio, grouped, run = mixture.time_rows("tiny", 1, 1, None)
    assert ratio["holds"] in (True, False)
    assert ratio["figure"] > 0
    assert grouped["figure"] > ratio["figure"], "the mean cost of those run is below that of all"
    assert 2 <= run["figure"] <= 3


def test_accuracy_is_told_in_points_below_the_dense_mixture(monkeypatch, tmp_path):
    ways = [
        {"moe": (0.90, 0.3, 2.0), "dense": (0.92, 0.2, 5.0), "cascade": (0.9, 0.3, 1.5)},
        {"moe": (0.94, 0.3, 3.0), "dense": (0.93, 0.4, 5.0), "cascade": (0.9, 0.3, 1.5)},
    ]
    turns = iter(ways)
    monkeypatch.setattr(mixture, "outcome", lambda arrays: next(turns))
    monkeypatch.setattr(prepare, "read", lambda path: {})
    rows = mixture.accuracy_rows(prepare.Prepared(tmp_path, (tmp_path / "a", tmp_path / "b")))
    assert rows[0]["figure"] == pytest.approx(0.5)
    assert rows[0]["holds"] == (100 * (0.925 - 0.92) <= 0.5)
    assert [row["figure"] for row in rows[1:]] == pytest.approx([0.92, 0.925, 0.9])
    assert "2.50 networks per image" in rows[1]["peer"]
