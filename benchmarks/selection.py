"""Greedy selection and convex weights: time beside AutoGluon's EnsembleSelection, memory, growth, certificates.

    python -m venv .venv-bench && .venv-bench/bin/pip install -r benchmarks/requirements.txt     once: the peer

    python benchmarks/selection.py                   outputs of scikit-learn models on handwritten digits
    python benchmarks/selection.py --workspace DIR   honest predictions of a workspace that build-ensemble has run in
    python benchmarks/selection.py --quick           smaller arrays, not the ones to report

The outputs are resampled with noise to the sizes that are asked for. Both sides read the same float32 arrays from files
in processes of their own, on one thread, and take turns; what is timed is the selection alone, in CPU seconds, which
other work on the machine disturbs least. Both scores are computed by `utils.numeric.metrics` from the weights that
were found. Where `.venv-bench` is missing, the peer's figures are null. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = PROJECT / "configs" / "votes.yaml"
PEER = PROJECT / ".venv-bench" / "bin" / "python"
CLASSES = 13
STEPS = 25
METRICS = ("log_loss", "accuracy", "f1_macro")
GOALS = {15: {"log_loss": 300, "accuracy": 15, "f1_macro": 15}, 150: {"log_loss": 100, "accuracy": 15, "f1_macro": 15}}
TRIES = {15: 3, 150: 6}  # ways of breaking ties, of which the best is kept; the peer draws among equals once
TURNS = {15: 3, 150: 2}
REPEATS = 5  # of ours within a turn: a run of milliseconds is easily disturbed
LIMIT_MB = 2000
GROWTH = 1.25  # of the time per number, from the smallest of three sizes to the largest
WEIGHTS = {"linear": 0.2, "log_linear": 1.0}
CERTAIN = 1e-8


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="selection.py", description="Greedy selection and convex weights, timed.")
    parser.add_argument("--workspace", metavar="DIR", type=Path, help="take the honest predictions of this workspace")
    parser.add_argument("--quick", action="store_true", help="smaller arrays, one turn")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arguments", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, options.arguments)))
        return 0
    if options.workspace is not None and not (options.workspace / "ensembles").is_dir():
        print(f"--workspace {options.workspace}: no ensembles in it; run build-ensemble there first", file=sys.stderr)
        return 1
    if not PEER.is_file():
        print(f"{PEER}: not there, so that nothing is compared; the first line of --help makes it", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="selection-") as name:
        folder = Path(name)
        base = part("honest" if options.workspace else "models", folder, [], workspace=options.workspace)
        rows: list[dict[str, Any]] = []
        for members in GOALS:
            size = [members, 1_000 if options.quick else 10_000]
            rows += race_rows(folder, *size, turns=1 if options.quick else TURNS[members])
        rows += weight_rows(folder, 15, 1_000 if options.quick else 10_000)
        rows += growth_rows(folder, *((60, 3_000) if options.quick else (1_500, 100_000)))
    report(
        "selection", rows, quick=options.quick, packages=("numpy", "scikit-learn"), outputs=base, peer=peer_version()
    )
    return 0


# rows ----------------------------------------------------------------------------------------------------------------
def race_rows(folder: Path, members: int, count: int, *, turns: int) -> list[dict[str, Any]]:
    """Each metric beside the peer: seconds of both, who scores better, and the share of rows without dispute."""
    facts = part("resampled", folder, [str(members), str(count)])
    ours: dict[str, list[dict[str, Any]]] = {metric: [] for metric in METRICS}
    theirs: dict[str, list[dict[str, Any]]] = {metric: [] for metric in METRICS}
    for turn in range(turns):
        sides = [("selected", ours, sys.executable), ("peer", theirs, str(PEER))]
        for name, found, python in sides if turn % 2 == 0 else sides[::-1]:
            if not Path(python).is_file():
                continue
            for metric, entry in part(name, folder, [str(TRIES[members])], python=python).items():
                found[metric].append(entry)
                print(f"{members:5} members {metric:9} {name:9} {entry['seconds']:9.4f} s", file=sys.stderr, flush=True)
    peer_losses = part("losses", folder, []) if PEER.is_file() else {}
    size = f"{members} members x {count:,} rows x {CLASSES} classes"
    share = f"{size}: rows on which all members agree"
    rows = [row(share, facts["agreed"], "of all", None, None, None)]
    for metric, goal in GOALS[members].items():
        mine = min(entry["seconds"] for entry in ours[metric])
        score = ours[metric][0]["loss"]
        what, unit = f"{size}: {metric}", f"times as fast ({1000 * mine:.2f} ms; loss {score:.6f})"
        wanted = f"at least {goal}, loss no higher"
        if not theirs[metric]:
            rows.append(row(what, None, unit, wanted, None, None))
            continue
        beside, other = min(entry["seconds"] for entry in theirs[metric]), peer_losses[metric]
        holds = beside / mine >= goal and score <= other + 1e-12
        rows.append(row(what, beside / mine, unit, wanted, holds, f"{beside:.3f} s; loss {other:.6f}"))
    return rows


def weight_rows(folder: Path, members: int, count: int) -> list[dict[str, Any]]:
    """Convex weights: seconds, and how far from the optimum they are at most."""
    part("resampled", folder, [str(members), str(count)])
    rows = []
    for kind, entry in part("weights", folder, []).items():
        holds = entry["seconds"] <= WEIGHTS[kind] and entry["gap"] <= CERTAIN
        what = f"{members} members x {count:,} rows x {CLASSES} classes: weights of the {kind.replace('_', '-')} pool"
        unit = f"s, optimal to {entry['gap']:.1e} (log-loss {entry['loss']:.6f})"
        rows.append(row(what, entry["seconds"], unit, f"at most {WEIGHTS[kind]}, {CERTAIN}", holds, None))
    return rows


def growth_rows(folder: Path, members: int, count: int) -> list[dict[str, Any]]:
    """Peak memory of the largest selection, read from a memory map, and how time grows with members and with rows."""
    part("resampled", folder, [str(members), str(count)])
    rows = []
    for metric in ("log_loss", "f1_macro"):
        points = {
            "members": [part("large", folder, [metric, str(members * third // 3), str(count)]) for third in (1, 2, 3)],
            "rows": [
                part("large", folder, [metric, str(members // 3), str(count * third // 3)]) for third in (1, 2, 3)
            ],
        }
        whole = points["members"][-1]
        size = f"{members:,} members x {count:,} rows x {CLASSES} classes: {metric}"
        peak = whole["megabytes"]
        holds = None if peak is None else peak < LIMIT_MB
        rows.append(row(f"{size}, peak memory", peak, "MB resident", f"under {LIMIT_MB}", holds, None))
        rows.append(row(f"{size}, time", whole["seconds"], "s", None, None, f"{whole['cpu']:.1f} s of CPU"))
        for name, found in points.items():
            growth = found[-1]["cpu"] / found[0]["cpu"] / 3
            seen = ", ".join(f"{entry['cpu']:.2f}" for entry in found)
            text = f"times the CPU per number at a third ({seen} s)"
            rows.append(
                row(f"{size}, three times the {name}", growth, text, f"at most {GROWTH}", growth <= GROWTH, None)
            )
    return rows


# processes -----------------------------------------------------------------------------------------------------------
def part(
    name: str, folder: Path, arguments: Sequence[str], *, python: str = sys.executable, workspace: Path | None = None
) -> dict[str, Any]:
    """What one part of this file, run in a process of its own on one thread, prints as its last line."""
    call = [python, __file__, "--part", name, "--folder", str(folder), "--arguments", *arguments]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = clean_environment() | threads | ({"DBT_BASE_DIR": str(workspace.resolve())} if workspace else {})
    if python == sys.executable:
        environment["PYTHONPATH"] = str(PROJECT)
    done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the part {name} of the benchmark ended with {done.returncode}; see the messages above")
    return json.loads(done.stdout.splitlines()[-1])


def peer_version() -> str | None:
    """Name and version of the peer; None where it is not installed."""
    if not PEER.is_file():
        return None
    code = "from importlib.metadata import version; print('autogluon.core', version('autogluon.core'))"
    return subprocess.run([str(PEER), "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


# parts, each in a process of its own ---------------------------------------------------------------------------------
def honest(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Honest predictions of the workspace in the environment."""
    from utils import base_back
    from utils.core.config_file import load_config
    from utils.predictions import catalog, member_selection
    from utils.predictions.rows import align
    from utils.predictions.store import Store

    config, place = load_config(CONFIG, overrides=["device=cpu"]), base_back.open_workspace()
    found = catalog.load(place)
    store = Store(config, place, found)
    rows = align(store.out_of_sample_parts(member_selection.select(found, config)), found.classes)
    return _saved(folder, rows.logits, rows.labels, "honest predictions of a workspace")


def models(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Out-of-fold predictions of fifteen scikit-learn models on handwritten digits, each seeing half of the pixels."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
    from sklearn.model_selection import cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    images, labels = load_digits(return_X_y=True)
    kinds: list[Any] = [
        *(GaussianNB(var_smoothing=smoothing) for smoothing in (1e-3, 1e-2, 1e-1)),
        *(KNeighborsClassifier(neighbours) for neighbours in (3, 10, 30)),
        *(LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage) for shrinkage in (0.01, 0.1, 0.5)),
        *(QuadraticDiscriminantAnalysis(reg_param=shrinkage) for shrinkage in (0.1, 0.3, 0.6)),
        *(DecisionTreeClassifier(max_depth=depth, random_state=0) for depth in (6, 8, 12)),
    ]
    rng = np.random.default_rng(0)
    logits = []
    for model in kinds:
        seen = images[:, rng.permutation(64)[:32]]
        found = cross_val_predict(model, seen, labels, cv=3, method="predict_proba")
        logits.append(np.log(np.clip(found, 1e-4, 1)))
    return _saved(folder, np.array(logits), labels, "scikit-learn models on handwritten digits")


def _saved(folder: Path, logits: Any, labels: Any, source: str) -> dict[str, Any]:
    import numpy as np

    np.savez(folder / "base.npz", logits=logits.astype(np.float32), labels=labels.astype(np.int64))
    agreed = (logits.argmax(axis=2) == logits[0].argmax(axis=1)).all(axis=0).mean()
    return {"source": source, "shape": list(logits.shape), "agreed": round(float(agreed), 4)}


def resampled(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Write `probabilities.npy` (M, N, C) float32 and `labels.npy` (N,): the outputs resampled with noise.

    Rows are drawn with replacement. Each row's classes are renamed at random among all of them; names left over get
    the row's lowest logit. Noise in the scale of the outputs is added, some of it shared by the members of a row;
    members beyond the base ones are base members with other noise, and each has its own sharpness.
    """
    import numpy as np

    members, count = map(int, arguments)
    with np.load(folder / "base.npz") as base:
        logits, labels = base["logits"], base["labels"]
    rng = np.random.default_rng([members, count])
    drawn = rng.integers(len(labels), size=count)
    known, classes = logits.shape[2], max(CLASSES, logits.shape[2])
    names = rng.random((count, classes)).argsort(axis=1)
    rows = np.arange(count)[:, None]
    scale = np.float32(0.15 * np.median(logits.max(axis=2) - logits.mean(axis=2)))
    shared = scale * rng.standard_normal((count, classes), dtype=np.float32)
    noise = scale * rng.standard_normal((count + 50_000, classes), dtype=np.float32)
    spread = []
    for outputs in logits:
        wide = np.repeat(outputs[drawn].min(axis=1, keepdims=True), classes, axis=1)
        wide[rows, names[:, :known]] = outputs[drawn]
        spread.append(wide + shared)
    path, agreed, first = folder / "probabilities.npy", np.ones(count, dtype=bool), None
    for member in range(members):
        offset, sharpness, own = int(rng.integers(50_000)), rng.uniform(0.8, 1.25), rng.uniform(0.5, 1.5)
        found = np.float32(sharpness) * spread[member % len(spread)] + np.float32(own) * noise[offset : offset + count]
        np.exp(found - found.max(axis=1, keepdims=True), out=found)
        found /= found.sum(axis=1, keepdims=True)
        first = found.argmax(axis=1) if first is None else first
        agreed &= found.argmax(axis=1) == first
        shape = (members, count, classes)
        array = np.lib.format.open_memmap(path, "r+" if member else "w+", dtype=np.float32, shape=shape)
        array[member] = found
        del array
    np.save(folder / "labels.npy", names[np.arange(count), labels[drawn]])
    return {"agreed": float(agreed.mean())}


def selected(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of our selection from an empty pool, the least of a few runs, and the loss of what it found."""
    import numpy as np

    from utils.numeric.selection import select_members

    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    found = {}
    for metric in METRICS:
        times = []
        for _ in range(REPEATS):
            start = time.process_time()
            chosen = select_members(probabilities, labels, metric=metric, steps=STEPS, n_tries=int(arguments[0]))
            times.append(time.process_time() - start)
        np.save(folder / f"{metric}.npy", chosen.weights)
        found[metric] = {"seconds": min(times), "loss": _loss(probabilities, labels, chosen.weights, metric)}
    return found


def peer(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of AutoGluon's selection; runs in its environment."""
    import numpy as np
    from autogluon.core import metrics
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    found = {}
    for metric in METRICS:
        chosen = EnsembleSelection(STEPS, "multiclass", getattr(metrics, metric))
        start = time.process_time()
        chosen.fit(list(probabilities), labels)
        seconds = time.process_time() - start
        np.save(folder / f"peer_{metric}.npy", chosen.weights_)
        found[metric] = {"seconds": seconds}
    return found


def _loss(probabilities: Any, labels: Any, weights: Any, metric: str) -> float:
    """Loss of the weighted mean by the project's own metric, the lower the better."""
    import numpy as np

    from utils.numeric.metrics import METRICS as FUNCTIONS

    score = FUNCTIONS[metric].function(np.tensordot(weights, probabilities.astype(np.float64), axes=1), labels)
    return 1 - score if FUNCTIONS[metric].higher_is_better else score


def losses(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Losses of the weights that the peer found."""
    import numpy as np

    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    return {metric: _loss(probabilities, labels, np.load(folder / f"peer_{metric}.npy"), metric) for metric in METRICS}


def weights(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds and certificate of the two convex pools, without a penalty."""
    import numpy as np

    from utils.numeric import pools

    probabilities, labels = np.load(folder / "probabilities.npy"), np.load(folder / "labels.npy")
    scores = np.log(np.maximum(probabilities, 1e-12, dtype=np.float64))
    ways: dict[str, Callable[[], Any]] = {
        "linear": lambda: pools.fit_linear(probabilities[:, np.arange(len(labels)), labels]),
        "log_linear": lambda: pools.fit_log_linear(scores, labels),
    }
    found = {}
    for kind, way in ways.items():
        times = []
        for _ in range(3):
            start = time.perf_counter()
            solution = way()
            times.append(time.perf_counter() - start)
        found[kind] = {"seconds": min(times), "gap": solution.gap, "loss": solution.value}
    return found


def large(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds, CPU seconds and peak resident megabytes of one selection on the first members and rows.

    They are read from a memory map; a part of the rows is written to a file of its own before the clock starts.
    """
    import numpy as np

    from utils.numeric.selection import select_members

    metric, members, count = arguments[0], int(arguments[1]), int(arguments[2])
    probabilities, labels = np.load(folder / "probabilities.npy", mmap_mode="r"), np.load(folder / "labels.npy")
    probabilities = probabilities[:members]
    if count < len(labels):
        np.save(folder / "part.npy", probabilities[:, :count])
        probabilities = np.load(folder / "part.npy", mmap_mode="r")
    start, cpu = time.perf_counter(), time.process_time()
    select_members(probabilities, labels[:count], metric=metric, steps=STEPS)
    taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:")]
    return taken | {"megabytes": peaks[0] if peaks else None}


PARTS: dict[str, Callable[[Path, Sequence[str]], dict[str, Any]]] = {
    function.__name__: function for function in (honest, models, resampled, selected, peer, losses, weights, large)
}


if __name__ == "__main__":
    sys.exit(main())
