"""How long the report takes and how large it is, for a workspace as large as one gets.

    python benchmarks/report.py            40 ensembles, 20 members, 10,000 rows of 13 classes, 12-megapixel photographs
    python benchmarks/report.py --quick    6 ensembles, 4 members, 300 rows: does it run at all

The records are synthetic and have every key; predictions are random around the labels. The photographs are crops of
scikit-learn's two sample images, enlarged. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]

SECONDS, MEGABYTES = 20, 5


@dataclass(frozen=True)
class Size:
    """How large the synthetic workspace is."""

    ensembles: int = 40
    members: int = 20
    rows: int = 10_000
    honest: int = 10_000
    classes: int = 13
    side: tuple[int, int] = (4000, 3000)
    """Width and height of the photographs in pixels."""


QUICK = Size(ensembles=6, members=4, rows=300, honest=300, classes=4, side=(320, 240))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="report.py", description="Time and size of the report.")
    parser.add_argument("--quick", action="store_true", help="a small workspace")
    options = parser.parse_args(argv)
    from reporting import report, row

    size = QUICK if options.quick else Size()
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        seconds, megabytes = measure(Path(folder), size)
    what = f"{size.ensembles} ensembles, {size.members} members, {size.rows:,} rows, {size.classes} classes"
    rows = [
        row(f"{what}: report written", seconds, "s", f"under {SECONDS} s", seconds < SECONDS, None),
        row(f"{what}: size", megabytes, "MB", f"under {MEGABYTES} MB", megabytes < MEGABYTES, None),
    ]
    report("report", rows, quick=options.quick, packages=("matplotlib", "jinja2", "numpy", "pillow"))
    return 0


def measure(folder: Path, size: Size) -> tuple[float, float]:
    """Seconds to write the report of a synthetic workspace in an empty folder, imports included, and its megabytes."""
    from utils.core.config_file import load_config
    from utils.evaluation.report import report_page, report_sources
    from utils.predictions import catalog
    from utils.predictions.store import Store

    workspace = synthetic(folder, size)
    config = load_config(PROJECT / "configs" / "votes.yaml")
    start = time.perf_counter()
    report_page.write(config, report_sources.read(Store(config, workspace, catalog.read(workspace)), "test"))
    return time.perf_counter() - start, workspace.report("test").stat().st_size / 1e6


# the synthetic workspace ---------------------------------------------------------------------------------------------
def synthetic(
    base: Path, size: Size = QUICK, *, classes: Sequence[str] | None = None, name: str = "image {row}.jpg"
) -> Any:
    """A workspace with everything that a report may show: members, ensembles, metrics with every key, photographs.

    `classes` gives their names, `name` the file names, in which `{row}` counts. Returns the `Workspace`.
    """
    from utils.core.artifacts import write_json
    from utils.core.workspace import Workspace
    from utils.predictions import catalog
    from utils.predictions.store import Store

    folders = ("split_dataset", "checkpoints", "metrics_output", "kfold_results", "deployment", "image_cache", "logs")
    workspace = Workspace(base, *(base / folder for folder in folders))
    words = tuple(sorted(classes or [f"class {number:02}" for number in range(size.classes)]))
    members = [f"Custom{number:02}" for number in range(size.members)]
    rng = np.random.default_rng(0)
    splits = {split: _split(rng, split, count, words, name) for split, count in _counts(size).items()}
    found = _catalog(members, words, splits, size)
    catalog.save(workspace, found)
    _photographs(workspace, splits, size)
    store = Store(_votes(), workspace, found)
    logits = {split: _logits(rng, len(members), labels, len(words)) for split, (_, labels) in splits.items()}
    for number, member in enumerate(members):
        _keep(store, found.members[member], splits, {split: own[number] for split, own in logits.items()})
    names = [f"ensemble_{number:02}" for number in range(size.ensembles)]
    for number, ensemble in enumerate(names):
        _ensemble(store, ensemble, number, members, splits, logits)
    records = {ensemble: _record(store, ensemble, "ensemble", splits["test"]) for ensemble in names}
    records |= {member: _record(store, member, "member", splits["test"]) for member in members}
    for own, record in records.items():
        place = workspace.ensemble_metrics if own in names else workspace.member_metrics
        write_json(place(own, "test"), record)
    write_json(workspace.ranking("test"), _ranking(records, names))
    return workspace


def _counts(size: Size) -> dict[str, int]:
    return {"train": size.honest, "val": max(40, size.honest // 10), "test": size.rows}


def _votes() -> Any:
    from utils.core.config_file import load_config

    return load_config(PROJECT / "configs" / "votes.yaml")


def _split(
    rng: np.random.Generator, split: str, count: int, classes: Sequence[str], name: str
) -> tuple[list[str], np.ndarray]:
    """Ids in order, and labels."""
    labels = np.sort(rng.permutation(np.arange(count) % len(classes)))
    ids = [f"folder {label}/{split} {name.format(row=f'{row:05}')}" for row, label in enumerate(labels)]
    order = np.argsort(np.array(ids))
    return [ids[place] for place in order], labels[order]


def _logits(rng: np.random.Generator, members: int, labels: np.ndarray, classes: int) -> np.ndarray:
    """Of members (M, N, C) that are often right, and err in part on the same rows."""
    shared = rng.normal(size=(1, len(labels), classes)) * 1.5
    own = rng.normal(size=(members, len(labels), classes)) * 1.5
    return (shared + own + 4 * np.eye(classes)[labels]).astype(np.float32)


def _catalog(members: Sequence[str], classes: tuple[str, ...], splits: Any, size: Size) -> Any:
    from utils.predictions.catalog import Catalog, Member

    oof = {"path": "", "rows": size.honest, "folds": 5, "accuracy": 0.9, "sha256": "0" * 64}
    kept = {"stage": "final", "sha256": "0" * 64}
    entries = {
        name: Member(
            *(name, name, "full", 224, classes, ({"path": f"checkpoints/{name}.pth", **kept},), (), None),
            *({**oof, "path": f"{name}.npz"}, None, name * 4),
        )
        for name in members
    }
    facts = {split: {"n": len(ids), "digest": split} for split, (ids, _) in splits.items()}
    return Catalog({"path": "BASE-BACK", "kind": "bundled", "digest": "0" * 64}, classes, facts, entries)


def _photographs(workspace: Any, splits: Any, size: Size) -> None:
    """Every row is a link to one of a few photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    sources = []
    for number, pixels in enumerate(load_sample_images().images):
        path = workspace.base / f"photograph{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize(size.side).save(path, quality=90)
        sources.append(path)
    for split, (ids, _) in splits.items():
        for row, sample_id in enumerate(ids):
            path = workspace.split_dir / split / sample_id
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(sources[row % len(sources)], path)


def _keep(store: Any, member: Any, splits: Any, logits: dict[str, np.ndarray]) -> None:
    """One member's stored predictions, and its out-of-fold ones."""
    from utils.core.artifacts import write_array

    for split in ("val", "test"):
        folder = store.workspace.predictions(member.name, split)
        ids, labels = splits[split]
        arrays = {"logits": logits[split], "labels": labels, "sample_ids": np.array(ids)}
        for name, array in (arrays | {"honest": np.ones(len(ids), dtype=bool)}).items():
            write_array(folder / f"{name}.npy", array)
    ids, labels = splits["train"]
    arrays = {"logits": logits["train"], "labels": labels, "sample_ids": np.array(ids)}
    store.write_imported_oof(member.name, member.oof, arrays | {"fold": np.arange(len(ids)) % 5})


def _ensemble(store: Any, name: str, number: int, members: Sequence[str], splits: Any, logits: Any) -> None:
    """A plain mean under a name and temperature of its own, with the files that a built one has."""
    from utils.core.artifacts import write_arrays, write_json
    from utils.numeric.metrics import softmax

    folder = store.workspace.ensemble(name)
    found = {split: softmax(own.mean(axis=0) * (0.8 + 0.01 * number)) for split, own in logits.items()}
    ids, labels = splits["test"]
    arrays = {"probabilities": found["test"], "labels": labels, "sample_ids": np.array(ids)}
    write_arrays(folder / "predictions_test.npz", arrays)
    honest = ("train", "val")
    parts = {
        "probabilities": np.concatenate([found[split] for split in honest]).astype(np.float32),
        "labels": np.concatenate([splits[split][1] for split in honest]),
        "sample_ids": np.concatenate([np.array(splits[split][0]) for split in honest]),
        "split": np.concatenate([np.full(len(splits[split][0]), split) for split in honest]),
    }
    write_arrays(folder / "crossfit.npz", parts | {"fold": np.arange(len(parts["labels"])) % 5})
    write_json(
        folder / "ensemble.json",
        {
            "name": name,
            "method": "weighted",
            "members": list(members),
            "candidates": list(members),
            "classes": list(store.catalog.classes),
            "member_digests": {member: store.catalog.members[member].digest for member in members},
            "inputs_digest": "0" * 64,
            "fitted_on": [],
            "selected_on": [],
            "texts": {},
            "inference": "full",
            "weights": {member: 1 / len(members) for member in members},
            "temperature": 1 / (0.8 + 0.01 * number),
            "verdict": "does not beat log_linear_pool, the best of the simple combinations",
        },
    )


def _record(store: Any, name: str, kind: str, test: tuple[list[str], np.ndarray]) -> dict[str, Any]:
    """`metrics.json` with every key that a report reads."""
    from utils.core.artifacts import read_arrays
    from utils.evaluation.class_scores import add_class_scores, fold_scores
    from utils.numeric.metrics import point_metrics, reliability, softmax

    _, labels = test
    if kind == "ensemble":
        found = read_arrays(store.workspace.ensemble(name) / "predictions_test.npz", remedy="")["probabilities"]
    else:
        found = softmax(np.asarray(store.rows(store.catalog.members[name], "test").logits))
    record = point_metrics(found, labels, store.catalog.classes)
    add_class_scores(record, found, np.asarray(labels), None, record["notes"])
    record["folds"] = fold_scores(found, np.asarray(labels), np.arange(len(labels)) % 5, "train+val")
    around = {key: [record[key] * 0.98, min(1.0, record[key] * 1.02)] for key in ("accuracy", "f1_macro", "log_loss")}
    sure = np.sort(found.max(axis=1))[::-1]
    part = {"split": "train", "rows": "oof", "n": 100, "digest": "0" * 64}
    against = {"name": "Custom00", "delta_accuracy": 0.01, "delta_ci95": [-0.01, 0.03], "mcnemar_p": 0.2}
    against |= {"delta_roc_auc": 0.002, "delta_roc_auc_ci95": [-0.001, 0.005], "delong_p": 0.19}
    conformal = {"alpha": 0.1, "threshold": 0.4, "n": 300, "coverage": 0.91, "coverage_interval": [0.86, 0.94]}
    return record | {
        "name": name,
        "split": "test",
        "ci95": around,
        "vs_best_single": against if kind == "ensemble" else None,
        "vs_soft_voting": {**against, "name": "ensemble_01"} if name != "ensemble_01" else None,
        "latency_ms": {
            "batch_1": {"p50": 5.0 + sum(map(ord, name)) % 50, "p95": 60.0},
            "batch_32": {"p50": 90.0, "p95": 99.0},
            "device": "cpu",
            "threads": 2,
        },
        "size_mb": 10.0 + len(name),
        "members": sorted(store.catalog.members) if kind == "ensemble" else [name],
        "crossfit": {"n": 100, "accuracy": 0.9, "log_loss": 0.3, "log_loss_ci95": [0.2, 0.4]},
        "conformal": {kind: {**conformal, "mean_size": 1.1} for kind in ("lac", "aps")},
        "selective": {
            "coverage": np.linspace(0.02, 1, 50).tolist(),
            "risk": (np.linspace(0, 1, 50) ** 2 * (1 - record["accuracy"])).tolist(),
            "aurc": 0.01,
            "threshold": float(sure[len(sure) * 9 // 10]),
            "target_risk": 0.05,
            "wanted_error": 0.05,
            "answered": 0.9,
            "error": 0.04,
        },
        "ece_adaptive": record["ece"],
        "reliability": reliability(found, labels),
        "out_of_distribution": {"energy": {"reference": -3.0, "beyond": 0.06}, "limits": "a hint, no test"},
        "fitted_on": [part],
        "selected_on": [{**part, "split": "val", "rows": "held_out"}],
        "contaminated": False,
        "optimistic": False,
        "overlap": {"fitted": 0, "selected": 0, "dropped": 3},
        "seed": 42,
        "versions": {"python": "3.13", "numpy": "2"},
        "created": "2026-01-01T00:00:00+00:00",
    }


def _ranking(records: dict[str, dict[str, Any]], ensembles: Sequence[str]) -> dict[str, Any]:
    columns = ("accuracy", "f1_macro", "log_loss", "ece", "ci95", "contaminated", "optimistic")
    order = sorted(records, key=lambda name: (records[name]["log_loss"], name))
    rows = [
        {"rank": rank, "name": name, "kind": "ensemble" if name in ensembles else "member"}
        | {key: records[name][key] for key in columns}
        for rank, name in enumerate(order, start=1)
    ]
    evidence = {"rows": "oof+val", "n": 400, "log_loss": 0.3, "log_loss_ci95": [0.2, 0.4], "accuracy": 0.9}
    recommended = {"name": ensembles[0], "reason": "lowest log-loss on honest rows", "evidence": evidence}
    peers = {"best_single": "Custom00", "soft_voting": ensembles[1], "greedy_selection_ensemble": None}
    found = {"split": "test", "n": records[order[0]]["n_samples"], "order": ["log_loss", "log_loss", "name"]}
    return found | {"rows": rows, "recommended": recommended, "peers": peers, "inputs_digest": "0" * 64}


if __name__ == "__main__":
    sys.exit(main())
