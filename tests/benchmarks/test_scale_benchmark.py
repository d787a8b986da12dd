"""The scale benchmark's pure parts: what is imported, what the peer fits, and how both are told."""

from __future__ import annotations

import json

import numpy as np

import scale

SMALL = scale.Size(2, 60, 3, 2, 2)


def test_predictions_are_those_of_one_draw_in_three_splits(tmp_path):
    scale.write_predictions(tmp_path, SMALL, 1)
    with np.load(tmp_path / "member01" / "oof.npz") as oof, np.load(tmp_path / "member01" / "val.npz") as val:
        assert (len(oof["labels"]), len(val["labels"])) == (48, 12)
        assert np.bincount(oof["fold"]).min() >= 9
        assert "fold" not in val
        table, labels = scale.peer_rows(tmp_path)
        np.testing.assert_array_equal(labels, np.concatenate([oof["labels"], val["labels"]]))
        assert table.shape == (60, 6)
        np.testing.assert_allclose(np.exp(table).reshape(60, 2, 3).sum(axis=2), 1, atol=1e-5)
        np.testing.assert_array_equal(table[:48, 3:].argmax(axis=1), oof["logits"].argmax(axis=1))


def test_the_peer_answers_every_row_once(tmp_path):
    scale.write_predictions(tmp_path / "predictions", SMALL, 1)
    scale.fit_peers(tmp_path, SMALL)
    found = json.loads((tmp_path / "peer.json").read_text())
    assert list(found) == list(scale.LEARNERS)
    assert all(0 < entry["log_loss"] < 2 for entry in found.values())


def test_a_row_tells_the_ratio_and_whether_each_loss_holds():
    costs = {"stack": scale.Cost(30.0, 50.0), "evaluate": scale.Cost(5.0, 6.0)}
    peer = {"lr": {"log_loss": 0.2}, "xgb": {"log_loss": 0.3}}
    rows = scale.rows(SMALL, costs, {"lr": 0.2, "xgb": 0.4}, scale.Cost(20.0, 40.0), peer)
    assert [entry["figure"] for entry in rows] == [1.5, 0.2, 0.4, 30.0, 5.0]
    assert [entry["holds"] for entry in rows] == [False, True, False, None, None]
    assert rows[0]["peer"] == "20.0 s; 40.0 s of processors"
