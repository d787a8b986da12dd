"""One epoch of training or validation, with its loss, optimizer, scheduler and checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config.settings import WEIGHT_DECAY
from utils import DEVICE, logger
from utils.class_balance import ClassWeightedLoss
from utils.files import atomic_path

TRANSFORMERS = ("CustomSwinTransformer", "CustomViTHybrid", "CustomDeiTStyle", "CustomCoAtNet", "CustomMaxViT")
RATE_FACTORS = {
    "CustomConvNeXt": 1.2,
    "CustomResNetMish": 1.2,
    "CustomCSPDarkNet": 1.2,
    "CustomViTHybrid": 1.2,
    "CustomRegNet": 1.2,
    "CustomEfficientNetV4": 1.1,
    "CustomDenseNetHybrid": 1.1,
    "CustomGhostNetV2": 1.5,
    "CustomSwinTransformer": 0.5,
    "CustomDeiTStyle": 0.5,
    "CustomCoAtNet": 0.6,
    "CustomMaxViT": 0.6,
}
WARMUP_EPOCHS = 3

EpochResult = tuple[float, float, float, float, float, np.ndarray, np.ndarray, np.ndarray]


def train_epoch_optimized(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    device: torch.device | None = None,
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    in_evaluation_mode: bool = False,
    scaler: torch.amp.GradScaler | None = None,
) -> EpochResult:
    """Train one epoch, gradients clipped at norm 1, `scheduler` stepped after every batch.

    `in_evaluation_mode` freezes the statistics of BatchNorm, for training a head on pretrained layers. On CUDA,
    `scaler` carries the loss scale from epoch to epoch; a new one skips steps until its scale has adapted.
    Returns (loss, accuracy, precision, recall, f1, preds (N,), labels (N,), probs (N, C)): loss in nats per sample,
    the next four as fractions (macro-averaged over the classes), float32 probabilities, all in the loader's order.
    """
    model.train(not in_evaluation_mode)
    return _epoch(model, loader, criterion, device or DEVICE, optimizer, scheduler, scaler)


def validate_epoch_optimized(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    criterion: nn.Module,
    device: torch.device | None = None,
) -> EpochResult:
    """Evaluate the model on the loader without gradients; returns the same tuple as `train_epoch_optimized`."""
    model.eval()
    with torch.no_grad():
        return _epoch(model, loader, criterion, device or DEVICE, None, None)


def _epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    criterion: nn.Module,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    scaler: torch.amp.GradScaler | None = None,
) -> EpochResult:
    total, labels_seen, probabilities = 0.0, [], []
    half = device.type == "cuda"
    scaler = scaler or torch.amp.GradScaler("cuda", enabled=half)  # no effect on the CPU
    for images, host_labels in loader:
        images, labels = images.to(device, non_blocking=True), host_labels.to(device, non_blocking=True)
        with torch.autocast("cuda") if half else nullcontext():
            logits, auxiliary = _unwrap_logits(model(images))
            loss = criterion(logits, labels)
            if auxiliary is not None:
                loss = loss + 0.4 * criterion(auxiliary, labels)
        value = loss.item()  # only once per batch, since it synchronises with the GPU
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value}; try lower rates (DBT_HEAD_LR, DBT_BACKBONE_LR)")
        if optimizer is not None:
            _step(model, loss, optimizer, scaler)
            if scheduler is not None:
                scheduler.step()
        total += value * len(labels)
        labels_seen.append(host_labels.cpu())
        probabilities.append(torch.softmax(logits.detach().float(), dim=1))
    if not labels_seen:
        raise ValueError("the loader gave no batch; expected at least one image")
    truth = torch.cat(labels_seen).numpy()
    probs = torch.cat(probabilities).cpu().numpy()
    preds = probs.argmax(axis=1)
    return total / len(truth), *macro_scores(preds, truth, probs.shape[1]), preds, truth, probs


def _step(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


def _unwrap_logits(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """(logits, auxiliary logits or None) of an output: a tensor, a tuple, an object with `.logits` or a dictionary."""
    if isinstance(outputs, Tensor):
        return outputs, None
    if isinstance(outputs, dict):
        return outputs["logits"], outputs.get("aux")
    if isinstance(outputs, (tuple, list)):
        return outputs[0], (outputs[1] if len(outputs) > 1 else None)
    return outputs.logits, getattr(outputs, "aux_logits", None)


def macro_scores(preds: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[float, float, float, float]:
    """(accuracy, precision, recall, F1) as fractions; macro averages over classes with rows, 0 where undefined.

    `preds` and `labels` are (N,).
    """
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (labels, preds), 1)
    hits, actual, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    precision = hits / np.maximum(predicted, 1)
    recall = hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(actual + predicted, 1)
    means = (float(score[actual > 0].mean()) for score in (precision, recall, f1))
    return (float(hits.sum() / len(labels)), *means)  # type: ignore[return-value]


def get_loss_function_for_backbone(
    backbone_name: str, num_classes: int, class_weights: np.ndarray | None = None
) -> nn.Module:
    """Cross entropy with label smoothing 0.1 for transformers and 0.05 for the others.

    `class_weights` (C,) scale the losses of the samples by the class of their label.
    """
    smoothing = 0.1 if backbone_name in TRANSFORMERS else 0.05
    if class_weights is None:
        return nn.CrossEntropyLoss(label_smoothing=smoothing)
    return ClassWeightedLoss(class_weights, smoothing)


def create_optimized_optimizer(model: nn.Module, lr: float, backbone_name: str) -> torch.optim.Optimizer:
    """AdamW over all parameters, with `lr` times a factor of the architecture."""
    rate = lr * RATE_FACTORS.get(backbone_name, 1.0)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)


def create_improved_scheduler(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, backbone_name: str
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate schedule, stepped after every optimizer step.

    Transformers: linear warm-up over three epochs (a quarter of a short run), then a cosine down to a tenth of the
    rate. Others: one cycle with a peak of five times the rate (Smith and Topin 2018).
    """
    steps = max(1, epochs * steps_per_epoch)
    if backbone_name in TRANSFORMERS:
        warm = max(1, min(WARMUP_EPOCHS * steps_per_epoch, steps // 4))
        return _warm_up_and_cosine(optimizer, warm, steps, lowest=0.1)
    total = max(steps, 2) + 1  # the first value is taken before the first step
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] * 5 for group in optimizer.param_groups],
        total_steps=total,
        pct_start=max(0.2, 2 / total),  # even a very short run has one step of warm-up
        div_factor=20,
        final_div_factor=50,
    )


def create_layer_decay_optimizer(
    model: nn.Module, lr: float, layer_decay: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW with layer-wise learning rate decay: `lr` at the head, times `layer_decay` for each layer before it.

    timm groups the layers; biases and scales have no weight decay (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT).
    """
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
        group.pop("param_names", None)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def create_cosine_scheduler(
    optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, backbone_name: str
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a tenth of the steps, then a cosine down to a hundredth of each group's rate."""
    steps = max(1, epochs * steps_per_epoch)
    warm = max(1, steps // 10)
    return _warm_up_and_cosine(optimizer, warm, steps, lowest=0.01)


def _warm_up_and_cosine(
    optimizer: torch.optim.Optimizer, warm: int, steps: int, *, lowest: float
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over `warm` steps, then a cosine down to `lowest` times each group's rate after `steps` steps."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, steps - warm))
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write weights, optional optimizer and scheduler, and `extra` (plain Python values), atomically."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}  # of any memory format
    record: dict[str, Any] = {"model_state_dict": weights}
    if optimizer is not None:
        record["optimizer_state_dict"] = optimizer.state_dict()
    if scheduler is not None:
        record["scheduler_state_dict"] = scheduler.state_dict()
    record["extra"] = extra or {}
    write_checkpoint(Path(path), record)


def write_checkpoint(path: Path, record: dict[str, Any]) -> None:
    """Write one checkpoint atomically; equal contents give equal bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(_unshared(record), file)  # with a path, its name would be in the archive


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` record of a checkpoint, without loading its tensors; {} for a file in another format."""
    try:
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(record["extra"])
    except Exception as error:  # a file of another pipeline may raise anything
        logger.debug("%s: says nothing of itself that we can read (%s)", path, error)
        return {}


def _unshared(value: Any) -> Any:
    """A copy without shared containers or strings, so that equal contents are pickled to equal bytes.

    A pickle records which objects are identical, and that differs between computed values and values read back.
    """
    if isinstance(value, dict):
        return {_unshared(key): _unshared(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_unshared(item) for item in value)
    return sys.intern(value) if type(value) is str else value
