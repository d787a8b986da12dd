"""Head training, then fine-tuning: the recipe by which the final network and every fold network are trained."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.pipeline import (
    create_improved_scheduler,
    create_optimized_optimizer,
    get_loss_function_for_backbone,
    train_epoch_optimized,
    validate_epoch_optimized,
)
from training.recipe import Recipe
from utils import logger, set_seed

Weights = dict[str, Tensor]
EpochRow = tuple[float, float, float, float, float]
"""(train_loss, val_loss, val_acc, train_acc, val_f1)"""


@dataclass
class Stage:
    """Outcome of head training or of fine-tuning; the weights are those of its best epoch on the val split."""

    name: str
    weights: Weights
    epoch: int
    accuracy: float
    loss: float
    rows: list[EpochRow]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    snapshots: list[tuple[int, Weights]] = field(default_factory=list)
    """(epoch, weights) of the last epochs."""


@dataclass
class Fitted:
    """A trained network with its best weights loaded, and how it came to be."""

    model: nn.Module
    stages: list[Stage]
    best: Stage
    validation: tuple[float, float, float, float, float]
    """(loss, accuracy, precision, recall, F1) on val, measured again on the weights that `model` holds now."""

    @property
    def history(self) -> dict[str, list[EpochRow]]:
        """Rows per epoch under `head` and `finetune`."""
        found = {stage.name: stage.rows for stage in self.stages}
        return {name: found.get(name, []) for name in ("head", "finetune")}


def fit(
    recipe: Recipe,
    model: nn.Module,
    make_train_loader: Callable[[int], Any],
    val_loader: Any,
    *,
    purpose: tuple[object, ...],
    device: torch.device,
) -> Fitted:
    """Train `model` by the recipe; the epoch is chosen on the val split (accuracy, then loss), never on other rows.

    `make_train_loader(seed)` gives the training batches; `purpose` names the training, ("final",) or ("fold", 2),
    and with it its seeds. Raises FloatingPointError when the loss stops being a number.
    """
    criterion = get_loss_function_for_backbone(recipe.backbone, len(recipe.classes))
    model.to(device)
    stages = []
    for name, epochs in (("head", recipe.epochs_head), ("finetune", recipe.epochs_finetune)):
        if epochs:
            seed = recipe.seed_for(*purpose, name)
            set_seed(seed)
            _freeze_body(model, freeze=name == "head")
            stages.append(_stage(name, epochs, recipe, model, make_train_loader(seed), val_loader, criterion, device))
            if name == "head":
                model.load_state_dict(stages[-1].weights)
    best = max(reversed(stages), key=lambda stage: (stage.accuracy, -stage.loss))
    model.load_state_dict(best.weights)
    validation = validate_epoch_optimized(model, val_loader, criterion, device)[:5]
    return Fitted(model, stages, best, tuple(float(value) for value in validation))  # type: ignore[arg-type]


def _freeze_body(model: nn.Module, *, freeze: bool) -> None:
    """Leave only the last layer trainable, or everything."""
    for parameter in model.parameters():
        parameter.requires_grad_(not freeze)
    for parameter in model.get_classifier().parameters():  # type: ignore[operator]
        parameter.requires_grad_(True)


def _stage(
    name: str,
    epochs: int,
    recipe: Recipe,
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    criterion: nn.Module,
    device: torch.device,
) -> Stage:
    rate = recipe.head_lr if name == "head" else recipe.backbone_lr
    patience = recipe.patience_head if name == "head" else recipe.patience_finetune
    optimizer = create_optimized_optimizer(model, rate, recipe.backbone)
    scheduler = create_improved_scheduler(optimizer, epochs, len(train_loader), recipe.backbone)
    best: Stage | None = None
    rows: list[EpochRow] = []
    snapshots: list[tuple[int, Weights]] = []
    for epoch in range(epochs):
        start = time.monotonic()
        trained = train_epoch_optimized(model, train_loader, optimizer, criterion, device, scheduler=scheduler)
        checked = validate_epoch_optimized(model, val_loader, criterion, device)
        rows.append((trained[0], checked[0], checked[1], trained[1], checked[4]))
        if name == "finetune" and recipe.snapshots:
            snapshots = [*snapshots, (epoch, copy_weights(model))][-recipe.snapshots :]
        if best is None or (checked[1], -checked[0]) > (best.accuracy, -best.loss):
            best = Stage(
                name,
                copy_weights(model),
                epoch,
                checked[1],
                checked[0],
                rows,
                copy.deepcopy(optimizer.state_dict()),
                _plain(scheduler.state_dict()),
            )
        seconds = time.monotonic() - start
        logger.info(
            "%s %s epoch %d/%d: train loss %.4f accuracy %.4f, val loss %.4f accuracy %.4f F1 %.4f, %.1f s",
            *(recipe.backbone, name, epoch + 1, epochs, trained[0], trained[1], checked[0], checked[1], checked[4]),
            seconds,
            file_only=seconds < 20,  # short epochs would flood the terminal
        )
        # While the rate is high the validation loss goes up and down; a long wait there says nothing.
        if epoch - max(best.epoch, epochs // 2) >= patience:
            break
    assert best is not None  # epochs is at least 1
    best.snapshots = snapshots
    return best


def copy_weights(model: nn.Module) -> Weights:
    """A deep copy on the CPU: the state dictionary alone shares its storage with the model and would train on."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The schedule's state without functions, so that a checkpoint holds nothing but values."""
    return {name: value for name, value in state.items() if isinstance(value, (int, float, str, list, type(None)))}


def metrics_record(recipe: Recipe, fitted: Fitted) -> dict[str, Any]:
    """The training metrics of a final network, as fractions on the val split; NaN-free and JSON-ready."""
    loss, accuracy, precision, recall, f1 = fitted.validation
    record = {
        "backbone_name": recipe.backbone,
        "best_accuracy": float(max(stage.accuracy for stage in fitted.stages)),
        "final_accuracy": accuracy,
        "final_precision": precision,
        "final_recall": recall,
        "final_f1_score": f1,
        "final_val_loss": loss,
        "epochs_head": len(fitted.history["head"]),
        "epochs_finetune": len(fitted.history["finetune"]),
        "selected_on": "val",
        "visualization_paths": {},
        "visualization_summary": "plots are not made by this version",
    }
    if not math.isfinite(loss):
        raise FloatingPointError(f"{recipe.backbone}: the validation loss is {loss}")
    return record
