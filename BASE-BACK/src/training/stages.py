"""The stages in order: verify, split, K-fold, head training and fine-tuning, test, export, snapshots, clean-up.

Units that are finished, by the digest of data, settings and training version, are skipped and logged.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from config import settings
from training.external import source_digest
from training.frozen import EMBEDDED_SPLITS, with_embeddings
from training.ledger import Ledger, kfold_summary
from training.pool import run_units
from training.pretrained import PretrainedError, resolve_networks
from training.recipe import Recipe
from training.snapshots import remove_surplus_snapshots, snapshot_unit
from training.units import Outcome, Unit, oof_path, progress_path
from utils import DEVICE, logger, smoke_checker
from utils.devices import usable_cores
from utils.files import atomic_path, read_json, write_json
from utils.logs import duration, progress_bar
from utils.samples import Sample, digest_of_contents
from utils.splitting import (
    fold_groups,
    prepare_optimized_datasets,
    read_manifest,
    split_contents,
    verify_dataset_split,
)
from utils.threads import requested_threads

KINDS = ("verify", "train", "test", "export")  # stages that are one unit of the same name
WEIGHT = {
    "embed": 30,
    "fold": 10,
    "train": 12,
    "verify": 1,
    "oof": 1,
    "test": 1,
    "export": 2,
    "snapshots": 12,
}  # rough cost
MAX_JOBS = 8


@dataclass
class Summary:
    """Summary of a run."""

    workspace: str
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Unreadable images: path and reason."""
    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Names of units that were already finished."""
    failed: dict[str, str] = field(default_factory=dict)
    """Unit -> reason."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Backbone -> metrics."""
    seconds: float = 0.0


def run_stages(
    backbones: Sequence[str],
    stages: Sequence[str],
    *,
    folds: int | None = None,
    jobs: int | None = None,
    force: bool = False,
    engine: str = "local",
    address: str | None = None,
    start_method: str = "spawn",
) -> Summary:
    """Run the given stages for the given backbones and write all records; returns a summary.

    `engine` is `local`, for local processes, which start by the `start_method` of `multiprocessing`, or `ray`, for the
    workers of the cluster at `address`, or of a new local cluster if that is None.

    Raises `SplitError` or FileNotFoundError when there is nothing to train on; a failed backbone is listed in the
    summary and the others continue.
    """
    start = time.monotonic()
    summary = Summary(str(settings.BASE_DIR))
    if "split" in stages:
        prepare_optimized_datasets(progress=_decoding_progress())
    logger.log_system_info_once()  # after the split, so that data that cannot be split leave no log file
    manifest = read_manifest()
    summary.left_out = manifest["left_out"] if manifest else []
    if set(stages) == {"split"}:
        return summary
    ledger = Ledger()
    units = plan(backbones, stages, folds or settings.K_FOLDS)
    pending = _unfinished(units, ledger, force=force)
    names = {unit.name for unit in pending}
    summary.skipped = [unit.name for unit in units if unit.name not in names]
    if summary.skipped:
        logger.info("%d of %d units are up to date", len(summary.skipped), len(units))
    for unit in pending:
        ledger.forget(unit)
        if force:
            progress_path(unit).unlink(missing_ok=True)
    requested_jobs = jobs
    jobs, threads = _processes(jobs)
    new_pool = None
    if engine == "ray" and pending:
        from training.ray_pool import RayPool

        cluster = RayPool(jobs, threads, address)
        jobs, new_pool = min(requested_jobs or cluster.jobs, cluster.jobs), lambda: cluster
    pending = with_embeddings(pending, jobs)
    with progress_bar(len(pending), "training") as advance:
        outcomes = _Outcomes(summary, ledger, _Progress(pending, advance))
        run_units(
            pending,
            jobs=jobs,
            threads=threads,
            finished=outcomes.finished,
            failed=outcomes.failed,
            start_method=start_method,
            new_pool=new_pool,
        )
    if any(unit.kind == "verify" for unit in pending):
        smoke_checker.save_summary()
    for unit in units:
        _write_backbone_records(unit.recipe, ledger)
    _clean_up([unit for unit in units if unit.name not in summary.failed])
    summary.seconds = round(time.monotonic() - start, 3)
    summary.results = {name: _figures(name, ledger) for name in backbones}
    trains_members = any(unit.kind != "snapshots" for unit in pending) and settings.EXTERNAL_BASE_BACK is None
    if trains_members:  # otherwise the summary of the run that trained them stays
        _write_pipeline_summary(summary, ledger)
    return summary


def plan(backbones: Sequence[str], stages: Sequence[str], folds: int) -> list[Unit]:
    """The units of the stages in the order of the specification, each with its digest and its dependencies."""
    if not verify_dataset_split(settings.SPLIT_DIR):
        raise FileNotFoundError(
            f"{settings.SPLIT_DIR}: no split with the same classes in train, val and test; run the stage split first"
        )
    classes: list[str] = []
    digests: dict[str, str] = {}
    samples: dict[str, list[Sample]] = {}
    for split in ("train", "val", "test"):
        classes, listed, contents = split_contents(settings.SPLIT_DIR, split)
        grouped = {s.sample_id: f"{contents[s.sample_id]} {s.group}" for s in listed if s.group is not None}
        digests[split], samples[split] = digest_of_contents(contents | grouped), listed
        if split == "train" and "kfold" in stages:
            fold_groups(listed, [contents[sample.sample_id] for sample in listed], folds)
    split_digest = f"{digests['train']}/{digests['val']}"
    external = source_digest(settings.EXTERNAL_BASE_BACK) if settings.EXTERNAL_BASE_BACK else None
    networks = resolve_networks(backbones, samples["train"], len(classes))
    recipes = [Recipe.from_settings(name, classes, split_digest, external, networks.get(name)) for name in backbones]
    if networks and "snapshots" in stages:
        raise PretrainedError(
            f"--stages snapshots: {', '.join(networks)}: not for networks of timm, whose pretrained weights every "
            "cycle would start from; leave them out of --backbones"
        )
    units: list[Unit] = []
    for stage in stages:
        for recipe in recipes:
            name = recipe.backbone
            if stage == "kfold":
                units += [
                    Unit("fold", recipe, recipe.digest("fold", fold, folds), fold=fold, folds=folds)
                    for fold in range(folds)
                ]
                after = tuple(f"{name} fold {fold}" for fold in range(folds))
                units.append(Unit("oof", recipe, recipe.digest("oof", folds), after, folds=folds))
            elif stage == "snapshots":
                units.append(snapshot_unit(recipe))
            elif stage in KINDS:
                after = (f"{name} train",) if stage in ("test", "export") else ()
                extra: dict[str, list[Any]] = {"test": [digests["test"]], "export": [settings.EXPORT_FORMATS]}
                units.append(Unit(stage, recipe, recipe.digest(stage, *extra.get(stage, [])), after))
    return units


def _unfinished(units: Sequence[Unit], ledger: Ledger, *, force: bool) -> list[Unit]:
    """Units to run: those not finished by digest, all with `force`, and those that depend on one that runs."""
    names: set[str] = set()
    for unit in sorted(units, key=lambda u: len(u.after)):
        if force or names & set(unit.after) or not ledger.is_finished(unit):
            names.add(unit.name)
    return [unit for unit in units if unit.name in names]


def _processes(jobs: int | None) -> tuple[int, int | None]:
    """Number of worker processes, and of threads in each; a training sets its own number of threads."""
    if DEVICE.type == "cuda":
        return jobs or 1, None
    threads = requested_threads() or 1
    return jobs or min(MAX_JOBS, max(1, usable_cores() // threads)), threads


@dataclass
class _Outcomes:
    """Records each unit when it ends."""

    summary: Summary
    ledger: Ledger
    progress: _Progress

    def finished(self, unit: Unit, outcome: Outcome, seconds: float) -> None:
        """Record a finished unit."""
        self.ledger.add(unit, outcome, seconds)
        progress_path(unit).unlink(missing_ok=True)  # after the entry, so that a run killed in between loses nothing
        self.summary.done.append(unit.name)
        _write_backbone_records(unit.recipe, self.ledger)
        if unit.kind == "oof":
            _remove_surplus_folds(unit)
        if unit.kind == "snapshots":
            remove_surplus_snapshots(unit)
        if unit.kind == "verify":
            smoke_checker.log_check(unit.recipe.backbone, "PASS", f"{outcome.result['num_params']} parameters")
        self.progress.log(unit, outcome, seconds)

    def failed(self, unit: Unit, reason: str) -> None:
        """Record a failed unit."""
        self.summary.failed[unit.name] = reason
        if unit.kind == "verify":
            smoke_checker.log_check(unit.recipe.backbone, "FAIL", reason)
        logger.error("%s: %s", unit.name, reason)
        self.progress.drop(unit)


class _Progress:
    """Logs one line per finished unit, with the remaining time; `advance(1, text)` updates a progress bar."""

    def __init__(self, units: Sequence[Unit], advance: Callable[[int, str], object]) -> None:
        self._advance = advance
        self.start = time.monotonic()
        self.total = sum(_weight(unit) for unit in units)
        self.count = len(units)
        self.weight = 0
        self.number = 0

    def log(self, unit: Unit, outcome: Outcome, seconds: float) -> None:
        self.number += 1
        self.weight += _weight(unit)
        elapsed = time.monotonic() - self.start
        remaining = elapsed / self.weight * (self.total - self.weight)
        message = f"{_headline(unit, outcome.result)}{seconds:.1f} s"
        left = f"about {duration(remaining)} left"
        logger.info("[%d/%d] %s: %s; %s", self.number, self.count, unit.name, message, left)
        self._advance(1, left)

    def drop(self, unit: Unit) -> None:
        self.number += 1
        self.weight += _weight(unit)
        self._advance(1, f"{unit.name} failed")


def _weight(unit: Unit) -> int:
    """Rough cost; a head on stored embeddings is cheap."""
    return 1 if unit.recipe.is_frozen and unit.kind in EMBEDDED_SPLITS else WEIGHT[unit.kind]


def _headline(unit: Unit, result: dict[str, Any]) -> str:
    if unit.kind == "fold":
        return f"val accuracy {result['val_accuracy']:.3f}, "
    if unit.kind == "oof":
        return f"out-of-fold accuracy {kfold_summary(result['fold_accuracies'])['mean']:.3f}, "
    if unit.kind == "train":
        return f"val accuracy {result['metrics']['final_accuracy']:.3f}, "
    if unit.kind == "snapshots":
        return f"val accuracies {' '.join(f'{accuracy:.3f}' for accuracy in result['val_accuracies'])}, "
    if unit.kind == "embed":
        return f"embeddings of {result['images']} images, "
    return f"test accuracy {result['test_accuracy']:.3f}, " if unit.kind == "test" else ""


def _decoding_progress() -> Any:
    last_message = [time.monotonic()]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - last_message[0] > 5:
            last_message[0] = time.monotonic()
            logger.info("decoding: %d of %d images", done, total)

    return progress


def _figures(backbone: str, ledger: Ledger) -> dict[str, Any]:
    trained, oof = ledger.result(backbone, "train"), ledger.result(backbone, "oof")
    figures: dict[str, Any] = dict(trained["metrics"]) if trained else {}
    figures |= ledger.result(backbone, "test") or {}
    figures |= ledger.result(backbone, "export") or {}
    if oof:
        figures["kfold"] = kfold_summary(oof["fold_accuracies"])
    if snapshots := ledger.result(backbone, "snapshots"):
        figures["snapshots"] = snapshots
    return figures


def _write_backbone_records(recipe: Recipe, ledger: Ledger) -> None:
    """Write training metrics and K-fold results of one backbone from the ledger; an equal file is not rewritten."""
    name = recipe.backbone
    trained, oof = ledger.result(name, "train"), ledger.result(name, "oof")
    if trained:
        record = trained["metrics"] | (ledger.result(name, "test") or {})
        _write_if_changed(settings.METRICS_DIR / f"{name}_training_metrics.json", record)
    if oof:
        accuracies = oof["fold_accuracies"]
        summary = kfold_summary(accuracies)
        folds = [ledger.result(name, f"fold {fold}") for fold in range(len(accuracies))]
        record = {
            "backbone": name,
            "k_folds": len(accuracies),
            "fold_accuracies": accuracies,
            "mean_accuracy": summary["mean"],
            "std_accuracy": summary["std"],
            "fold_seeds": [fold["fold_seed"] if fold else None for fold in folds],
            "split_digest": recipe.split_digest,
            "oof_file": oof_path(name).name,
        }
        path = settings.KFOLD_DIR / f"{name}_kfold_results.json"
        _keep_foreign(path)
        _write_if_changed(path, record)


def _keep_foreign(path: Path) -> None:
    """Rename K-fold results of a pipeline without out-of-fold predictions, before they are replaced."""
    renamed = path.with_suffix(".before.json")
    if path.is_file() and not renamed.exists() and "oof_file" not in (read_json(path) or {}):
        path.rename(renamed)
        logger.warning("%s was made by another pipeline; it is kept as %s", path, renamed.name)


def _write_if_changed(path: Any, record: dict[str, Any]) -> None:
    try:
        if json.loads(path.read_text(encoding="utf-8")) == record:
            return
    except (OSError, ValueError):
        logger.debug("%s is written anew", path)
    write_json(path, record)


def _write_pipeline_summary(summary: Summary, ledger: Ledger) -> None:
    training, verification = {}, {}
    for backbone, figures in summary.results.items():
        errors = [f"{unit}: {reason}" for unit, reason in summary.failed.items() if unit.split(" ")[0] == backbone]
        verified = ledger.result(backbone, "verify")
        verification[backbone] = {
            "status": "success" if verified else "not run",
            "num_params": verified["num_params"] if verified else None,
        }
        training[backbone] = {
            "final_accuracy": figures.get("final_accuracy"),
            "final_metrics": {key: value for key, value in figures.items() if key not in ("kfold", "snapshots")},
            "kfold_results": figures.get("kfold"),
            "training_time": round(ledger.seconds(backbone), 3),
            "status": "failed" if errors else "success",
            "error": "; ".join(errors) or None,
        }
    failed = [name for name, record in training.items() if record["status"] == "failed"]
    record = {
        "verification_results": verification,
        "training_results": training,
        "total_execution_time_seconds": summary.seconds,
        "final_checkpoint_status": {"completed": [name for name in training if name not in failed], "failed": failed},
        "timestamp": datetime.now().astimezone().isoformat(),
        "statistics": {"backbones": len(training), "failed": len(failed), "images_left_out": len(summary.left_out)},
    }
    write_json(settings.METRICS_DIR / "pipeline_summary.json", record)
    lines = [f"{name}: {entry['status']}" for name, entry in training.items()]
    with atomic_path(settings.CKPT_DIR / "recovery_status.txt") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _remove_surplus_folds(unit: Unit) -> None:
    """Remove fold networks of an earlier run with more folds."""
    for folder in (settings.CKPT_DIR, settings.CKPT_DIR / ".progress"):
        for path in folder.glob(f"{unit.recipe.backbone}_fold*.pth"):
            number = path.stem.rpartition("_fold")[2]
            if number.isdigit() and int(number) >= unit.folds:
                path.unlink()


def _clean_up(finished: Sequence[Unit]) -> None:
    """Remove temporary files of killed runs and the progress files of finished trainings."""
    progress = settings.CKPT_DIR / ".progress"
    for unit in finished:
        progress_path(unit).unlink(missing_ok=True)
    caches = (settings.IMAGE_CACHE_DIR, *settings.IMAGE_CACHE_DIR.glob("embeddings/*"))
    for folder in (progress, settings.CKPT_DIR, settings.KFOLD_DIR, settings.METRICS_DIR, *caches):
        for leftover in folder.glob(".*.partial*"):
            leftover.unlink(missing_ok=True)
    # Another process may be writing a split outside the workspace.
    is_inside = settings.SPLIT_DIR.parent == settings.BASE_DIR
    for leftover in settings.SPLIT_DIR.parent.glob(f".{settings.SPLIT_DIR.name}.partial*") if is_inside else ():
        shutil.rmtree(leftover, ignore_errors=True)
    if progress.is_dir() and not any(progress.iterdir()):
        progress.rmdir()
