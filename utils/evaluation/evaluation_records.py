"""Forms of the records that `evaluate` writes; keys that records of earlier versions lack are optional."""

from __future__ import annotations

from utils.core.record_forms import Each, Form

INTERVAL = Each(float, list, count=2)
SCORES: dict[str, Form] = dict.fromkeys(("accuracy", "f1_macro", "log_loss", "ece"), float)
COMPARISON: Form = {
    "name?": str,
    "test?": str,
    **dict.fromkeys(("delta_accuracy?", "delta_log_loss?", "mcnemar_p?", "mcnemar_p_holm?"), float),
    **dict.fromkeys(("p_value?", "p_value_holm?"), float),
    **dict.fromkeys(("delta_ci95?", "delta_log_loss_ci95?"), INTERVAL),
}
EVIDENCE: dict[str, Form] = {
    "n?": int,
    "rows?": str,
    "log_loss?": float,
    "accuracy?": float,
    "log_loss_ci95?": INTERVAL,
}
CHOICE: dict[str, Form] = {
    "name?": str,
    "reason": str,
    "note?": str,
    "latency_ms?": float,
    "evidence?": {**EVIDENCE, "after_selection?": EVIDENCE},
}
RANKING: Form = {
    "split": str,
    "n": int,
    "order": Each(str, list),
    "inputs_digest": str,
    "options?": dict,
    "left_out?": Each(str),
    "peers": Each(str, or_null=True),
    "recommended": {
        **CHOICE,
        "name": str,
        "evidence": {**EVIDENCE, "n": int, "rows": str, "log_loss": float, "accuracy": float},
        "evidence?": {"after_selection?": {**EVIDENCE, "log_loss": float}},
        "not_compared?": Each(str),
    },
    "recommended_fast?": CHOICE,
    "label_issues?": {"in_doubt?": int, "model?": str, "n?": int},
    "rows": Each(
        {
            "name": str,
            "kind": str,
            "rank": (int, type(None)),
            **SCORES,
            "ci95": (dict, type(None)),
            "ci95?": Each(INTERVAL, or_null=True),
            "vs_best_single?": COMPARISON,
            "vs_soft_voting?": COMPARISON,
        },
        list,
    ),
}
THRESHOLDS: dict[str, Form] = {
    "conformal?": Each({"threshold?": float}, or_null=True),
    "selective?": {"threshold?": float, "target_risk?": float},
}
METRICS: Form = {
    **SCORES,
    **THRESHOLDS,
    "name": str,
    "split": str,
    "n_samples": int,
    "n_classes": int,
    "per_class": Each(dict.fromkeys(("precision", "recall", "f1", "support"), float)),
    "confusion_matrix?": Each(Each(int, list), list),
    "ci95?": Each(INTERVAL, or_null=True),
    "vs_best_single?": COMPARISON,
    "vs_soft_voting?": COMPARISON,
    "latency_ms?": dict,
    "size_mb?": float,
    "notes?": Each(str),
}
