"""The rows of the report's ranking: at most twelve, models that predict the same as one, and who was no candidate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from utils.evaluation import report_ranking

EVIDENCE = {"rows": "oof+val", "n": 537}


def row(name: str, loss: float, kind: str = "ensemble") -> dict:
    return {"name": name, "rank": 1, "kind": kind, "accuracy": 0.9, "f1_macro": 0.9, "log_loss": loss, "ece": 0.1}


def data_of(rows: list[dict], recommended: str, crossfits: dict | None = None) -> SimpleNamespace:
    metrics = {each["name"]: {**each, "members": [], "crossfit": {"n": 537, "log_loss": 0.2}} for each in rows}
    for name, crossfit in (crossfits or {}).items():
        metrics[name] |= {"crossfit": crossfit}
    ranking = {
        "rows": rows,
        "recommended": {"name": recommended, "evidence": EVIDENCE},
        "recommended_fast": {"name": None},
        "peers": {"best_single": rows[-1]["name"]},
    }
    catalog = SimpleNamespace(members={"soup": SimpleNamespace(checkpoints=[{"stage": "greedy_soup"}])})
    return SimpleNamespace(ranking=ranking, metrics=metrics, focus=recommended, catalog=catalog)


def test_twelve_rows_come_first_with_the_recommended_one_and_the_best_single_member_in_their_places():
    rows = [row(f"m{number:02d}", number) for number in range(65)]
    table = report_ranking.table(data_of(rows, "m40"))
    assert [each["name"] for each in table["first"]] == [*(f"m{number:02d}" for number in range(10)), "m40", "m64"]
    assert [each["name"] for each in table["all"]] == [each["name"] for each in rows]
    assert report_ranking.table(data_of(rows[:12], "m00"))["all"] == []


def test_models_with_equal_figures_are_one_row_that_names_the_others():
    rows = [row("uniform", 0.3), row("soft_voting", 0.3), row("other", 0.31), row("pruned", 0.3)]
    table = report_ranking.table(data_of(rows, "soft_voting"))
    assert [(each["name"], each["same"]) for each in table["first"]] == [
        ("soft_voting", "uniform, pruned"),
        ("other", ""),
    ]
    assert len(table["all"]) == 4


@pytest.mark.parametrize(
    ("name", "crossfit", "reason"),
    [
        ("a", {"n": 537, "log_loss": 0.2}, ""),
        ("a", {"n": 60, "log_loss": 0.2}, "60 val rows only"),
        ("a", None, "no out-of-sample rows"),
        ("soup", {"n": 60, "log_loss": 0.2}, "60 rows; val has chosen it"),
    ],
)
def test_who_was_no_candidate_says_why(name, crossfit, reason):
    data = data_of([row(name, 0.3), row("b", 0.4)], "b", {name: crossfit})
    assert report_ranking.no_candidate(data.metrics[name], data) == reason


def test_unknown_training_data_comes_before_any_other_reason():
    data = data_of([row("a", 0.3), row("b", 0.4)], "b")
    record = data.metrics["a"] | {"unknown_training_data": ["a"]}
    assert report_ranking.no_candidate(record, data) == "training data not stated"
