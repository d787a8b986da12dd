"""The training of a student: one loop for the taught one and for the same network alone, which is its control.

Optimizer, schedule and criterion are the mounted base pipeline's. The epoch is chosen on val rows, which nobody is
trained on. A training that was killed goes on from its last saved epoch and ends with equal weights on the CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import base_back
from utils.core.errors import UserError
from utils.distillation_methods import WeightAverage, student_loss
from utils.numeric.metrics import accuracy, log_loss, softmax
from utils.training.image_views import EVALUATION_BATCH_SIZE, Album, Lessons, seed_of
from utils.training.optimization import step_with_clipped_gradients
from utils.training.progress import TrainingProgress, copied_weights, schedule_state

logger = logging.getLogger("disease_pipeline")

# While the rate is high val goes up and down, and most is learned when it falls.
PATIENCE, PATIENCE_SHARE = 5, 4  # epochs without progress on val that are allowed: so many, and a quarter of all
MEMORY = 2.0  # epochs that the average of the weights looks back
SLOWEST, FASTEST = 0.9998, 0.9  # bounds of its decay
LONG = 20.0  # seconds of an epoch from which on each is worth a line

Weights = dict[str, Tensor]
Teach = Callable[[int], np.ndarray]
"""Epoch -> the teacher's log-probabilities (N, C) of the images as that epoch shows them; NaN where it says nothing."""


@dataclass(frozen=True)
class Course:
    """How a student is trained."""

    backbone: str
    """By which the base pipeline chooses rates, schedule and label smoothing."""
    epochs: int
    lr: float
    temperature: float
    alpha: float
    """Share of the teacher's part; 0: the network alone."""
    seed: int

    @property
    def patience(self) -> int:
        """Epochs without progress on val after which it ends, counted from the middle."""
        return max(PATIENCE, self.epochs // PATIENCE_SHARE)


@dataclass
class Trained:
    """Outcome of a training: the average of the weights at the epoch with the least log-loss on val."""

    weights: Weights
    epoch: int
    """Counted from 0."""
    history: list[dict[str, float]]
    """Per epoch: train_loss, val_log_loss, val_accuracy."""
    is_stopped: bool
    """Before its last epoch, since val showed no progress."""


def train(
    model: nn.Module,
    course: Course,
    lessons: Lessons,
    teach: Teach | None,
    exam: Album,
    *,
    device: str,
    progress: TrainingProgress | None = None,
) -> Trained:
    """Train `model` in place on the lessons; `exam` holds the val images. `teach` None: by labels alone.

    Raises UserError when the loss stops being a number.
    """
    training = base_back.load("training")
    model.to(device)
    optimizer = training.create_optimized_optimizer(model, course.lr, course.backbone)
    schedule = training.create_improved_scheduler(optimizer, course.epochs, len(lessons), course.backbone)
    classes = len(lessons.album.images.classes)
    criterion = training.get_loss_function_for_backbone(course.backbone, classes).to(device)
    decay = min(SLOWEST, max(FASTEST, 1 - 1 / (MEMORY * len(lessons))))
    run = _Run(model, optimizer, schedule, WeightAverage(model, decay), criterion, course, device)
    best: dict[str, Any] | None = None
    history: list[dict[str, float]] = []
    if progress is not None and (saved := progress.load()) is not None:
        best, history = saved["best"], saved["history"]
        if saved["finished"]:
            return Trained(saved["best"]["weights"], saved["best"]["epoch"], history, len(history) < course.epochs)
        run.restore(saved)
        logger.info("%s: resumed at epoch %d of %d", progress.path.stem, len(history) + 1, course.epochs)
    labels = exam.images.labels
    for epoch in range(len(history), course.epochs):
        start = time.monotonic()
        targets = teach(epoch) if teach else None
        loss = run.epoch(lessons, epoch, targets)
        probabilities = softmax(run.answers(exam))
        row = {
            "train_loss": loss,
            "val_log_loss": log_loss(probabilities, labels),
            "val_accuracy": accuracy(probabilities, labels),
        }
        history.append(row)
        if best is None or row["val_log_loss"] < best["val_log_loss"]:
            best = {"epoch": epoch, "val_log_loss": row["val_log_loss"], "weights": copied_weights(run.average.weights)}
        seconds = time.monotonic() - start
        logger.log(
            logging.INFO if seconds >= LONG else logging.DEBUG,
            "%s%s epoch %d/%d: train loss %.4f, val log-loss %.4f accuracy %.4f, %.1f s; at most %.0f min left",
            *(course.backbone, "" if teach else " alone", epoch + 1, course.epochs, loss),
            *(row["val_log_loss"], row["val_accuracy"], seconds, seconds * (course.epochs - epoch - 1) / 60),
        )
        if epoch - max(best["epoch"], course.epochs // 2) >= course.patience:
            break
        if progress and epoch + 1 < course.epochs and progress.is_due():
            progress.save(run.state() | {"best": best, "history": history, "finished": False})
    assert best is not None  # epochs is at least 1
    if progress:
        progress.save({"best": best, "history": history, "finished": True})
    return Trained(best["weights"], best["epoch"], history, len(history) < course.epochs)


def logits_of(model: nn.Module, album: Album, device: str, weights: Mapping[str, Tensor] | None = None) -> np.ndarray:
    """Logits float32 (N, C) of the album's images by the evaluation transform; `weights` stand in for the model's."""
    model.to(device).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(album), EVALUATION_BATCH_SIZE):
            rows = torch.arange(start, min(start + EVALUATION_BATCH_SIZE, len(album)))
            images = album.show(rows, album.size, None).to(device)
            answer = torch.func.functional_call(model, dict(weights), (images,)) if weights else model(images)
            found.append(answer.float().cpu().numpy())
    return np.concatenate(found)


@dataclass
class _Run:
    """One network under way."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage
    criterion: nn.Module
    course: Course
    device: str

    def __post_init__(self) -> None:
        self.on_cuda = torch.device(self.device).type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.on_cuda)

    def epoch(self, lessons: Lessons, epoch: int, targets: np.ndarray | None) -> float:
        """One pass over the lessons; gives the mean loss per image."""
        # What a network draws while it trains follows from the epoch, so that nothing of it has to be saved.
        torch.manual_seed(seed_of(self.course.seed, "epoch", epoch))
        self.model.train()
        labels = torch.from_numpy(lessons.album.images.labels)
        said = torch.zeros(len(lessons.album), len(lessons.album.images.classes)) if targets is None else targets
        teacher = torch.as_tensor(said, dtype=torch.float32)
        is_taught = ~teacher.isnan().any(dim=1) & (targets is not None)
        alpha, total, count = self.course.alpha if targets is not None else 0.0, 0.0, 0
        for batch, images in lessons.pages(epoch, lessons.album.size):
            taught, labelled = is_taught[batch.rows], labels[batch.rows] >= 0
            if lessons.is_apart:
                taught, labelled = taught & batch.plain, labelled & ~batch.plain
            placed = (tensor.to(self.device) for tensor in (labels[batch.rows], teacher[batch.rows], taught, labelled))
            own_labels, own_targets, taught, labelled = placed
            with torch.autocast("cuda") if self.on_cuda else nullcontext():
                logits = self.model(images.to(self.device, non_blocking=True))
                logits = logits if isinstance(logits, Tensor) else logits[0]
            loss = student_loss(
                *(logits.float(), own_labels, own_targets),
                distilled=taught,
                labelled=labelled,
                mixing=batch.mixing,
                criterion=self.criterion,
                temperature=self.course.temperature,
                alpha=alpha,
            )
            if not torch.isfinite(loss):
                raise UserError(
                    f"distillation: the loss became {loss.item()} in epoch {epoch + 1}; try a lower distillation.lr "
                    f"than {self.course.lr:g}"
                )
            self._step(loss)
            total, count = total + loss.item() * len(batch.rows), count + len(batch.rows)
        return total / count

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        step_with_clipped_gradients(self.scaler, self.optimizer, self.model)
        self.scaler.update()
        self.schedule.step()
        self.average.update(self.model)

    def answers(self, exam: Album) -> np.ndarray:
        """Logits (N, C) of the averaged weights."""
        return logits_of(self.model, exam, self.device, self.average.weights)

    def state(self) -> dict[str, Any]:
        """What the next epoch needs of those before."""
        return {
            "weights": copied_weights(self.model.state_dict()),
            "average": copied_weights(self.average.weights),
            "steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule_state(self.schedule),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(saved["weights"])
        self.average.restore(saved["average"], saved["steps"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
