"""Scores of members and ensembles on all test images, and without those that have a copy in train or val."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from utils.core.artifacts import read_arrays
from utils.core.errors import UserError
from utils.numeric import metrics
from utils.predictions.store import Store

SPLIT = "test"
AGAIN = "Remove it, then evaluate again"
METRICS = {"accuracy": metrics.accuracy, "f1_macro": metrics.f1_macro, "log_loss": metrics.log_loss}


def scores(store: Store, ranking: Mapping[str, Any], affected: Collection[str]) -> list[dict[str, Any]]:
    """One entry per model of a ranking with stored predictions, in the order of the ranking.

    `all` and `without` are its metrics on all test rows and on rows of images that are not `affected` (sample ids),
    with the number of rows `n`; a metric without rows is None.
    """
    entries = []
    for name, kind, ids, labels, probabilities in _predictions(store, ranking):
        is_unaffected = ~np.isin(ids, list(affected))
        entry: dict[str, Any] = {"name": name, "kind": kind}
        entry |= {
            word: _figures(probabilities[rows], labels[rows])
            for word, rows in (
                ("all", np.ones(len(ids), dtype=bool)),
                ("without", is_unaffected),
                ("affected", ~is_unaffected),
            )
        }
        entries.append(entry)
    return entries


def _figures(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    if not len(labels):
        return {"n": 0, **dict.fromkeys(METRICS)}
    return {"n": len(labels), **{name: float(of(probabilities, labels)) for name, of in METRICS.items()}}


def _predictions(
    store: Store, ranking: Mapping[str, Any]
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]]:
    """Name, kind, sample ids (N,), labels (N,) and probabilities (N, C) of each model with stored predictions."""
    for row in ranking["rows"]:
        name, kind = row["name"], row["kind"]
        try:
            if kind == "ensemble":
                arrays = read_arrays(store.workspace.ensemble_predictions(name, SPLIT), remedy=AGAIN)
                yield name, kind, arrays["sample_ids"], arrays["labels"], arrays["probabilities"]
                continue
            member = store.catalog.members[name]
            if store.is_stored(member, SPLIT):
                rows = store.rows(member, SPLIT)
                yield name, kind, rows.sample_ids, np.asarray(rows.labels), metrics.softmax(np.asarray(rows.logits))
        except (UserError, OSError, KeyError):
            continue  # removed since the evaluation; `status` reports it
