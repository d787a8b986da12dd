"""The benchmark beside AutoGluon's stack: its rows, and what it reads of an evaluated workspace."""

from __future__ import annotations

import json

import autogluon_stack
import pytest

from scale import Cost, Size

SMALL = Size(2, 60, 3, 2, 2)
LOSSES = {"stacking_lr": 0.2, "stacking_xgb": 0.3, "stacking_rf": 0.4, "stacking_mlp": 0.5, "voting": 0.6}


def rows(cost, peer_cost, peer):
    return autogluon_stack.rows(SMALL, cost, "stacking_lr", LOSSES, peer_cost, peer)


@pytest.mark.parametrize(("seconds", "loss", "verdicts"), [(10.0, 0.21, (True, True)), (10.1, 0.19, (False, False))])
def test_both_goals_are_judged_beside_the_best_model_of_the_peer(seconds, loss, verdicts):
    peer = {"best": "WeightedEnsemble_L2", "losses": {"WeightedEnsemble_L2": loss, "XGBoost_BAG_L1": 0.35}}
    found = rows(Cost(seconds, 15.0), Cost(20.0, 40.0), peer)
    assert tuple(entry["holds"] for entry in found) == (*verdicts, None, None, None, None)
    assert found[0]["peer"] == "20.0 s; 40.0 s of processors"
    assert [entry["peer"] for entry in found[1:]] == [f"WeightedEnsemble_L2: {loss:.4f}", None, "0.3500", None, None]
    assert [entry["figure"] for entry in found[2:]] == [0.2, 0.3, 0.4, 0.5]


def test_without_the_peer_nothing_is_judged():
    found = rows(Cost(10.0, 15.0), None, None)
    assert found[0]["figure"] is None
    assert {(entry["holds"], entry["peer"]) for entry in found} == {(None, None)}


def test_losses_are_those_of_the_ranking(tmp_path):
    ranking = {"recommended": {"name": "b"}, "rows": [{"name": "a", "log_loss": 0.5}, {"name": "b", "log_loss": 0.4}]}
    path = tmp_path / "ensembles" / "results" / "ranking.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(ranking))
    assert autogluon_stack.pipeline.recommended(tmp_path) == ("b", {"a": 0.5, "b": 0.4})
