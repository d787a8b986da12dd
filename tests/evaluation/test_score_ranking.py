"""The order of a ranking, and its corrected p-values."""

from __future__ import annotations

import pytest

from utils.evaluation import score_ranking


def record(value, *, log_loss=0.5, contaminated=False, unknown=(), p=None):
    comparison = None if p is None else {"name": "best", "mcnemar_p": p, "p_value": p, "test": "mcnemar"}
    return {
        **{"accuracy": value, "f1_macro": value, "log_loss": log_loss, "ece": 0.1, "ci95": None, "n_samples": 30},
        **{"contaminated": contaminated, "optimistic": False, "unknown_training_data": list(unknown)},
        **{"vs_best_single": comparison, "vs_soft_voting": None},
    }


def ranked(records, metric="accuracy"):
    return score_ranking.rank(records, dict.fromkeys(records, "member"), "test", metric)


def test_the_metric_decides_then_log_loss_then_the_name():
    records = {
        **{"b": record(0.8), "a": record(0.8), "worse": record(0.7, log_loss=0.1)},
        **{"sharper": record(0.8, log_loss=0.4), "best": record(0.9)},
    }
    found = ranked(records)
    assert [(row["rank"], row["name"]) for row in found["rows"]] == list(
        enumerate(["best", "sharper", "a", "b", "worse"], start=1)
    )
    assert (found["n"], found["order"]) == (30, ["accuracy", "log_loss", "name"])
    by_loss = [row["name"] for row in ranked(records, "log_loss")["rows"]]
    assert by_loss == ["worse", "sharper", "a", "b", "best"]


@pytest.mark.parametrize("mark", [{"contaminated": True}, {"unknown": ["leaked"]}])
def test_contaminated_and_unknown_models_come_last_without_a_rank_and_do_not_count_in_the_correction(mark):
    records = {
        "leaked": record(1.0, p=0.001, **mark),
        "a": record(0.9, p=0.02),
        "b": record(0.8, p=0.03),
        "best": record(0.7),
    }
    rows = {row["name"]: row for row in ranked(records)["rows"]}
    assert list(rows) == ["a", "b", "best", "leaked"]
    assert rows["leaked"]["rank"] is None
    corrected = {name: row["vs_best_single"]["mcnemar_p_holm"] for name, row in rows.items() if name != "best"}
    assert corrected == {"a": 0.04, "b": 0.04, "leaked": None}
    assert rows["best"]["vs_best_single"] is None
