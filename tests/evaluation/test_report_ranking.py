"""The report's ranking: which rows are shown at once, which stand for others, and why one was not compared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from utils.evaluation.report import report_ranking


def data(losses, *, recommended, not_compared=None, focus=None, **marks):
    """Models in the order of `losses` {name: log-loss on the split}; `marks` {model: fields of its row}."""
    rows, metrics = [], {}
    for rank, (name, loss) in enumerate(losses.items(), start=1):
        scores = {"accuracy": 0.9, "f1_macro": 0.9, "log_loss": loss, "ece": 0.02}
        metrics[name] = {**scores, "brier": 0.1, "crossfit": {"n": 100, "log_loss": loss + 0.1}}
        rows.append({"rank": rank, "name": name, "kind": "ensemble", **scores, **marks.get(name, {})})
    chosen = {"name": recommended, "not_compared": not_compared or {}}
    ranking = {"n": 59, "rows": rows, "recommended": chosen, "recommended_fast": {"name": None}}
    return SimpleNamespace(ranking=ranking, metrics=metrics, focus=focus or recommended, split="test")


def test_twelve_rows_and_the_recommended_one_are_shown_at_once():
    losses = {f"m{number:02}": 0.1 + number / 100 for number in range(30)}
    found = report_ranking.ranking(data(losses, recommended="m20"))
    assert [row["name"] for row in found["rows"]] == [*list(losses)[:12], "m20"]
    assert [row["name"] for row in found["more"]] == [name for name in list(losses)[12:] if name != "m20"]
    assert found["count"] == 30
    assert all("13 models of the table above on 59 rows of test" in figure["caption"] for figure in found["figures"])


def test_few_models_are_all_shown():
    found = report_ranking.ranking(data({"a": 0.1, "b": 0.2}, recommended="a"))
    assert (len(found["rows"]), found["more"]) == (2, [])
    assert "Accuracy of 2 models on 59 rows of test" in found["figures"][0]["caption"]


def test_models_of_equal_predictions_are_one_row_that_the_recommended_one_leads():
    losses = {"a": 0.1, "b": 0.1, "c": 0.1 + 1e-12, "d": 0.2}
    found = report_ranking.ranking(data(losses, recommended="b"))
    assert [(row["name"], row["equal"]) for row in found["rows"]] == [("b", ["a", "c"]), ("d", [])]


def test_a_model_that_is_not_ranked_equals_no_ranked_one():
    losses = {"a": 0.1, "b": 0.1}
    found = report_ranking.ranking(data(losses, recommended="a", b={"rank": None, "contaminated": True}))
    assert [(row["rank"], row["equal"]) for row in found["rows"]] == [(1, []), ("-", [])]


@pytest.mark.parametrize(("reasons", "expected"), [({"b": "60 val rows only"}, "60 val rows only"), (None, "")])
def test_a_model_that_could_not_be_compared_says_why_in_its_row(reasons, expected):
    found = report_ranking.ranking(data({"a": 0.1, "b": 0.2}, recommended="a", not_compared=reasons))
    assert [row["excluded"] for row in found["rows"]] == ["", expected]
