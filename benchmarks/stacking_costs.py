"""What the stacking benchmark times: nested searches beside bare estimators, trees as tensors beside their libraries.

No arguments: `benchmarks/stacking.py` runs it. CPU seconds on one thread, the lower of a few turns.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from reporting import row

FIT = 1.2  # times the bare estimators
SLOWER = 5.0  # times the library, at many rows
EXACT = 1e-6
MANY = 4096
DEPTH, CLASSES, FEATURES = 6, 13, 78
LEARNERS = {
    "stacking_lr": "scikit-learn's LogisticRegression, warm-started",
    "stacking_xgb": "xgboost's XGBClassifier",
    "stacking_rf": "scikit-learn's RandomForestClassifier",
    "stacking_mlp": "the same loop of torch",
}


# fitting -------------------------------------------------------------------------------------------------------------
def time_rows(arrays: Mapping[str, np.ndarray], config: Any, *, turns: int) -> list[dict[str, Any]]:
    """CPU seconds of each stacker's whole nested search beside the same fits of the bare estimators, by turns.

    Three folds in place of five: six fits and the last in place of fifteen and the last.
    """
    from utils.combiners.protocol import MemberFacts, fit_crossfitted
    from utils.stacking_methods import COMBINERS

    logits, labels, folds = arrays["logits"], arrays["labels"], arrays["fold"] % 3
    unknown = np.full(len(logits), np.nan)
    rows = []
    for name, bare in BARE.items():
        facts = MemberFacts(tuple(arrays["members"].tolist()), unknown, unknown, unknown)
        recipe = replace(COMBINERS[name].configured(config, facts), n_jobs=1)
        own, beside = [], []
        for _ in range(turns):
            own.append(_cpu_seconds(lambda recipe=recipe: fit_crossfitted(recipe, logits, labels, folds)))
            calls = list(bare(recipe, logits, labels, list(_rows_of_fits(folds))))
            beside.append(_cpu_seconds(lambda calls=calls: [call() for call in calls]))
        ratio = min(own) / min(beside)
        unit = f"times the bare fits ({min(own):.1f} s of CPU, {len(calls)} fits)"
        size = f"{name}, {logits.shape[0]} members x {len(labels):,} rows: nested search"
        goal = f"at most {FIT}"
        rows.append(row(size, ratio, unit, goal, ratio <= FIT, f"{LEARNERS[name]}: {min(beside):.1f} s"))
    return rows


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's about iterations
        call()
    return time.process_time() - start


def _rows_of_fits(folds: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of every fit of the nested search, bool (N,): without each fold, without each pair; then all of them."""
    names = np.unique(folds)
    for place, first in enumerate(names):
        yield folds != first
        for second in names[place + 1 :] if len(names) > 2 else ():
            yield ~np.isin(folds, [first, second])
    yield np.ones(len(folds), dtype=bool)


def _bare_booster(
    recipe: Any, logits: np.ndarray, labels: np.ndarray, fits: Sequence[np.ndarray]
) -> Iterator[Callable[[], Any]]:
    from xgboost import XGBClassifier

    from utils.combiners.boosting import BINS
    from utils.combiners.stacking_features import STEPS, features

    table, learner = features(logits, STEPS), recipe.learner
    for number, rows in enumerate(fits):
        rounds = learner.n_estimators if number < len(fits) - 1 else recipe.facts["setting"]["rounds"]
        shape = {"n_estimators": rounds, "max_depth": learner.max_depth, "learning_rate": learner.learning_rate}
        model = XGBClassifier(**shape, max_bin=BINS, base_score=0.5, n_jobs=1, verbosity=0)
        yield lambda model=model, rows=rows: model.fit(table[rows], labels[rows])


def _bare_forest(
    recipe: Any, logits: np.ndarray, labels: np.ndarray, fits: Sequence[np.ndarray]
) -> Iterator[Callable[[], Any]]:
    from sklearn.ensemble import RandomForestClassifier

    from utils.combiners.forest import SAMPLE, TREES
    from utils.combiners.stacking_features import STEPS, features

    table = features(logits, STEPS)
    for rows in fits:
        model = RandomForestClassifier(TREES, max_samples=SAMPLE, random_state=0, n_jobs=1)
        yield lambda model=model, rows=rows: model.fit(table[rows], labels[rows])


def _bare_logistic(
    recipe: Any, logits: np.ndarray, labels: np.ndarray, fits: Sequence[np.ndarray]
) -> Iterator[Callable[[], Any]]:
    """For either form its plain ridge, since nobody else has the one that is shrunk to the pool."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import scale

    from utils.combiners.logistic import ITERATIONS, TOLERANCE
    from utils.combiners.stacking_features import features

    learner, setting = recipe.learner, recipe.facts["setting"]
    tables = {kind: scale(features(logits, kind)) for kind in learner.kinds}
    last = learner.strengths[: learner.strengths.index(setting["strength"]) + 1]

    def path(table: np.ndarray, rows: np.ndarray, strengths: Sequence[float]) -> None:
        model = LogisticRegression(warm_start=True, max_iter=ITERATIONS, tol=TOLERANCE)
        for strength in strengths:
            model.set_params(C=1 / (strength * rows.sum())).fit(table[rows], labels[rows])

    for rows in fits[:-1]:
        for kind in learner.kinds * len(learner.forms):
            yield lambda table=tables[kind], rows=rows: path(table, rows, learner.strengths)
    yield lambda: path(tables[setting["features"]], fits[-1], last)


def _bare_perceptron(
    recipe: Any, logits: np.ndarray, labels: np.ndarray, fits: Sequence[np.ndarray]
) -> Iterator[Callable[[], Any]]:
    learner, setting = recipe.learner, recipe.facts["setting"]
    for rows in fits[:-1]:
        for kind in learner.kinds:
            yield _training(learner, kind, logits[:, rows], labels[rows], learner.epochs)
    yield _training(learner, setting["features"], logits, labels, setting["epochs"])


def _training(learner: Any, kind: str, logits: np.ndarray, labels: np.ndarray, epochs: int) -> Callable[[], None]:
    import torch
    from sklearn.preprocessing import scale
    from torch import nn

    from utils.combiners.perceptron import WEIGHT_DECAY
    from utils.combiners.stacking_features import features
    from utils.numeric.batched_training import BATCH_SIZE

    table = torch.from_numpy(scale(features(logits, kind)).astype(np.float32))
    truth = torch.from_numpy(labels)
    sizes = [table.shape[1], *learner.hidden_dims]

    def run() -> None:
        layers: list[nn.Module] = []
        for width, wider in pairwise(sizes):
            layers += [nn.Linear(width, wider), nn.ReLU(), nn.Dropout(learner.dropout)]
        module = nn.Sequential(*layers, nn.Linear(sizes[-1], logits.shape[2])).train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=learner.lr, weight_decay=WEIGHT_DECAY)
        for _ in range(epochs):
            for rows in torch.randperm(len(table)).tensor_split(max(1, len(table) // BATCH_SIZE)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(table[rows]), truth[rows]).backward()
                optimizer.step()

    return run


BARE: dict[str, Callable[[Any, np.ndarray, np.ndarray, Sequence[np.ndarray]], Iterator[Callable[[], Any]]]] = {
    "stacking_lr": _bare_logistic,
    "stacking_xgb": _bare_booster,
    "stacking_rf": _bare_forest,
    "stacking_mlp": _bare_perceptron,
}


# trees ---------------------------------------------------------------------------------------------------------------
def tree_rows(*, rounds: int, turns: int) -> list[dict[str, Any]]:
    """A booster and a forest in both layouts beside their libraries: one row, many rows, the largest difference."""
    from xgboost import DMatrix

    from utils.combiners.trees import booster_module, forest_arrays, forest_module

    booster, forest, table = _grown(rounds)
    text, trees = booster.save_raw("json"), forest_arrays(forest, classes=CLASSES)
    kinds: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[str], Any]]] = {
        f"booster, {rounds} rounds": (
            lambda rows: booster.predict(DMatrix(rows, nthread=1)),
            lambda layout: booster_module(text, classes=CLASSES, source="booster", remedy="", layout=layout),
        ),
        f"forest, {len(forest.estimators_)} trees": (
            forest.predict_proba,
            lambda layout: forest_module(trees, layout=layout),
        ),
    }
    rows = []
    for kind, (library, module_of) in kinds.items():
        for layout in ("perfect", "linked"):
            what = f"{kind}, depth {DEPTH}, {CLASSES} classes, {layout}"
            rows += _beside_library(what, library, module_of(layout), table, turns)
    return rows


def _grown(rounds: int) -> tuple[Any, Any, np.ndarray]:
    """A booster, a forest and the table (4,096, F) float32 that they are asked about."""
    import xgboost
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    table = rng.normal(size=(MANY, FEATURES)).astype(np.float32)
    labels = (table[:, :CLASSES] + 0.8 * rng.normal(size=(MANY, CLASSES))).argmax(axis=1)
    some = slice(0, 1500)
    options = {"objective": "multi:softprob", "num_class": CLASSES, "max_depth": DEPTH, "nthread": 1, "max_bin": 64}
    booster = xgboost.train(options, xgboost.DMatrix(table[some], label=labels[some]), num_boost_round=rounds)
    forest = RandomForestClassifier(rounds, max_depth=DEPTH, random_state=0).fit(table[some], labels[some])
    return booster, forest, table


def _beside_library(
    what: str, library: Callable[[np.ndarray], np.ndarray], module: Any, table: np.ndarray, turns: int
) -> list[dict[str, Any]]:
    from utils.combiners.trees import probabilities

    def ours(rows: np.ndarray) -> np.ndarray:
        return probabilities(module, rows)

    one, many = table[:1], table
    rows = []
    alone = _by_turns([lambda: library(one), lambda: ours(one)], repeats=20 * turns)
    ratio = alone[0] / alone[1]
    unit, beside = f"times as fast as the library ({1e3 * alone[1]:.2f} ms)", f"{1e3 * alone[0]:.2f} ms"
    rows.append(row(f"{what}: 1 row", ratio, unit, "at least 1", ratio >= 1, beside))
    full = _by_turns([lambda: library(many), lambda: ours(many)], repeats=3 * turns)
    ratio = full[1] / full[0]
    unit, beside = f"times the library's time ({1e3 * full[1]:.0f} ms)", f"{1e3 * full[0]:.0f} ms"
    rows.append(row(f"{what}: {MANY:,} rows", ratio, unit, f"at most {SLOWER:g}", ratio <= SLOWER, beside))
    difference = float(np.abs(library(many) - ours(many)).max())
    unit = f"millionths: largest difference {difference:.1e}"
    rows.append(row(f"{what}: exactness", 1e6 * difference, unit, f"at most {EXACT}", difference <= EXACT, None))
    return rows


def _by_turns(calls: Sequence[Callable[[], Any]], *, repeats: int) -> list[float]:
    """The lowest wall seconds of each call, the calls taking turns."""
    found = [float("inf")] * len(calls)
    for turn in range(repeats + 1):  # the first warms up
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn:
                found[place] = min(found[place], time.perf_counter() - start)
    return found
