"""Workspaces that hold the records of an evaluation and nothing else."""

from __future__ import annotations

import json


def write_workspace(folder, scores, single="C4.5", recommended="C4.5+m+cf", classes=("a", "b"), unranked=()):
    """What `evaluate` leaves, as far as a comparison reads it; `scores` {method: accuracy}."""
    place = folder / "metrics_output" / "ensembles"
    rows = []
    for rank, (name, accuracy) in enumerate(scores.items(), start=1):
        kind = "member" if name == single else "ensemble"
        scored = {"accuracy": accuracy, "f1_macro": accuracy, "log_loss": 1 - accuracy, "ece": 0.1}
        by_class = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 5}
        record = scored | {"name": name, "split": "test", "n_samples": 10, "n_classes": 2, "top_5_accuracy": None}
        record["per_class"] = dict.fromkeys(classes, by_class)
        path = place / ("members" if kind == "member" else "") / name / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(record))
        rows.append({"name": name, "kind": kind, "rank": None if name in unranked else rank, "ci95": None} | scored)
    evidence = {"n": 5, "rows": "oof", "log_loss": 0.1, "accuracy": 0.9}
    ranking = {
        **{"split": "test", "n": 10, "order": ["accuracy"], "inputs_digest": "", "rows": rows},
        "peers": {"best_single": single},
        "recommended": {"name": recommended, "reason": "", "evidence": evidence},
    }
    (place / "ranking.json").write_text(json.dumps(ranking))
    return str(folder)
