"""Stackers and the recommended ensemble beside simpler and other ways, what fitting costs, and trees as tensors.

    python benchmarks/prepare.py --splits 10       once, for hours: the small zoos that all this is measured on
    python -m venv .venv-bench && .venv-bench/bin/pip install -r benchmarks/requirements.txt     once: the peers

    python benchmarks/stacking.py                  handwritten digits; without prepared splits one is made first
    python benchmarks/stacking.py --data DIR       the splits that were prepared of these images; --pretrained with it
    python benchmarks/stacking.py --quick          a zoo of two poor networks, not the one to report

Everything is fitted on the same honest rows of a split (out-of-fold and val) and scored on its test rows, which nothing
has seen, through the full networks. One thread; CPU seconds are compared, so that a busy machine disturbs little. Where
`.venv-bench` is missing, the figures of what runs in it are null. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from reporting import mean_with_interval, report, row
from stacking_costs import time_rows, tree_rows

PROJECT = Path(__file__).resolve().parents[1]
PEER = PROJECT / ".venv-bench" / "bin" / "python"
OVERRIDES = ["runs.score_ensemble.optimization_metric=log_loss", "runs.stacking.meta_learners=[lr,xgb,rf,mlp]"]
WANTED = ("best single", "plain mean", "greedy_selection", "log-linear pool", "scikit-learn", "AutoGluon", "CMA-ES")
"""Beginnings of the ways that the recommended one is to be no worse than."""
LOGISTIC = "scikit-learn's logistic regression"
FUSERS = {"meta_fuser, convex": "convex", "meta_fuser, xgb": "xgb"}
"""Names of the fusers of all ensembles that the product builds, of which the convex one may be recommended."""
PEERS = ("AutoGluon's weighted ensemble", "CMA-ES weights")
STEPS = 25  # of AutoGluon's selection: its default
ROUNDS = 100


@dataclass(frozen=True)
class Outcome:
    """What came of one split."""

    losses: Mapping[str, float | None]
    """{way: test log-loss in nats}; None where its package is missing"""
    recommended: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="stacking.py", description="Stackers compared, timed, and trees as tensors.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the images whose prepared splits are read")
    parser.add_argument("--pretrained", action="store_true", help="members that were prepared with --pretrained")
    parser.add_argument("--quick", action="store_true", help="a zoo of two poor networks, one turn")
    parser.add_argument("--peers", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peers:
        fit_peers(options.peers)
        return 0
    if not PEER.is_file():
        print(f"{PEER}: not there, so that less is compared; the second line of --help makes it", file=sys.stderr)
    found = prepare.ready(options.data, quick=options.quick, pretrained=options.pretrained)
    if found is None:
        return 1
    print(f"{found.folder}: {len(found.files)} splits, {found.age_hours:.1f} hours old, digest {found.digest}")
    sys.path.insert(0, str(PROJECT))
    with ExitStack() as stack:
        _on_one_thread(stack)
        outcomes = []
        for path in found.files:
            start = time.perf_counter()
            outcomes.append(outcome(prepare.read(path)))
            print(f"{path.stem}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        turns = 1 if options.quick else 2
        rows = [
            *loss_rows(outcomes),
            *time_rows(prepare.read(found.files[0]), settings(), turns=turns),
            *tree_rows(rounds=10 if options.quick else ROUNDS, turns=turns),
        ]
    report(
        "stacking",
        rows,
        quick=options.quick,
        packages=("numpy", "scikit-learn", "xgboost-cpu", "torch"),
        data="handwritten digits" if options.data is None else options.data.name,
        **found.facts(),
        losses=[dict(entry.losses) for entry in outcomes],
        recommended=[entry.recommended for entry in outcomes],
        peers=peer_versions(),
    )
    return 0


def _on_one_thread(stack: ExitStack) -> None:
    import torch
    from threadpoolctl import threadpool_limits

    stack.enter_context(threadpool_limits(limits=1))
    torch.set_num_threads(1)


def settings(fuser: str = "convex") -> Any:
    """The demo's configuration with all stackers, all of it fitted for log-loss, and this `fuser_type`."""
    from utils.core.config_file import load_config

    return load_config(prepare.CONFIG, overrides=[*OVERRIDES, f"runs.meta_fuser.fuser_type={fuser}"])


# log-loss ------------------------------------------------------------------------------------------------------------
def outcome(arrays: Mapping[str, np.ndarray]) -> Outcome:
    """Every way fitted on the honest rows of one split and scored on its test rows."""
    from utils.building.recommendation import Candidate, recommend
    from utils.combiners.protocol import MemberFacts, fit_nested
    from utils.meta_methods import FuserInput, MetaFuserCombiner
    from utils.numeric.metrics import log_loss, log_loss_per_row, softmax

    logits, labels, folds = arrays["logits"], arrays["labels"], arrays["fold"]
    test, truth = arrays["test_logits"], arrays["test_labels"]
    config = settings()
    names = tuple(arrays["members"].tolist())
    unknown = np.full(len(names), np.nan)
    keys = tuple(zip(arrays["split"].tolist(), arrays["sample_ids"].tolist(), strict=True))

    def candidate(name: str, kind: str, probabilities: np.ndarray) -> Candidate:
        hits = probabilities.argmax(axis=1) == labels
        return Candidate(name, kind, keys, log_loss_per_row(probabilities, labels), hits)

    candidates, losses = [], {}
    for name, own, answers in zip(names, softmax(logits), softmax(test), strict=True):
        candidates.append(candidate(name, "member", own))
        losses[name] = log_loss(answers, truth)
    facts = MemberFacts(names, unknown, unknown, unknown)
    offered, beside = _recipes(config, facts)
    inputs = []
    for name, recipe in {**offered, **beside}.items():
        start = time.process_time()
        nested = fit_nested(recipe, logits, labels, folds)
        losses[name] = log_loss(recipe.predict_proba(test), truth)
        if name in offered:
            candidates.append(candidate(name, "ensemble", nested.crossfit))
            inputs.append(FuserInput(name, recipe, np.arange(len(names)), nested))
        print(f"  {name}: {time.process_time() - start:.1f} s of CPU", file=sys.stderr, flush=True)
    without_fuser = recommend(candidates)
    for name, kind in FUSERS.items():
        fuser = MetaFuserCombiner.over(settings(kind), facts, inputs)
        unseen = fit_nested(fuser, logits, labels, folds).crossfit
        losses[name] = log_loss(fuser.predict_proba(test), truth)
        if kind == "convex":
            candidates.append(candidate(name, "ensemble", unseen))
    chosen = recommend(candidates)
    losses = {
        "recommended": losses[chosen["name"]],
        "recommended without the fuser": losses[without_fuser["name"]],
        "best single": losses[chosen["best_single"]],
        "plain mean": losses["soft_voting"],
        **{name: losses[name] for name in (*offered, *FUSERS, *beside) if name != "soft_voting"},
        LOGISTIC: log_loss(_scikit_learn(logits, labels, test), truth),
    }
    weights = peer_weights(softmax(logits), labels)
    for name in PEERS:
        found = weights.get(name)
        losses[name] = None if found is None else log_loss(np.tensordot(found, softmax(test), axes=1), truth)
    return Outcome(losses, chosen["name"])


def _recipes(config: Any, facts: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the product builds under these settings, of which one is recommended; and what is compared beside."""
    from utils.combiners.weighting import WeightedPool
    from utils.ensemble_methods import COMBINERS
    from utils.stacking_methods import COMBINERS as STACKERS

    kinds = {**COMBINERS, **STACKERS}
    weighted = WeightedPool.configured(config, facts)
    beside = {
        "convex weights": replace(weighted, kind="linear"),
        "log-linear pool": replace(weighted, kind="log_linear"),
    }
    return {name: kind.configured(config, facts) for name, kind in kinds.items()}, beside


def _scikit_learn(logits: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Its stacker as it is usually written: log-probabilities, standardised, C by five folds; test rows (T, C)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from utils.numeric.metrics import log_softmax

    steps = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(
        steps, {"logisticregression__C": np.logspace(-4, 2, 13)}, scoring="neg_log_loss", cv=5, error_score="raise"
    )

    def table(values: np.ndarray) -> np.ndarray:
        return log_softmax(values).transpose(1, 0, 2).reshape(values.shape[1], -1)

    return search.fit(table(logits), labels).predict_proba(table(test))


def peer_weights(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """{peer: weights (M,)} of those that are installed."""
    if not PEER.is_file():
        return {}
    with tempfile.TemporaryDirectory(prefix="stacking-") as name:
        file = Path(name) / "rows.npz"
        np.savez(file, probabilities=probabilities.astype(np.float32), labels=labels)
        call = [str(PEER), __file__, "--peers", str(file)]
        subprocess.run(call, check=True, stdout=sys.stderr)
        with np.load(file.with_name("weights.npz")) as found:
            return {peer: found[peer] for peer in found.files}


def fit_peers(file: Path) -> None:
    """Write `weights.npz` beside the rows {probabilities (M, N, C), labels (N,)}; runs in the peers' environment."""
    with np.load(file) as rows:
        probabilities, labels = rows["probabilities"], rows["labels"]
    found = {}
    for name, fit in zip(PEERS, (_autogluon, _cma), strict=True):
        try:
            found[name] = fit(probabilities, labels)
        except ModuleNotFoundError as error:
            print(f"{name}: {error}", file=sys.stderr)
    np.savez(file.with_name("weights.npz"), **found)


def _autogluon(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from autogluon.core import metrics
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    return np.asarray(
        EnsembleSelection(STEPS, "multiclass", metrics.log_loss).fit(list(probabilities), labels).weights_
    )


def _cma(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Soft-max weights of least log-loss by the covariance matrix adaptation of Hansen and Ostermeier (2001)."""
    import cma

    of_truth = probabilities[:, np.arange(len(labels)), labels].astype(np.float64)

    def weights(point: np.ndarray) -> np.ndarray:
        powers = np.exp(point - np.max(point))
        return powers / powers.sum()

    def loss(point: np.ndarray) -> float:
        return float(-np.log(np.maximum(weights(point) @ of_truth, 1e-12)).mean())

    options = {"seed": 1, "verbose": -9, "maxfevals": 3000}
    best, _ = cma.fmin2(loss, np.zeros(len(probabilities)), 1.0, options)
    return weights(np.asarray(best))


def peer_versions() -> str | None:
    """Names and versions of the peers; None where there are none."""
    if not PEER.is_file():
        return None
    code = (
        "from importlib.metadata import distributions as d; "
        "print(*sorted(f'{e.name} {e.version}' for e in d() if e.name in ('autogluon.core', 'cma')), sep=', ')"
    )
    return subprocess.run([str(PEER), "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def loss_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Mean over the splits of each way's test log-loss, and whether the recommended one's is at most that."""
    rows = []
    chosen = [entry.losses["recommended"] for entry in outcomes]
    for name in outcomes[0].losses:
        found = [entry.losses[name] for entry in outcomes]
        what = f"test log-loss, {len(outcomes)} split{'s' * (len(outcomes) > 1)}: {name}"
        wanted = "the recommended one's is at most this" if name.startswith(WANTED) else None
        if None in found:
            rows.append(row(what, None, "nats", wanted, None, None))
            continue
        mean = float(np.mean(found))
        beside, holds = None, None
        if name != "recommended":
            gains = [other - own for other, own in zip(found, chosen, strict=True)]
            beside = f"the recommended one gains {mean_with_interval(gains, '+.4f')}"
            holds = bool(np.mean(gains) >= 0) if wanted else None
        rows.append(row(what, mean, f"nats: {mean_with_interval(found, '.4f')}", wanted, holds, beside))
    return rows


if __name__ == "__main__":
    sys.exit(main())
