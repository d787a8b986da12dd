"""Ensembles of linear heads on pretrained networks beside single heads, their peers and small networks.

    python benchmarks/pretrained.py                        handwritten digits: five splits
    python benchmarks/pretrained.py --data DIR             photographs, one folder per class
    python benchmarks/pretrained.py --data DIR --finetune  with a fine-tuned EfficientNet-Lite0 as well
    python benchmarks/pretrained.py --data DIR --small     with six small networks from random weights as well
    python benchmarks/pretrained.py --quick                200 digits, one split; not the one to report

The test parts are five disjoint stratified folds, so that each image is tested once; a tenth of all images is val, the
rest train. Each split has a workspace of its own, made from a CSV manifest: `main.py` fits the heads of `make demo
DATA=`, the pipeline of `configs/photographs_demo.yaml` combines them, and the recommended one is scored on the test
rows. The peers read the same rows: scikit-learn's logistic regression on a network's features is fitted on train and
val, AutoGluon's weighted ensemble (where `.venv-bench` has it, as for `stacking.py`) on the members' out-of-sample
predictions. A split that is there is not repeated. Embeddings are shared by the splits, so that times are those of the
first. Needs the weights of the extra `pretrained`. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import prepare
from prepare import PROJECT
from reporting import clean_environment, mean_with_interval, report, row
from stacking import peer_weights

sys.path.insert(0, str(PROJECT))
from utils.operations import demo

CONFIG = PROJECT / demo.PHOTOGRAPHS
SPLITS = 5
VAL_SHARE = 0.1
QUICK_IMAGES = 20  # of each digit
PASS_GOAL, PASS_SECONDS, PASS_BATCH = 1.1, 10.0, 8
SINGLE = "lite0"  # the member whose head reads the last embedding of one network
LOGISTIC = "scikit-learn's logistic regression on"
PEERS = (f"{LOGISTIC} lite0", f"{LOGISTIC} lite0_stages", "AutoGluon's weighted ensemble", "best single member")
LEFT_OUT = (0, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all splits; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="pretrained.py", description="Pretrained members and what combines them.")
    parser.add_argument("--data", metavar="DIR", type=Path, help="folder with one folder of images per class")
    parser.add_argument(
        "--splits",
        metavar="N",
        type=int,
        default=SPLITS,
        choices=range(1, SPLITS + 1),
        help=f"how many of the {SPLITS} (default: all)",
    )
    parser.add_argument("--finetune", action="store_true", help="a fine-tuned member as well; minutes per split")
    parser.add_argument("--small", action="store_true", help="six small networks as well; minutes per split")
    parser.add_argument("--quick", action="store_true", help="one split of a few digits, two folds")
    parser.add_argument("--peers", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.peers:
        score_peers(options.peers)
        return 0
    if missing := demo.missing_wheels(demo.LITE_NUMBERS):
        print(f"{', '.join(missing)}: not installed; pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    if options.data is not None and not options.data.is_dir():
        print(f"--data {options.data}: no such folder; expected one folder of images per class in it", file=sys.stderr)
        return 1
    data = _digits(few=options.quick) if options.data is None else options.data.expanduser().resolve()
    variant = "".join(f"-{name}" for name in ("finetune", "small", "quick") if getattr(options, name))
    folder = prepare.ZOO / f"pretrained-{demo.workspace_of(data).name}{variant}"
    outcomes = []
    for seed in range(1 if options.quick else options.splits):
        file = folder / f"seed{seed}.json"
        if not file.is_file():
            _run_split(folder, seed, data, options)
        outcomes.append(json.loads(file.read_text(encoding="utf-8")))
        print(f"split {seed}: recommended {outcomes[-1]['recommended']}", file=sys.stderr, flush=True)
    rows = [*score_rows(outcomes, "log_loss", "nats"), *score_rows(outcomes, "accuracy", "share"), *time_rows(outcomes)]
    report(
        "pretrained",
        rows,
        quick=options.quick,
        packages=("numpy", "scikit-learn", "torch", "timm"),
        data=data.name,
        splits=len(outcomes),
        scores=[outcome["scores"] for outcome in outcomes],
        recommended=[outcome["recommended"] for outcome in outcomes],
    )
    return 0


def _digits(*, few: bool) -> Path:
    """A folder with scikit-learn's digits, or with some of each."""
    digits, some = prepare.ZOO / "images", prepare.ZOO / "few-images"
    prepare.ZOO.mkdir(parents=True, exist_ok=True)
    demo.write_digits(digits)
    if not few:
        return digits
    for path in (path for label in sorted(digits.iterdir()) for path in sorted(label.iterdir())[:QUICK_IMAGES]):
        target = some / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return some


# one split ------------------------------------------------------------------------------------------------------------


def _run_split(folder: Path, seed: int, data: Path, options: argparse.Namespace) -> None:
    """Train, combine and score one split, and write its outcome."""
    workspace = folder / f"workspace{seed}"
    workspace.mkdir(parents=True, exist_ok=True)
    manifest = workspace / "images.csv"
    _write_manifest(manifest, data, seed)
    environment = clean_environment() | {
        "DBT_BASE_DIR": str(workspace),
        "DBT_RAW_DIR": str(manifest),
        "DBT_SEED": str(seed),
        "DBT_BATCH_SIZE": "32",
        "DBT_IMAGE_CACHE_DIR": str(folder / "image_cache"),
    }
    main = str(prepare.BASE_SOURCE / "main.py")
    _run([main, "--stages", "split"], environment)
    folds = ["--folds", "2" if options.quick else "3"]
    training = [main, "--stages", "kfold", "train", *folds]
    numbers = demo.LITE_NUMBERS[:1] if options.quick else demo.LITE_NUMBERS
    single = ["--backbones", f"{SINGLE}=timm:tf_efficientnet_lite0", "--mode", "frozen"]
    seconds = {"heads of one network": _run([*training, *single], environment)}
    seconds["all heads"] = _run([*training, *demo.pretrained_options(numbers)], environment)
    if options.finetune:
        tuned = ["--backbones", "tuned0=timm:tf_efficientnet_lite0", "--mode", "finetune"]
        seconds["fine-tuning"] = _run([*training, *tuned], environment)
    if options.small:
        epochs = ["--epochs-head", "1", "--epochs-finetune", str(demo.epochs_for(demo.count_images(workspace)))]
        small = ["--size", "tiny", "--backbones", *prepare.BACKBONES, *epochs]
        seconds["small networks"] = _run([*training, *small], environment)
    pipeline = [str(PROJECT / "ensemble_orchestrator.py"), "pipeline", "--config", str(CONFIG)]
    seconds["pipeline"] = _run([*pipeline, "--set", "exports.enable=false"], environment)
    file = folder / f"seed{seed}.json"
    file.with_suffix(".partial").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
    _run([__file__, "--peers", str(file)], environment | {"PYTHONPATH": str(PROJECT)})


def _write_manifest(file: Path, data: Path, number: int) -> None:
    """Write the images below class folders with split `number` of SPLITS: its stratified fold is test, a tenth val."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    paths = [path for label in sorted(data.iterdir()) if label.is_dir() for path in sorted(label.iterdir())]
    labels = [path.parent.name for path in paths]
    folds = list(StratifiedKFold(SPLITS, shuffle=True, random_state=0).split(paths, labels))
    others, test = folds[number]
    _, val = train_test_split(
        others, test_size=round(VAL_SHARE * len(paths)), random_state=number, stratify=[labels[row] for row in others]
    )
    split_of = dict.fromkeys(others.tolist(), "train") | dict.fromkeys(val.tolist(), "val")
    split_of |= dict.fromkeys(test.tolist(), "test")
    link = file.with_name("images")
    link.unlink(missing_ok=True)
    link.symlink_to(data)
    with file.open("w", encoding="utf-8", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(("file_name", "label", "split"))
        rows.writerows(
            (f"images/{paths[row].relative_to(data)}", labels[row], split_of[row]) for row in sorted(split_of)
        )


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run one program; returns its seconds by the clock. Raises SystemExit where it fails."""
    start = time.monotonic()
    call = [sys.executable, *arguments]
    code = subprocess.run(call, env=dict(environment), stdout=sys.stderr, check=False, cwd=PROJECT).returncode
    if code not in LEFT_OUT:
        raise SystemExit(f"{' '.join(arguments[:4])} ended with {code}; typed again, pretrained.py goes on from here")
    return time.monotonic() - start


# what is scored, in a process that has the workspace in its environment ----------------------------------------------


def score_peers(file: Path) -> None:
    """Write the outcome of the workspace: test scores of the recommended ensemble, its peers and every member."""
    from utils import base_back
    from utils.building import fitting
    from utils.core.artifacts import read_json, write_json
    from utils.core.config_file import load_config
    from utils.numeric.metrics import softmax
    from utils.predictions import catalog, extraction, member_selection
    from utils.predictions.rows import align
    from utils.predictions.store import Store

    config, workspace = load_config(CONFIG), base_back.open_workspace()
    current = catalog.load(workspace)
    members = member_selection.select(current, config)
    store = Store(config, workspace, current)
    extraction.ensure(store, members, prepare.SPLITS)
    ranking = read_json(workspace.ranking("test"), remedy=prepare.AGAIN)
    recorded = read_json(file.with_suffix(".partial"), remedy=prepare.AGAIN)
    scores = {entry["name"]: {key: entry[key] for key in ("log_loss", "accuracy")} for entry in ranking["rows"]}
    scores["recommended"] = scores[ranking["recommended"]["name"]]
    out_of_sample = fitting.out_of_sample_rows(store, members, kind="honest").rows
    test = align({member.name: [store.rows(member, "test")] for member in members}, current.classes)
    losses = [_scores(probabilities, out_of_sample.labels) for probabilities in softmax(out_of_sample.logits)]
    best = out_of_sample.members[int(np.argmin([loss["log_loss"] for loss in losses]))]
    scores["best single member"] = scores[best]
    by_name = {member.name: member for member in members}
    for name in (SINGLE, "lite0_stages"):
        scores[f"{LOGISTIC} {name}"] = _logistic_regression(store, by_name[name])
    weights = peer_weights(softmax(out_of_sample.logits), out_of_sample.labels).get("AutoGluon's weighted ensemble")
    if weights is not None:
        probabilities = np.tensordot(weights, softmax(test.logits), axes=1)
        scores["AutoGluon's weighted ensemble"] = _scores(probabilities, test.labels)
    seconds = recorded["seconds"] | {"one forward pass": _forward_pass(store, by_name[SINGLE])}
    outcome = {
        "recommended": ranking["recommended"]["name"],
        "scores": scores,
        "seconds": seconds,
        "n": len(test.labels),
    }
    write_json(file, outcome)


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from utils.numeric.metrics import accuracy, log_loss

    return {"log_loss": float(log_loss(probabilities, labels)), "accuracy": float(accuracy(probabilities, labels))}


def _logistic_regression(store: Any, member: Any) -> dict[str, float]:
    """Test scores of scikit-learn's regression on a member's features, its strength by five folds of train and val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = {split: store.rows(member, split, embeddings=True) for split in prepare.SPLITS}
    features = np.concatenate([parts[split].embeddings for split in ("train", "val")])
    labels = np.concatenate([parts[split].labels for split in ("train", "val")])
    steps = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": np.logspace(-4, 1, 6)}
    search = GridSearchCV(steps, grid, scoring="neg_log_loss", cv=5, error_score="raise").fit(features, labels)
    return _scores(search.predict_proba(parts["test"].embeddings), parts["test"].labels)


def _forward_pass(store: Any, member: Any) -> float:
    """Seconds to decode every image and pass it through a member's network with all cores, as fast as this product."""
    import torch

    from utils import base_back
    from utils.predictions import image_splits, streaming

    spec = member.network(store.workspace)
    model, resizing = streaming.open_network(spec), spec.preprocessing.resizing()
    paths = [path for split in prepare.SPLITS for path in store.images(split).paths]
    opener = base_back.load_bundled("image_files").open_image
    kept_memory = base_back.load_bundled("threads").intra_op_threads(os.cpu_count())
    start = time.perf_counter()
    with torch.inference_mode(), kept_memory:
        for first in range(0, len(paths), PASS_BATCH):
            pixels = np.stack([resizing.square(opener(path)) for path in paths[first : first + PASS_BATCH]])
            model(image_splits.normalise(torch.from_numpy(pixels), spec.preprocessing))
    return time.perf_counter() - start


# rows of the report ---------------------------------------------------------------------------------------------------


def score_rows(outcomes: Sequence[Mapping[str, Any]], metric: str, unit: str) -> list[dict[str, Any]]:
    """Mean of one metric on test over the splits, of the recommended ensemble, its peers, and every other model."""
    names = ["recommended", *PEERS]
    names += sorted({name for outcome in outcomes for name in outcome["scores"]} - set(names))
    chosen = [outcome["scores"]["recommended"][metric] for outcome in outcomes]
    sign = 1 if metric == "log_loss" else -1
    rows = []
    for name in names:
        values = [outcome["scores"].get(name, {}).get(metric) for outcome in outcomes]
        what = f"test {metric}, {len(outcomes)} split{'s' * (len(outcomes) > 1)}: {name}"
        goal = "the recommended one's is no worse" if name in PEERS and metric == "log_loss" else None
        if None in values:
            rows.append(row(what, None, unit, goal, None, None))
            continue
        holds, peer = None, None
        if name != "recommended":
            gains = [sign * (other - value) for other, value in zip(values, chosen, strict=True)]
            peer = f"the recommended one gains {mean_with_interval(gains, '+.4f')}"
            holds = bool(np.mean(gains) >= 0) if goal else None
        rows.append(
            row(what, float(np.mean(values)), f"{unit}: {mean_with_interval(values, '.4f')}", goal, holds, peer)
        )
    return rows


def time_rows(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of each step of the first split; the heads of one network beside one forward pass over the images."""
    limit = PASS_GOAL * outcomes[0]["seconds"]["one forward pass"] + PASS_SECONDS
    rows = []
    for name, seconds in outcomes[0]["seconds"].items():
        has_goal = name == "heads of one network"
        goal = f"at most {PASS_GOAL} forward passes and {PASS_SECONDS:.0f} s, {limit:.1f} s" if has_goal else None
        rows.append(row(f"seconds: {name}", seconds, "s", goal, seconds <= limit if has_goal else None, None))
    return rows


if __name__ == "__main__":
    sys.exit(main())
