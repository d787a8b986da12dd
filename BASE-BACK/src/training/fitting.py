"""The phases of training, head training and fine-tuning, for the final network and every fold network.

The state needed to resume is saved between epochs and is all that the next epoch depends on, so that a resumed
training ends with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from config import settings
from training.external import last_linear_layers
from training.pipeline import (
    create_cosine_scheduler,
    create_improved_scheduler,
    create_layer_decay_optimizer,
    create_optimized_optimizer,
    get_loss_function_for_backbone,
    train_epoch_optimized,
    validate_epoch_optimized,
)
from training.progress import Progress, random_state, restore_random_state
from training.recipe import Recipe
from utils import logger, set_seed
from utils.logs import duration
from utils.memory_layout import memory_format
from utils.threads import intra_op_threads, threads_of_network

LAST = "last"  # value of `selection` in a checkpoint: the last epoch, not one selected on the val split
DIVERGED = 3  # training diverged if its loss exceeds this multiple of the loss of uniform probabilities
RISEN = 0.1  # a final val loss above its minimum by more than this fraction is logged

Weights = dict[str, Tensor]
EpochRow = tuple[float, float, float, float, float]
"""(train_loss, val_loss, val_acc, train_acc, val_f1)"""


@dataclass(frozen=True)
class Phase:
    """A number of epochs under one schedule."""

    name: str
    epochs: int
    rate: float
    """Base learning rate; the architecture may scale it."""
    schedule: Callable[[torch.optim.Optimizer, int, int, str], torch.optim.lr_scheduler.LRScheduler]
    """(optimizer, epochs, steps in an epoch, backbone) -> schedule counted in steps."""
    kept: int = 0
    """Number of snapshots that are kept, the last ones."""
    every: int = 1
    """Epochs from one snapshot to the next."""


@dataclass
class Stage:
    """Outcome of one phase: metrics per epoch, and the weights of its last and of its best epoch."""

    name: str
    last: Weights
    weights: Weights
    """Weights of the best epoch on the val split; training does not depend on which epoch that is."""
    epoch: int
    accuracy: float
    loss: float
    rows: list[EpochRow]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    snapshots: list[tuple[int, Weights]] = field(default_factory=list)
    """(epoch, weights) of the kept snapshots."""


@dataclass
class Fitted:
    """A trained network with the weights of its last epoch, and the outcome of each phase."""

    model: nn.Module
    stages: list[Stage]
    validation: tuple[float, float, float, float, float]
    """(loss, accuracy, precision, recall, F1) on the val split with the weights in `model`."""

    @property
    def history(self) -> dict[str, list[EpochRow]]:
        """Rows per epoch under `head` and `finetune`."""
        rows = {stage.name: stage.rows for stage in self.stages}
        return {name: rows.get(name, []) for name in ("head", "finetune")}


def fit(
    recipe: Recipe,
    model: nn.Module,
    make_train_loader: Callable[[int], Any],
    val_loader: Any,
    *,
    purpose: tuple[object, ...],
    device: torch.device,
    phases: Sequence[Phase] | None = None,
    progress: Progress | None = None,
    keep: Callable[[int, EpochRow, Weights], object] | None = None,
) -> Fitted:
    """Train `model` by the recipe to the end of its schedule; the val split is only scored, never selected on.

    `make_train_loader(seed)` returns the training batches; `purpose` identifies the training, ("final",) or
    ("fold", 2), and determines its seeds. `phases` defaults to head training and fine-tuning. With `progress`, training
    resumes from the saved state and saves to it. `keep(epoch, row, weights)` is called with each snapshot before the
    progress that includes it is saved. Raises FloatingPointError when the loss is not finite, or ends at more than
    DIVERGED times that of uniform probabilities.
    """
    criterion = get_loss_function_for_backbone(recipe.backbone, len(recipe.classes))
    model.to(device=device, memory_format=memory_format(model, is_trained=True))  # type: ignore[call-overload]
    plan = usual_phases(recipe) if phases is None else phases
    stages, running = _saved(progress, plan)
    with intra_op_threads(_threads(recipe, model, device, progress)):
        for phase in plan:
            if phase.name not in [stage.name for stage in stages]:
                seed = recipe.seed_for(*purpose, phase.name)
                _choose_trainable(recipe, model, device, head_only=phase.name == "head")
                set_seed(seed)
                train_loader = make_train_loader(seed)
                factors = recipe.weights_of(train_loader.dataset.targets)
                weighted = get_loss_function_for_backbone(recipe.backbone, len(recipe.classes), factors).to(device)
                losses = (weighted, criterion)
                training = _Training(recipe, model, train_loader, val_loader, losses, device, stages, progress, keep)
                stages.append(training.run(phase, running))
                running = None
                if progress:
                    progress.save(_record(stages))
            if phase.name == "head":
                model.load_state_dict(stages[0].last)
        model.load_state_dict(stages[-1].last)
        _check_end(recipe, stages[-1])
        validation = validate_epoch_optimized(model, val_loader, criterion, device)[:5]
    return Fitted(model, stages, tuple(float(value) for value in validation))  # type: ignore[arg-type]


def _threads(recipe: Recipe, model: nn.Module, device: torch.device, progress: Progress | None) -> int | None:
    """Number of intra-op threads: that of the interrupted training, else that of `utils.threads.TABLE`."""
    number = threads_of_network("base training", model, recipe.img_size, device)
    if number is not None and progress:
        if progress.threads not in (None, number):
            logger.info("%s: %d threads, as when it began", progress.path.stem, progress.threads)
        number = progress.threads = progress.threads or number
    return number


def usual_phases(recipe: Recipe) -> list[Phase]:
    """Head training and fine-tuning, without phases of zero epochs."""
    schedule = create_cosine_scheduler if recipe.is_pretrained else create_improved_scheduler
    head = Phase("head", recipe.epochs_head, recipe.head_lr, schedule)
    finetune = Phase("finetune", recipe.epochs_finetune, recipe.backbone_lr, schedule, recipe.snapshots)
    return [phase for phase in (head, finetune) if phase.epochs]


def _check_end(recipe: Recipe, stage: Stage) -> None:
    """Raise FloatingPointError if training diverged; log a val loss that rose towards the end."""
    train_loss, val_loss = stage.rows[-1][:2]
    uniform = math.log(len(recipe.classes))
    if len(stage.rows) > 1 and train_loss > DIVERGED * uniform:
        raise FloatingPointError(
            f"{recipe.backbone}: the training diverged: after the last epoch its loss is {train_loss:.3g}, and equal "
            f"probabilities have {uniform:.3g}; try lower rates (DBT_HEAD_LR, DBT_BACKBONE_LR)"
        )
    lowest = min(range(len(stage.rows)), key=lambda epoch: stage.rows[epoch][1])
    if val_loss > (1 + RISEN) * stage.rows[lowest][1]:
        logger.info(
            "%s: the val loss rose from %.4f in epoch %d to %.4f at the end, epoch %d; the last epoch is kept",
            *(recipe.backbone, stage.rows[lowest][1], lowest + 1, val_loss, len(stage.rows)),
        )


def _saved(progress: Progress | None, plan: Sequence[Phase]) -> tuple[list[Stage], dict[str, Any] | None]:
    """The finished stages of an interrupted training and the state of its unfinished one, or None."""
    record = progress.load() if progress else None
    if progress is None or record is None:
        return [], None
    stages = [Stage(**stage) for stage in record["stages"]]
    running = record["running"]
    if len(stages) == len(plan):
        logger.info("%s: resumed after its last epoch", progress.path.stem)
    else:
        phase = plan[len(stages)]
        epoch = running["epoch"] + 2 if running else 1
        logger.info("%s: resumed %s at epoch %d of %d", progress.path.stem, phase.name, epoch, phase.epochs)
    return stages, running


def _record(stages: list[Stage], running: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"stages": [vars(stage) for stage in stages], "running": running}


def _choose_trainable(recipe: Recipe, model: nn.Module, device: torch.device, *, head_only: bool) -> None:
    """Make only the last layer trainable, or all layers."""
    for parameter in model.parameters():
        parameter.requires_grad_(not head_only)
    if not head_only:
        return
    if recipe.base_back is None:
        classifier = model.get_classifier()  # type: ignore[operator]
        layers = list(classifier) if isinstance(classifier, (tuple, list)) else [classifier]
    else:
        layers = last_linear_layers(model, len(recipe.classes), recipe.img_size, device)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(True)


@dataclass
class _Training:
    """One phase of one network."""

    recipe: Recipe
    model: nn.Module
    train_loader: Any
    val_loader: Any
    losses: tuple[nn.Module, nn.Module]
    """Training loss, and validation loss without class weights."""
    device: torch.device
    finished: list[Stage]
    progress: Progress | None
    keep: Callable[[int, EpochRow, Weights], object] | None

    def run(self, phase: Phase, running: dict[str, Any] | None) -> Stage:
        """Train through the phase, resuming from the saved state `running` if there is one."""
        recipe, model, device, epochs = self.recipe, self.model, self.device, phase.epochs
        train_criterion, criterion = self.losses
        optimizer = self._optimizer(phase)
        scheduler = phase.schedule(optimizer, epochs, len(self.train_loader), recipe.backbone)
        scaler = torch.amp.GradScaler("cuda", enabled=device.type == "cuda")
        stage: Stage | None = None
        rows: list[EpochRow] = []
        snapshots: list[tuple[int, Weights]] = []
        if running:
            stage = Stage(**running["stage"])
            rows, snapshots = stage.rows, stage.snapshots
            self._restore(running, optimizer, scheduler, scaler)
        for epoch in range(len(rows), epochs):
            start = time.monotonic()
            trained = train_epoch_optimized(
                *(model, self.train_loader, optimizer, train_criterion, device),
                scheduler=scheduler,
                in_evaluation_mode=recipe.is_pretrained and phase.name == "head",
                scaler=scaler,
            )
            checked = validate_epoch_optimized(model, self.val_loader, criterion, device)
            rows.append((trained[0], checked[0], checked[1], trained[1], checked[4]))
            weights = copy_weights(model)
            is_snapshot = phase.kept > 0 and (epoch + 1) % phase.every == 0
            if is_snapshot:
                snapshots = [*snapshots, (epoch, weights)][-phase.kept :]
                if self.keep:
                    self.keep(epoch, rows[-1], weights)
            if stage is None or (checked[1], -checked[0]) > (stage.accuracy, -stage.loss):
                state, schedule = copy.deepcopy(optimizer.state_dict()), _plain(scheduler.state_dict())
                stage = Stage(phase.name, weights, weights, epoch, checked[1], checked[0], rows, state, schedule)
            stage.last, stage.snapshots = weights, snapshots
            seconds = time.monotonic() - start
            logger.info(
                "%s %s epoch %d/%d: train loss %.4f accuracy %.4f, val loss %.4f accuracy %.4f F1 %.4f, %.1f s; "
                "at most %s left",
                *(recipe.backbone, phase.name, epoch + 1, epochs),
                *(trained[0], trained[1], checked[0], checked[1], checked[4]),
                *(seconds, duration(seconds * (epochs - epoch - 1))),
                # Short epochs would flood the terminal; the end of a cycle is always shown.
                file_only=seconds < 20 and not (is_snapshot and phase.every > 1),
            )
            if self.progress and epoch + 1 < epochs and self.progress.due():
                self.progress.save(_record(self.finished, self._state(stage, epoch, optimizer, scheduler, scaler)))
        assert stage is not None  # epochs is at least 1
        return stage

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        recipe = self.recipe
        if recipe.is_pretrained and phase.name != "head":
            decays = (settings.LAYER_DECAY, recipe.weight_decay)
            return create_layer_decay_optimizer(self.model, phase.rate, *decays)
        return create_optimized_optimizer(self.model, phase.rate, recipe.backbone)

    def _state(self, stage: Stage, epoch: int, optimizer: Any, scheduler: Any, scaler: Any) -> dict[str, Any]:
        """The state that the next epoch depends on."""
        return {
            "epoch": epoch,
            "stage": vars(stage),
            "optimizer": optimizer.state_dict(),
            "schedule": _plain(scheduler.state_dict()),
            "scaler": scaler.state_dict(),
            "random": random_state(self.device),
        }

    def _restore(self, running: dict[str, Any], optimizer: Any, scheduler: Any, scaler: Any) -> None:
        self.model.load_state_dict(running["stage"]["last"])
        optimizer.load_state_dict(running["optimizer"])
        scheduler.load_state_dict(running["schedule"])
        if running.get("scaler"):  # empty on the CPU and absent from files of earlier versions
            scaler.load_state_dict(running["scaler"])
        self.train_loader.epoch = running["epoch"] + 1
        restore_random_state(running["random"], self.device)


def copy_weights(model: nn.Module) -> Weights:
    """Contiguous CPU copies of the state dict, whose tensors share storage with the model and would change with it."""
    copied = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in copied.items()}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's state without functions, so that a checkpoint holds plain values only."""
    return {name: value for name, value in state.items() if isinstance(value, (int, float, str, list, type(None)))}


def metrics_record(recipe: Recipe, fitted: Fitted) -> dict[str, Any]:
    """The training metrics of a final network: fractions on the val split, JSON-ready and free of NaN."""
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
        "selection": LAST,
        "visualization_paths": {},
        "visualization_summary": "plots are not made by this version",
    }
    if not math.isfinite(loss):
        raise FloatingPointError(f"{recipe.backbone}: the validation loss is {loss}")
    return record
