"""The sentences of the report."""

from __future__ import annotations

import pytest
from report_values import report_values

from utils.evaluation.report import report_summary

SCORES = {
    **{"accuracy": 0.9, "f1_macro": 0.9, "log_loss": 0.3, "ece": 0.01, "mce": 0.2, "n_samples": 1000},
    **{"members": ["a", "b"], "confusion_matrix": [[40, 5, 5], [0, 48, 2], [1, 0, 49]]},
    "per_class": {
        "ant": {"f1": 0.8, "recall": 0.8, "support": 50},
        "bee": {"f1": 0.9, "recall": 0.96, "support": 50},
        "cat": {"f1": 0.85, "recall": 0.98, "support": 50},
    },
}
EVIDENCE = {"n": 400, "rows": "oof+val", "log_loss": 0.3, "log_loss_ci95": [0.2, 0.4], "accuracy": 0.9}


def data(focus="votes", *, rows=None, evaluated=None, **more):
    """What the summary reads of a report."""
    rows = rows or [{"name": "votes", "rank": 1}, {"name": "a", "rank": 2}]
    metrics = {row["name"]: SCORES for row in rows} | {focus: SCORES | (evaluated or {})}
    ranking = {
        "rows": rows,
        "order": ["accuracy", "log_loss", "name"],
        "recommended": {"name": "votes", "reason": "lowest log-loss", "evidence": EVIDENCE},
    }
    return report_values(metrics, focus, **{"classes": ("ant", "bee", "cat"), "ranking": ranking} | more)


def sentence(found, start):
    """From the one place of the summary where a sentence begins so, to the end of its topic."""
    (text,) = [text[text.index(start) :] for _, text in report_summary.summary(found) if start in text]
    return text


def test_confusions_are_sorted_by_count_and_then_by_name():
    assert report_summary.most_confused(data()) == [
        ("ant", "bee", 5, 50),
        ("ant", "cat", 5, 50),
        ("bee", "cat", 2, 50),
        ("cat", "ant", 1, 50),
    ]
    assert len(report_summary.most_confused(data(), most=1)) == 1


def test_confusions_are_named_by_the_order_of_the_classes_not_of_the_record():
    ordered = data(classes=("cat", "ant", "bee"), evaluated={"confusion_matrix": [[0, 7, 0], [0, 0, 0], [0, 0, 0]]})
    assert report_summary.most_confused(ordered) == [("cat", "ant", 7, 7)]


@pytest.mark.parametrize(
    ("bounds", "verdict"), [([0.01, 0.03], "better"), ([-0.03, -0.01], "worse"), ([-0.01, 0.01], "not significant")]
)
def test_the_interval_of_a_difference_decides(bounds, verdict):
    comparison = {"name": "a", "delta_accuracy": 0.02, "delta_ci95": bounds, "mcnemar_p": 0.04}
    text = sentence(data(evaluated={"vs_best_single": comparison}), "Compared with the best single model (a)")
    assert verdict in text
    assert "+2.0" in text


def test_log_losses_are_compared_with_a_temperature_on_both_sides():
    comparison = {"name": "a", "delta_accuracy": 0.02, "delta_ci95": [0.01, 0.03], "delta_log_loss": -0.5}
    calibrated = {"delta_calibrated_log_loss": -0.0123, "delta_calibrated_log_loss_ci95": [-0.02, -0.001]}
    start = "Compared with the best single model (a)"
    text = sentence(data(evaluated={"vs_best_single": comparison | calibrated}), start)
    assert "After temperature scaling of both" in text
    assert "-0.0123 [-0.0200, -0.0010]" in text
    assert "temperature" not in sentence(data(evaluated={"vs_best_single": comparison}), start)


def test_the_rank_counts_ranked_models_alone():
    rows = [{"name": "votes", "rank": 1}, {"name": "leaked", "rank": None, "contaminated": True}]
    assert "it is number 1 of 1 by accuracy" in sentence(data(rows=rows), "On the 1,000 rows of test")
    assert any("leaked" in warning for warning in report_summary.warnings(data(rows=rows)))


def test_another_first_model_is_named_and_not_recommended():
    rows = [{"name": "a", "rank": 1}, {"name": "votes", "rank": 2}]
    assert "not recommended" in sentence(data(rows=rows), "a ranks first on test")
    assert not [text for _, text in report_summary.summary(data()) if "ranks first" in text]


def test_few_rows_and_notes_are_warnings():
    assert report_summary.warnings(data()) == []
    found = report_summary.warnings(data(evaluated={"n_samples": 20}, notes=["Something is missing."]))
    assert ["20 rows" in found[0], found[1]] == [True, "Something is missing."]


def test_the_target_risk_of_earlier_records_is_read():
    assert report_summary.target_risk({"target_risk": 0.1, "wanted_error": 0.1}) == 0.1
    assert report_summary.target_risk({"wanted_error": 0.2}) == 0.2
    assert report_summary.target_risk({}) is None
