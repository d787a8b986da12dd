"""Execution of units, in any process: train, check or export one network; files are written atomically."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config import settings
from models import create_custom_backbone
from training import frozen
from training.external import ExternalError, create_external
from training.fitting import LAST, EpochRow, Weights, copy_weights, fit, metrics_record
from training.pipeline import (
    get_loss_function_for_backbone,
    save_checkpoint,
    validate_epoch_optimized,
    write_checkpoint,
)
from training.pretrained import create_pretrained
from training.progress import Progress
from training.recipe import Recipe
from training.snapshots import ROLE, snapshot_phase
from training.timm_networks import TIMM, build_timm
from training.units import Outcome, Unit, checkpoint_path, oof_path, progress_path
from utils import DEVICE, set_seed
from utils.datasets import BatchLoader, DecodedDataset
from utils.files import atomic_path
from utils.samples import stratified_bins
from utils.splitting import fold_groups


def run_unit(unit: Unit) -> Outcome:
    """Run one unit; an exception fails the unit and those that depend on it."""
    try:
        return WORK[unit.kind](unit)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def open_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint of this pipeline, in evaluation mode on the CPU, and the checkpoint's `extra`."""
    record = read_checkpoint(path)
    return network_of(record), record["extra"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Weights and `extra` of a checkpoint of this pipeline."""
    record: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return record


def network_of(record: dict[str, Any]) -> nn.Module:
    """The network of a checkpoint record, in evaluation mode on the CPU."""
    extra = record["extra"]
    name, classes = extra["backbone_name"], len(extra["classes"])
    if extra.get("base_back") == "external":
        model = _external_network(name, classes)
    elif name.startswith(TIMM):
        model = build_timm(name.removeprefix(TIMM), classes, extra["img_size"])
    else:
        model = create_custom_backbone(name, classes, size=extra["model_size"], img_size=extra["img_size"])
    model.load_state_dict(record["model_state_dict"])
    return model.eval()


def assign_folds(dataset: DecodedDataset, folds: int, seed: int) -> np.ndarray:
    """Fold of each train row, int64 (N,): stratified by class; groups and equal contents stay in one fold.

    Raises ValueError when there are fewer groups than folds.
    """
    groups = fold_groups(dataset.records, dataset.contents, folds)
    return stratified_bins(np.array(dataset.targets), groups, [1 / folds] * folds, seed)


def logits_of(model: nn.Module, dataset: DecodedDataset, batch_size: int) -> np.ndarray:
    """Logits of every row in order, float32 (N, C), in full precision."""
    model.to(DEVICE).eval()
    with torch.inference_mode():
        parts = [model(images).float().cpu() for images, _ in BatchLoader(dataset, batch_size, device=DEVICE)]
    return torch.cat(parts).numpy()


def _new_network(recipe: Recipe, *purpose: object) -> nn.Module:
    set_seed(recipe.seed_for(*purpose, "weights"))
    if recipe.base_back is not None:
        return _external_network(recipe.backbone, len(recipe.classes))
    if recipe.pretrained is not None:
        return create_pretrained(recipe.pretrained, len(recipe.classes))
    return create_custom_backbone(
        recipe.backbone, len(recipe.classes), size=recipe.model_size, img_size=recipe.img_size
    )


def _external_network(name: str, num_classes: int) -> nn.Module:
    if settings.EXTERNAL_BASE_BACK is None:
        raise ExternalError(f"{name}: its network comes from another BASE-BACK; name its folder with --base-back DIR")
    return create_external(settings.EXTERNAL_BASE_BACK, name, num_classes)


def _progress(unit: Unit) -> Progress:
    return Progress(progress_path(unit), unit.digest)


def _train_loader(recipe: Recipe, dataset: DecodedDataset) -> Callable[[int], BatchLoader]:
    return lambda seed: recipe.train_loader(dataset, seed)


def _verify(unit: Unit) -> Outcome:
    """Build the network and run a forward and a backward pass on one batch of noise."""
    recipe = unit.recipe
    model = _new_network(recipe, "verify")
    logits = model(torch.randn(2, 3, recipe.img_size, recipe.img_size))
    if logits.shape != (2, len(recipe.classes)):
        raise ValueError(f"logits of shape {tuple(logits.shape)}; expected (2, {len(recipe.classes)})")
    logits.square().mean().backward()
    return Outcome((), {"num_params": sum(parameter.numel() for parameter in model.parameters())})


def _fold(unit: Unit) -> Outcome:
    """Train on the train rows outside one fold; the held-out rows are not used."""
    recipe = unit.recipe
    train = recipe.dataset("train")
    fold_of = assign_folds(train, unit.folds, recipe.seed)
    if recipe.is_frozen:
        return frozen.fold_head(unit, fold_of, train)
    fitting = train.subset(np.flatnonzero(fold_of != unit.fold))
    val = BatchLoader(recipe.dataset("val"), recipe.batch_size)
    purpose = ("fold", unit.fold, unit.folds)
    model, loader, progress = _new_network(recipe, *purpose), _train_loader(recipe, fitting), _progress(unit)
    fitted = fit(recipe, model, loader, val, purpose=purpose, device=DEVICE, progress=progress)
    path = checkpoint_path(recipe.backbone, f"fold{unit.fold}")
    extra = recipe.explain() | {
        "fold": unit.fold,
        "folds": unit.folds,
        "accuracy": fitted.validation[1],
        "epoch": len(fitted.stages[-1].rows) - 1,
        "stage": fitted.stages[-1].name,
        "selection": LAST,
        "seed": recipe.seed_for(*purpose, "weights"),
        "threads": progress.threads,
    }
    write_checkpoint(path, {"model_state_dict": copy_weights(fitted.model), "extra": extra})
    return Outcome((path,), {"val_accuracy": fitted.validation[1], "fold_seed": extra["seed"]})


def _oof(unit: Unit) -> Outcome:
    """Run every saved fold network on its held-out rows and write the out-of-fold predictions."""
    recipe = unit.recipe
    train = recipe.dataset("train")
    fold_of = assign_folds(train, unit.folds, recipe.seed)
    labels = np.array(train.targets, dtype=np.int64)
    logits = np.full((len(train), len(recipe.classes)), np.nan, dtype=np.float32)
    accuracies = []
    for fold in range(unit.folds):
        record = read_checkpoint(checkpoint_path(recipe.backbone, f"fold{fold}"))
        extra = record["extra"]
        if (extra["fold"], extra["folds"]) != (fold, unit.folds):
            raise ValueError(f"checkpoint of fold {extra['fold']} of {extra['folds']}; expected {fold} of {unit.folds}")
        rows = np.flatnonzero(fold_of == fold)
        logits[rows] = _held_out_logits(recipe, record, train.subset(rows))
        accuracies.append(float((logits[rows].argmax(axis=1) == labels[rows]).mean()))
    path = oof_path(recipe.backbone)
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            logits=logits,
            labels=labels,
            sample_ids=np.array(train.sample_ids),
            fold=fold_of,
            classes=np.array(recipe.classes),
        )
    return Outcome((path,), {"fold_accuracies": accuracies})


def _held_out_logits(recipe: Recipe, record: dict[str, Any], held_out: DecodedDataset) -> np.ndarray:
    """Logits, float32 (N, C), of the held-out rows of a fold checkpoint."""
    if recipe.is_frozen:
        return frozen.logits_of_head(recipe, record["model_state_dict"], held_out)
    return logits_of(network_of(record), held_out, recipe.batch_size)


def _train(unit: Unit) -> Outcome:
    """Head training and fine-tuning on all train rows: the network that is deployed."""
    recipe = unit.recipe
    if recipe.is_frozen:
        return frozen.train_head(unit)
    train = recipe.dataset("train")
    val = BatchLoader(recipe.dataset("val"), recipe.batch_size)
    model, loader, progress = _new_network(recipe, "final"), _train_loader(recipe, train), _progress(unit)
    fitted = fit(recipe, model, loader, val, purpose=("final",), device=DEVICE, progress=progress)
    explained = recipe.explain() | {"threads": progress.threads}
    files = []
    for stage in fitted.stages:
        files.append(checkpoint_path(recipe.backbone, f"{stage.name}_best"))
        extra = explained | {"epoch": stage.epoch, "accuracy": stage.accuracy, "stage": stage.name}
        record = {"model_state_dict": stage.weights, "extra": extra}
        record |= {"optimizer_state_dict": stage.optimizer, "scheduler_state_dict": stage.schedule}
        write_checkpoint(files[-1], record)
        for number, (epoch, weights) in enumerate(stage.snapshots, start=1):
            files.append(checkpoint_path(recipe.backbone, f"snapshot{number}"))
            extra = explained | {"epoch": epoch, "stage": "snapshot", "selection": LAST}
            write_checkpoint(files[-1], {"model_state_dict": weights, "extra": extra})
    metrics = metrics_record(recipe, fitted)
    final = {key: value for key, value in metrics.items() if not key.startswith("visualization")}
    files.append(checkpoint_path(recipe.backbone, "final"))
    final = {key: value for key, value in final.items() if key not in explained}
    save_checkpoint(files[-1], fitted.model.cpu(), extra=explained | final)
    return Outcome(tuple(files), {"metrics": metrics, "history": fitted.history})


def _snapshots(unit: Unit) -> Outcome:
    """Train a new network through all cycles and save it at the end of each, without selection on the val split."""
    recipe, phase = unit.recipe, snapshot_phase(unit.recipe)
    train = recipe.dataset("train")
    val = BatchLoader(recipe.dataset("val"), recipe.batch_size)
    model, loader, progress = _new_network(recipe, "snapshots"), _train_loader(recipe, train), _progress(unit)
    explained = recipe.explain()

    def write(epoch: int, row: EpochRow, weights: Weights) -> Path:
        cycle = epoch // phase.every
        path = checkpoint_path(recipe.backbone, f"snapshot{unit.first + cycle}")
        facts = {"epoch": epoch, "stage": ROLE, "cycle": cycle + 1, "accuracy": row[2], "selection": LAST}
        facts["threads"] = progress.threads
        write_checkpoint(path, {"model_state_dict": weights, "extra": explained | facts})
        return path

    fitted = fit(
        *(recipe, model, loader, val),
        purpose=("snapshots",),
        device=DEVICE,
        phases=[phase],
        progress=progress,
        keep=write,
    )
    stage = fitted.stages[0]
    # Written again, since a file may have been removed during an interruption; equal weights give equal bytes.
    files = [write(epoch, stage.rows[epoch], weights) for epoch, weights in stage.snapshots]
    accuracies = [stage.rows[epoch][2] for epoch, _ in stage.snapshots]
    return Outcome(tuple(files), {"files": [path.name for path in files], "val_accuracies": accuracies})


def _test(unit: Unit) -> Outcome:
    """Score the final network on the test split, once."""
    recipe = unit.recipe
    record = read_checkpoint(checkpoint_path(recipe.backbone, "final"))
    dataset = recipe.dataset("test")
    absent = [name for label, name in enumerate(dataset.classes) if label not in set(dataset.targets)]
    # Only if there are any, which keeps the records of complete splits unchanged.
    noted = {"test_classes_without_rows": absent} if absent else {}
    if recipe.is_frozen:
        return Outcome((), frozen.test_head(recipe, record["model_state_dict"], dataset) | noted)
    model = network_of(record)
    loader = BatchLoader(dataset, recipe.batch_size)
    criterion = get_loss_function_for_backbone(recipe.backbone, len(recipe.classes))
    scores = validate_epoch_optimized(model.to(DEVICE), loader, criterion, DEVICE)[:5]
    names = ("test_loss", "test_accuracy", "test_precision", "test_recall", "test_f1")
    return Outcome((), {name: float(score) for name, score in zip(names, scores, strict=True)} | noted)


def _export(unit: Unit) -> Outcome:
    """Export the final network in the formats of the settings."""
    from export import export_and_package_model

    recipe = unit.recipe
    model, extra = open_network(checkpoint_path(recipe.backbone, "final"))
    record = export_and_package_model(
        model,
        recipe.backbone,
        sample_input=torch.zeros(1, 3, recipe.img_size, recipe.img_size),
        force=True,  # this unit runs only when the weights are new
        training_metadata=extra,
        num_classes=len(recipe.classes),
        class_names=list(recipe.classes),
    )
    if record["failed_exports"]:
        raise ValueError(f"export failed for {', '.join(record['failed_exports'])}; see export_status.json")
    return Outcome(
        (settings.DEPLOY_DIR / recipe.backbone / "export_status.json",),
        {"exported_formats": list(record["successful_exports"])},
    )


WORK: dict[str, Callable[[Unit], Outcome]] = {
    "verify": _verify,
    "embed": frozen.embed_unit,
    "fold": _fold,
    "oof": _oof,
    "train": _train,
    "test": _test,
    "export": _export,
    "snapshots": _snapshots,
}
