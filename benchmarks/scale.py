"""The specification's own size: 15 members, 9,545 out-of-sample rows, 13 classes, imported predictions.

    python benchmarks/scale.py                     seven to ten minutes
    python benchmarks/scale.py --quick             5 members, 1,500 rows, short trainings: not the form to report

Each command is a program of its own in a workspace of simulated predictions. Beside `stack` the same learners are
cross-fitted once by scikit-learn and XGBoost, without any search, on the same rows and with as many fits side by side
as there are cores: logistic regression, boosted trees and a perceptron of the specification's shape, each fitted
without one of five folds and then on all rows. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from simulated_workspaces import SimulatedWorkspace, draw

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = PROJECT / "configs" / "ensemble_config.yaml"
COMMANDS = ("import-predictions", "build-ensemble", "stack", "meta-fuse", "evaluate")
TRAIN_SHARE = 0.8
"""Of the out-of-sample rows; the others are val, and test has as many as val."""
SIGNALS = (2.0, 3.0)
"""Of the weakest and the strongest member."""
OUT_OF_SAMPLE = ("oof", "val")
FOLDS = 5
LEFT_OUT = 4  # finished without some requested part
LEARNERS = ("lr", "xgb", "mlp")
BATCH = 128  # of the perceptrons


@dataclass(frozen=True)
class Size:
    """What is measured."""

    members: int
    rows: int
    """Out-of-sample rows, of train and val"""
    classes: int
    epochs: int
    """Of the perceptrons"""
    rounds: int
    """Of the boosted trees"""


FULL = Size(15, 9545, 13, 50, 100)
QUICK = Size(5, 1500, 13, 10, 20)


@dataclass(frozen=True)
class Cost:
    """What one program took."""

    seconds: float
    """By the clock"""
    cpu: float
    """Seconds of all its processors"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="scale.py", description="Commands at the specification's own size.")
    parser.add_argument("--quick", action="store_true", help="few members and rows, short trainings; not to report")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated predictions (default: %(default)s)")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = QUICK if options.quick else FULL
    if options.peer:
        fit_peers(options.peer, size)
        return 0
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        write_predictions(folder / "predictions", size, options.seed)
        (folder / "workspace").mkdir()
        costs = {command: run_command(command, folder, size) for command in COMMANDS}
        losses = stacked_losses(folder / "workspace")
        peer_cost = timed([sys.executable, __file__, "--peer", str(folder), *(["--quick"] if options.quick else [])])
        peer = json.loads((folder / "peer.json").read_text(encoding="utf-8"))
    report(
        "scale",
        rows(size, costs, losses, peer_cost, peer),
        quick=options.quick,
        packages=("numpy", "scikit-learn", "xgboost-cpu", "torch"),
        seed=options.seed,
        peer=peer,
    )
    return 0


def rows(
    size: Size,
    costs: Mapping[str, Cost],
    losses: Mapping[str, float],
    peer_cost: Cost,
    peer: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """Seconds of each command, and `stack` beside its peer; `losses` and those of the peer are {learner: nats}."""
    what = f"{size.members} members, {size.rows:,} rows, {size.classes} classes"
    ratio = costs["stack"].seconds / peer_cost.seconds
    unit = f"times the bare learners ({costs['stack'].seconds:.1f} s; {costs['stack'].cpu:.1f} s of processors)"
    beside = f"{peer_cost.seconds:.1f} s; {peer_cost.cpu:.1f} s of processors"
    table = [row(f"{what}: stack", ratio, unit, "at most 1.0", ratio <= 1, beside)]
    for name, loss in losses.items():
        other = peer[name]["log_loss"]
        held = loss <= other
        table.append(row(f"{what}: log-loss of {name}", loss, "nats, cross-fitted", "no higher", held, f"{other:.4f}"))
    for name, cost in costs.items():
        unit = f"s ({cost.cpu:.1f} s of processors)"
        table.append(row(f"{what}: {name}", cost.seconds, unit, None, None, None))
    return table


def write_predictions(folder: Path, size: Size, seed: int, *, test_rows: int | None = None) -> None:
    """Write `<member>/{oof,val,test}.npz` of simulated members below `folder`; by default test has as many as val."""
    train = round(TRAIN_SHARE * size.rows)
    counts = {"oof": train, "val": size.rows - train, "test": test_rows or size.rows - train}
    described = SimulatedWorkspace("", sum(counts.values()), size.classes, float(np.mean(SIGNALS)))
    signals = np.linspace(*SIGNALS, size.members).tolist()
    drawn = draw(described, np.random.default_rng(seed), size.members, signals=signals)
    classes = np.array([f"class{number:02d}" for number in range(size.classes)])
    start = 0
    for stem, count in counts.items():
        part = slice(start, start + count)
        start += count
        labels = drawn.labels[part]
        ids = np.array([f"{classes[label]}/{stem}{number:05d}.png" for number, label in enumerate(labels)])
        common = {"labels": labels, "sample_ids": ids, "classes": classes}
        if stem == "oof":
            common["fold"] = np.arange(count) % FOLDS
        for member in range(size.members):
            place = folder / f"member{member:02d}"
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / f"{stem}.npz", logits=drawn.logits[member, part].astype(np.float32), **common)


def run_command(command: str, folder: Path, size: Size, *, overrides: Sequence[str] = ()) -> Cost:
    """Run one command of the product in the workspace below `folder`; `overrides` are additional `--set` settings.

    Raises SystemExit where it fails.
    """
    call = [sys.executable, "ensemble_orchestrator.py", command, "--workspace", str(folder / "workspace")]
    if command == COMMANDS[0]:
        call += ["--from", str(folder / "predictions")]
    else:
        call += ["--config", str(CONFIG)]
    settings = [
        f"runs.stacking.mlp_config.epochs={size.epochs}",
        f"runs.stacking.xgb_config.n_estimators={size.rounds}",
        "runs.meta_fuser.input_ensembles=all",
        "runs.meta_fuser.fuser_type=convex",
        "runs.model_soup.enable=false",
        "backbones.include=all",
        *overrides,
    ]
    cost = timed([*call, *(part for setting in settings for part in ("--set", setting))])
    print(f"{command}: {cost.seconds:.1f} s", file=sys.stderr, flush=True)
    return cost


def timed(call: Sequence[str]) -> Cost:
    """Run a program. Raises SystemExit where it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(call, cwd=PROJECT, env=clean_environment(), stdout=subprocess.DEVNULL, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, LEFT_OUT):
        raise SystemExit(f"{' '.join(call[:3])} ended with {done.returncode}; see the messages above")
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def stacked_losses(workspace: Path) -> dict[str, float]:
    """{learner: log-loss of its cross-fitted predictions} of the stackers in a workspace."""
    losses = {}
    for name in LEARNERS:
        path = workspace / "ensembles" / "models" / f"stacking_{name}" / "ensemble.json"
        losses[name] = json.loads(path.read_text(encoding="utf-8"))["crossfit"]["log_loss"]
    return losses


def fit_peers(folder: Path, size: Size) -> None:
    """Cross-fit the bare learners on the predictions below `folder`; write `peer.json`: seconds and log-loss."""
    from joblib import Parallel, delayed
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    table, labels = peer_rows(folder / "predictions")
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(table, labels))
    everything = np.arange(len(labels))
    fits = [(name, *fold) for name in LEARNERS for fold in [*folds, (everything, everything[:0])]]
    done = Parallel(n_jobs=-1)(delayed(_fit_peer)(name, size, table, labels, *rows) for name, *rows in fits)
    found = {}
    for name in LEARNERS:
        answers, seconds = np.empty((len(labels), size.classes)), 0.0
        for (learner, _, held_out), (probabilities, took) in zip(fits, done, strict=True):
            if learner == name:
                answers[held_out] = probabilities
                seconds += took
        answers /= answers.sum(axis=1, keepdims=True)  # of numbers in single precision
        found[name] = {"seconds": round(seconds, 2), "log_loss": float(log_loss(labels, answers))}
        print(f"bare {name}: {seconds:.1f} s in {FOLDS + 1} fits", file=sys.stderr, flush=True)
    (folder / "peer.json").write_text(json.dumps(found), encoding="utf-8")


def _fit_peer(
    name: str, size: Size, table: np.ndarray, labels: np.ndarray, rows: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, float]:
    """Probabilities of the rows held out after one fit, and its seconds; one thread."""
    from threadpoolctl import threadpool_limits

    start = time.perf_counter()
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the perceptron's about its last epoch
        model = _peers(size)[name].fit(table[rows], labels[rows])
        answers = model.predict_proba(table[held_out]) if len(held_out) else np.empty((0, size.classes))
    return answers, time.perf_counter() - start


def peer_rows(folder: Path, stems: Sequence[str] = OUT_OF_SAMPLE) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities float32 (N, M * C) and labels (N,) of the rows of these files of every member."""
    from scipy.special import log_softmax

    tables, labels = [], []
    for stem in stems:
        parts = []
        for member in sorted(folder.iterdir()):
            with np.load(member / f"{stem}.npz") as found:
                parts.append(log_softmax(found["logits"], axis=1))
                of_rows = found["labels"]
        tables.append(np.concatenate(parts, axis=1))
        labels.append(of_rows)
    return np.concatenate(tables).astype(np.float32), np.concatenate(labels)


def _peers(size: Size) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from xgboost import XGBClassifier

    perceptron = MLPClassifier(
        (256, 128), batch_size=BATCH, learning_rate_init=0.001, max_iter=size.epochs, n_iter_no_change=size.epochs
    )
    return {
        "lr": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "xgb": XGBClassifier(n_estimators=size.rounds, max_depth=6, learning_rate=0.1, n_jobs=1, verbosity=0),
        "mlp": make_pipeline(StandardScaler(), perceptron),
    }


if __name__ == "__main__":
    sys.exit(main())
