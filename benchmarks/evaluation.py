"""Scoring: bootstrap intervals of all metrics beside a loop over scikit-learn, and coverage of conformal sets.

    python benchmarks/evaluation.py               coverage on handwritten digits
    python benchmarks/evaluation.py --data DIR    coverage on your own images, one folder per class
    python benchmarks/evaluation.py --quick       smaller arrays, not the ones to report

Times are of seeded answers, 40 ensembles x 10,000 rows x 13 classes, in a process of its own; what they say does not
change how long it takes. The loop calls scikit-learn's functions on the rows of each sample, for a tenth of the
samples. It leaves out what scikit-learn lacks (calibration errors) and the areas under curves, most of its time.
Coverage is that of a logistic regression on pixels, whose held-out rows are dealt anew into calibration and test. The
last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reporting import peak_bytes, report, row

PROJECT = Path(__file__).resolve().parents[1]
ENSEMBLES, ROWS, CLASSES, REPLICATES = 40, 10_000, 13, 2000
QUICK = (4, 1000, 5, 200)
PART = 10  # the loop runs on one sample in so many
LIMIT_S, LIMIT_MB, FASTER = 60, 1000, 20
RESPLITS = 10
SIDE = 24  # pixels of an image of the user's that the logistic regression sees


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="evaluation.py", description="Intervals of scores and conformal coverage.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="your own images, one folder per class")
    parser.add_argument("--quick", action="store_true", help="smaller arrays")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--size", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if str(PROJECT) not in sys.path:
        sys.path.insert(0, str(PROJECT))
    if options.part:
        print(json.dumps(PARTS[options.part](*options.size)))
        return 0
    if options.data is not None and not options.data.is_dir():
        print(f"--data {options.data}: no such folder; expected one folder of images per class in it", file=sys.stderr)
        return 1
    size = QUICK if options.quick else (ENSEMBLES, ROWS, CLASSES, REPLICATES)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before = _run("ours", size)
    loop = _run("scikit_learn", size)
    after = _run("ours", size)
    rows = timing_rows(size, before, loop, after) + coverage_rows(options.data)
    packages = ("numpy", "scikit-learn", "scipy")
    source = str(options.data) if options.data else "digits"
    report("evaluation", rows, quick=options.quick, packages=packages, load_at_start=load, source=source)
    return 0


def _run(part: str, size: Sequence[int]) -> dict[str, Any]:
    call = [sys.executable, __file__, "--part", part, "--size", *map(str, size)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def timing_rows(
    size: Sequence[int], before: dict[str, Any], loop: dict[str, Any], after: dict[str, Any]
) -> list[dict[str, Any]]:
    """Seconds, memory and how many times faster; `loop` was measured between two runs of ours."""
    ensembles, rows, classes, replicates = size
    what = f"{ensembles} ensembles x {rows} rows x {classes} classes, {replicates} samples"
    seconds = max(before["seconds"], after["seconds"])
    cpu = (before["cpu"] + after["cpu"]) / 2
    faster = loop["cpu"] * PART / cpu
    memory = before["megabytes"]
    return [
        row(f"all metrics, {what}", seconds, "s", f"under {LIMIT_S} s", seconds < LIMIT_S, f"{cpu:.1f} s of CPU"),
        row("peak memory of that process", memory, "MB", f"under {LIMIT_MB} MB", memory < LIMIT_MB, None),
        row(
            f"times as fast as a loop over scikit-learn, CPU time, loop measured on 1/{PART} of the samples",
            faster,
            "",
            f"at least {FASTER}",
            faster >= FASTER,
            f"{loop['cpu'] * PART:.0f} s ({loop['cpu']:.0f} s measured)",
        ),
        row("largest difference from scikit-learn's", loop["difference"] * 1e6, "millionths", None, None, None),
    ]


def answers(ensembles: int, rows: int, classes: int) -> tuple[list[Any], Any]:
    """Seeded probabilities (N, C) of each ensemble, right on most rows, and labels (N,)."""
    import numpy as np

    from utils.numeric.metrics import softmax

    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    shared = rng.normal(size=(rows, classes)) + 3.0 * np.eye(classes)[labels]
    return [softmax(shared + rng.normal(size=shared.shape)) for _ in range(ensembles)], labels


def ours(ensembles: int, rows: int, classes: int, replicates: int) -> dict[str, Any]:
    """Seconds, CPU seconds and peak resident megabytes of the bootstrap."""
    from utils.numeric.statistics import bootstrap_metrics

    probabilities, labels = answers(ensembles, rows, classes)
    start, cpu = time.perf_counter(), time.process_time()
    bootstrap_metrics(probabilities, labels, replicates=replicates)
    taken = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return taken | {"megabytes": peak_bytes() / 1e6}


def scikit_learn(ensembles: int, rows: int, classes: int, replicates: int) -> dict[str, Any]:
    """Seconds of the same metrics on a tenth of the same samples, one call after another, and how far ours are off."""
    import numpy as np
    from sklearn import metrics

    from utils.numeric.statistics import bootstrap_counts, bootstrap_metrics

    probabilities, labels = answers(ensembles, rows, classes)
    names = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "precision_weighted", "recall_weighted")
    names += ("f1_weighted", "log_loss", "brier")
    count = max(1, replicates // PART)
    counts = next(iter(bootstrap_counts(labels, replicates=replicates)))[:count].astype(int)
    found = np.empty((ensembles, len(counts), len(names)))
    identity = np.eye(classes)
    start, cpu = time.perf_counter(), time.process_time()
    for sample, drawn in enumerate(counts):
        own = np.repeat(np.arange(rows), drawn)
        truth = labels[own]
        for number, every in enumerate(probabilities):
            scores = every[own]
            predicted = scores.argmax(axis=1)
            values = [metrics.accuracy_score(truth, predicted)]
            for average in ("macro", "weighted"):
                values += metrics.precision_recall_fscore_support(truth, predicted, average=average)[:3]
            values.append(metrics.log_loss(truth, scores, labels=range(classes)))
            values.append(((scores - identity[truth]) ** 2).sum(axis=1).mean())
            found[number, sample] = values
    scale = count / len(counts)  # where one block of samples holds fewer
    taken = {"seconds": scale * (time.perf_counter() - start), "cpu": scale * (time.process_time() - cpu)}
    mine = bootstrap_metrics(probabilities, labels, replicates=replicates)
    apart = [np.abs(mine[name][:, : len(counts)] - found[:, :, place]).max() for place, name in enumerate(names)]
    return taken | {"difference": float(max(apart))}


def coverage_rows(data: Path | None) -> list[dict[str, Any]]:
    """Share of rows whose set holds the true class, pooled over re-splits, and where it should lie."""
    import numpy as np

    from utils.numeric import uncertainty

    probabilities, labels = held_out(*(images(data) if data else digits()))
    rows = []
    uniforms = uncertainty.uniform_numbers(map(str, range(len(labels))))
    for kind in uncertainty.NONCONFORMITY_SCORES:
        covered, sizes, around = [], [], [0.0, 0.0]
        for seed in range(RESPLITS):
            order = np.random.default_rng(seed).permutation(len(labels))
            halves = [
                uncertainty.LabelledRows(probabilities[half], labels[half], uniforms[half])
                for half in np.array_split(order, 2)
            ]
            found = uncertainty.conformal_metrics(kind, *halves)
            if found is None:
                break
            covered.append(found["coverage"])
            sizes.append(found["mean_size"])
            around = found["coverage_interval"]
        what = f"{kind.upper()} sets, coverage on {len(labels) // 2} test rows, {len(covered)} re-splits pooled"
        if len(covered) < RESPLITS:
            rows.append(row(what, None, "", "at least 9 calibration rows", None, None))
            continue
        mean, (low, high) = float(np.mean(covered)), around
        goal = f"{low:.3f} to {high:.3f}" if kind == "lac" else f"at least {low:.3f}"
        holds = low <= mean <= (high if kind == "lac" else 1)
        rows.append(row(what, mean, "", goal, holds, f"{np.mean(sizes):.2f} classes a set; 0.9 wanted"))
    return rows


def digits() -> tuple[Any, Any]:
    """Pixels (N, 64) and labels (N,) of scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def images(folder: Path) -> tuple[Any, Any]:
    """Pixels (N, D) and labels (N,) of the images of one folder per class, made small."""
    import numpy as np

    from utils.inference.onnx_prediction import SUFFIXES, open_image

    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    pixels, labels = [], []
    for number, place in enumerate(classes):
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                with open_image(path) as image:
                    pixels.append(np.asarray(image.convert("RGB").resize((SIDE, SIDE))).ravel())
                labels.append(number)
    if len(set(labels)) < 2:
        raise SystemExit(f"--data {folder}: expected a folder of images for each of at least two classes")
    return np.array(pixels), np.array(labels)


def held_out(pixels: Any, labels: Any) -> tuple[Any, Any]:
    """Probabilities (n, C) and labels (n,) of half of the rows, by a logistic regression on the other half."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, asked, taught, truth = train_test_split(pixels, labels, test_size=0.5, random_state=0, stratify=labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=2000)).fit(known, taught)
    return model.predict_proba(asked), truth


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "scikit_learn": scikit_learn}


if __name__ == "__main__":
    sys.exit(main())
