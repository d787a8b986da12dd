"""The counts of a confusion matrix that `metrics.json` does not list."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from utils.evaluation import evaluate


def test_counts_above_zero_are_written_beside_the_metrics_and_removed_where_they_are_listed(tmp_path):
    path = tmp_path / "confusion_matrix.npz"
    model = SimpleNamespace(probabilities=np.eye(3)[[0, 0, 1, 2, 2]])
    labels = np.array([0, 0, 2, 2, 2])
    record = {"confusion_matrix": None, "per_class": {"ant": {}, "bee": {}, "cat": {}}}
    evaluate._write_confusion_counts(path, model, labels, record)
    with np.load(path) as arrays:
        counts = {
            (str(arrays["classes"][true]), str(arrays["classes"][predicted])): int(count)
            for true, predicted, count in zip(arrays["true"], arrays["predicted"], arrays["count"], strict=True)
        }
    assert counts == {("ant", "ant"): 2, ("cat", "bee"): 1, ("cat", "cat"): 2}
    evaluate._write_confusion_counts(path, model, labels, record | {"confusion_matrix": [[2]]})
    assert not path.exists()
