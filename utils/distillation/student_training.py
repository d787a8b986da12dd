"""Training of a student, with a teacher or from labels only.

Optimizer and schedule are the mounted base pipeline's. The label loss is cross-entropy without label smoothing, with
and without a teacher: smoothed labels would contradict the teacher's probabilities, and smoothing only one of two
compared networks would dominate the difference of their log-losses. A training runs to the end of its schedule and
keeps the averaged weights after the last epoch; the val split is scored, but not used for selection. If embeddings are
matched, a linear projector maps those of the student to those of the teacher; it is trained with the student and then
discarded. An interrupted training resumes at its last saved epoch and, on the CPU, ends with equal weights.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import base_back
from utils.core.errors import UserError
from utils.core.progress_bar import progress_bar
from utils.distillation.soft_targets import Targets
from utils.distillation_methods import WeightAverage, embedding_loss, standardised, student_loss
from utils.networks.embeddings import EmbeddingExtractor
from utils.numeric.metrics import accuracy, log_loss, softmax
from utils.training.batch_schedule import BatchSchedule, derived_seed
from utils.training.image_source import ImageSource
from utils.training.optimization import step_with_clipped_gradients
from utils.training.progress import TrainingProgress, copied_weights, schedule_state

logger = logging.getLogger("disease_pipeline")

AVERAGED_EPOCHS = 2.0  # time constant of the moving average of the weights, in epochs
MAX_DECAY, MIN_DECAY = 0.9998, 0.9  # bounds of the decay of the moving average
RISEN = 0.1  # a final val log-loss above its minimum by more than this fraction is logged
LOGGED_SECONDS = 20.0  # an epoch of at least this duration is logged at level INFO

EpochTargets = Callable[[int], Targets]
"""Epoch -> the teacher's predictions for the views of that epoch."""


@dataclass(frozen=True)
class StudentTrainingSettings:
    """Hyperparameters of a student's training."""

    backbone: str
    """Name that selects rates and schedule of the base pipeline."""
    epochs: int
    lr: float
    temperature: float
    alpha: float
    """Weight of the distillation loss; 0 trains from labels only."""
    seed: int
    feature_weight: float = 0.0
    """Weight of the embedding matching loss; 0 disables it."""


@dataclass
class StudentTrainingResult:
    """The result of a training, with the averaged weights after the last epoch."""

    weights: dict[str, Tensor]
    history: list[dict[str, float]]
    """Per epoch: train_loss, val_log_loss, val_accuracy."""
    threads: int | None
    """Intra-op threads of the training; None on a GPU."""


def train(
    model: nn.Module,
    settings: StudentTrainingSettings,
    batch_schedule: BatchSchedule,
    epoch_targets: EpochTargets | None,
    validation_set: ImageSource,
    *,
    device: str,
    progress: TrainingProgress | None = None,
) -> StudentTrainingResult:
    """Train `model` in place; with `epoch_targets` None, from labels only.

    A resumed training uses the number of threads that it started with. Raises UserError if the loss is not finite, and
    if embeddings should be matched but the network has none.
    """
    rule = base_back.load_bundled("threads")
    saved = progress.load() if progress is not None else None
    img_size = batch_schedule.image_source.preprocessing.input_size
    threads = rule.threads_of_network("student", model, img_size, device)
    if saved is not None:
        threads = saved.get("threads", threads)
    with rule.intra_op_threads(threads):
        return _train(model, settings, batch_schedule, epoch_targets, validation_set, device, progress, saved, threads)


def _train(
    model: nn.Module,
    settings: StudentTrainingSettings,
    batch_schedule: BatchSchedule,
    epoch_targets: EpochTargets | None,
    validation_set: ImageSource,
    device: str,
    progress: TrainingProgress | None,
    saved: Mapping[str, Any] | None,
    threads: int | None,
) -> StudentTrainingResult:
    """`train` with the number of threads set, resuming from the state `saved` if there is one."""
    training = base_back.load("training")
    layout = base_back.load_bundled("memory_layout").memory_format(model, is_trained=True)
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = training.create_optimized_optimizer(model, settings.lr, settings.backbone)
    matching = None
    if epoch_targets is not None and settings.feature_weight > 0:
        epoch_targets = lru_cache(maxsize=1)(epoch_targets)  # those of epoch 0 also determine the width
        width = saved["projector"]["weight"].shape[0] if saved is not None else _width(epoch_targets(0))
        matching = _EmbeddingMatching.of(model, validation_set, settings.backbone, width, device)
        optimizer.add_param_group({"params": list(matching.projector.parameters())})
    steps = len(batch_schedule)
    lr_schedule = training.create_improved_scheduler(optimizer, settings.epochs, steps, settings.backbone)
    average = WeightAverage(model, min(MAX_DECAY, max(MIN_DECAY, 1 - 1 / (AVERAGED_EPOCHS * steps))))
    run = _StudentTraining(model, optimizer, lr_schedule, average, settings, device, matching, layout)
    history: list[dict[str, float]] = []
    if progress is not None and saved is not None:
        run.restore(saved)
        history = saved["history"]
        logger.info("%s: resumed at epoch %d of %d", progress.path.stem, len(history) + 1, settings.epochs)
    labels = validation_set.images.labels
    description = f"{settings.backbone}{'' if epoch_targets else ' without a teacher'}"
    with progress_bar((settings.epochs - len(history)) * steps, description, unit="batch") as advance:
        for epoch in range(len(history), settings.epochs):
            start = time.monotonic()
            loss = run.epoch(batch_schedule, epoch, epoch_targets(epoch) if epoch_targets else None, advance)
            probabilities = softmax(predict_logits(model, validation_set, device, average.weights))
            row = {
                "train_loss": loss,
                "val_log_loss": log_loss(probabilities, labels),
                "val_accuracy": accuracy(probabilities, labels),
            }
            history.append(row)
            seconds = time.monotonic() - start
            logger.log(
                logging.INFO if seconds >= LOGGED_SECONDS else logging.DEBUG,
                "%s epoch %d/%d: train loss %.4f, val log-loss %.4f accuracy %.4f, %.1f s; at most %.0f min left",
                *(description, epoch + 1, settings.epochs, loss, row["val_log_loss"], row["val_accuracy"], seconds),
                seconds * (settings.epochs - epoch - 1) / 60,
            )
            if progress and (progress.is_due() or epoch + 1 == settings.epochs):
                progress.save(run.state() | {"history": history, "threads": threads})
    _log_risen_loss(settings, history)
    return StudentTrainingResult(copied_weights(average.weights), history, threads)


def _log_risen_loss(settings: StudentTrainingSettings, history: list[dict[str, float]]) -> None:
    losses = [row["val_log_loss"] for row in history]
    lowest = int(np.argmin(losses))
    if losses[-1] > (1 + RISEN) * losses[lowest]:
        logger.info(
            "%s: the val log-loss rose from %.4f in epoch %d to %.4f at the end, epoch %d; the last epoch is kept",
            *(settings.backbone, losses[lowest], lowest + 1, losses[-1], len(losses)),
        )


def predict_logits(
    model: nn.Module, image_source: ImageSource, device: str, weights: Mapping[str, Tensor] | None = None
) -> np.ndarray:
    """Logits, float32 (N, C), of images with the evaluation transform; `weights` replace those of the model."""
    model.to(device).eval()
    batches = []
    replaced = {name: tensor.to(device) for name, tensor in (weights or {}).items()}
    with torch.inference_mode():
        for _, images in image_source.evaluation_batches(image_source.preprocessing, device=device):
            logits = torch.func.functional_call(model, replaced, (images,)) if replaced else model(images)
            batches.append(logits.float().cpu().numpy())
    return np.concatenate(batches)


def _width(targets: Targets) -> int:
    """Width of the teacher's embeddings."""
    assert targets.embeddings is not None  # requested whenever embeddings are matched
    return int(targets.embeddings.shape[1])


@dataclass
class _EmbeddingMatching:
    """The student's embeddings and the linear map from them to the teacher's."""

    extractor: EmbeddingExtractor
    projector: nn.Linear

    @classmethod
    def of(cls, model: nn.Module, image_source: ImageSource, name: str, width: int, device: str) -> _EmbeddingMatching:
        """Create it with a zero-initialised map to `width` dimensions. Raises UserError without embeddings."""
        extractor = EmbeddingExtractor(model, name, checks=False)
        _, images = next(iter(image_source.evaluation_batches(image_source.preprocessing, device=device)))
        model.eval()
        with torch.inference_mode():
            extractor.probe(images)
            embeddings = extractor(images)[1]
        if not embeddings.shape[1]:
            raise UserError(f"distillation.feature_weight: the student {name} has no embeddings to match; set it to 0")
        projector = nn.Linear(embeddings.shape[1], width)
        nn.init.zeros_(projector.weight)
        nn.init.zeros_(projector.bias)
        return cls(extractor, projector.to(device))


@dataclass
class _StudentTraining:
    """A training in progress."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage
    settings: StudentTrainingSettings
    device: str
    matching: _EmbeddingMatching | None
    layout: torch.memory_format
    """Memory format of the network and of its images"""

    def __post_init__(self) -> None:
        self.on_cuda = torch.device(self.device).type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.on_cuda)

    def epoch(
        self,
        batch_schedule: BatchSchedule,
        epoch: int,
        targets: Targets | None,
        advance: Callable[[int], object] = lambda count: None,
    ) -> float:
        """Train one epoch; returns the mean loss per image. Without `targets`, train from labels only.

        `advance(1)` is called after each batch.
        """
        # Random numbers of the network are seeded by the epoch, so that no generator state has to be saved.
        torch.manual_seed(derived_seed(self.settings.seed, "epoch", epoch))
        self.model.train()
        source = batch_schedule.image_source
        labels = torch.from_numpy(source.images.labels)
        no_targets = np.zeros((len(source), len(source.images.classes)))
        teacher = torch.as_tensor(no_targets if targets is None else targets.log_probabilities, dtype=torch.float32)
        embeddings = None
        if targets is not None and targets.embeddings is not None and self.matching is not None:
            embeddings = torch.from_numpy(standardised(targets.embeddings))
        has_target = ~teacher.isnan().any(dim=1) & (targets is not None)
        alpha, total, count = self.settings.alpha if targets is not None else 0.0, 0.0, 0
        for batch, images in batch_schedule.loader(epoch, source.preprocessing):
            distilled, labelled = has_target[batch.rows], labels[batch.rows] >= 0
            if batch_schedule.separates_losses:
                distilled, labelled = distilled & batch.unaugmented, labelled & ~batch.unaugmented
            batch_targets = teacher[batch.rows]
            if batch.mixing is not None and batch_schedule.mixes_targets:
                batch_targets = batch.mixing.log_probabilities(batch_targets)
                distilled = distilled & distilled[batch.mixing.partner]
            if batch.mixing is not None:  # an image mixed with an unlabeled one has no label
                labelled = labelled & labelled[batch.mixing.partner]
            with torch.autocast("cuda") if self.on_cuda else nullcontext():
                logits, projected = self._forward(images.to(self.device, memory_format=self.layout))
            loss = student_loss(
                logits.float(),
                labels[batch.rows],
                batch_targets,
                distilled=distilled,
                labelled=labelled,
                mixing=batch.mixing,
                criterion=F.cross_entropy,
                temperature=self.settings.temperature,
                alpha=alpha,
            )
            if projected is not None and embeddings is not None:
                matched = embeddings[batch.rows].to(self.device)
                loss = loss + self.settings.feature_weight * embedding_loss(projected.float(), matched)
            value = loss.item()  # only once per batch, since it synchronises with the GPU
            if not math.isfinite(value):
                raise UserError(
                    f"distillation: the loss became {value} in epoch {epoch + 1}; set a lower rate: "
                    f"--set distillation.lr={self.settings.lr / 10:g}"
                )
            self._step(loss)
            total, count = total + value * len(batch.rows), count + len(batch.rows)
            advance(1)
        return total / count

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C), and the projected embeddings (B, D) if they are matched."""
        if self.matching is not None:
            logits, embeddings = self.matching.extractor(images)
            return logits, self.matching.projector(embeddings)
        output = self.model(images)
        return (output if isinstance(output, Tensor) else output[0]), None

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        step_with_clipped_gradients(self.scaler, self.optimizer, self.model)
        self.scaler.update()
        self.lr_schedule.step()
        self.average.update()

    def state(self) -> dict[str, Any]:
        """The state that the next epoch depends on, for `restore`."""
        return {
            "weights": copied_weights(self.model.state_dict()),
            "average": copied_weights(self.average.weights),
            "steps": self.average.steps,
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule_state(self.lr_schedule),
            "scaler": self.scaler.state_dict(),
        } | ({"projector": copied_weights(self.matching.projector.state_dict())} if self.matching else {})

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        self.model.load_state_dict(saved["weights"])
        self.average.restore(saved["average"], saved["steps"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.lr_schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.matching:
            self.matching.projector.load_state_dict(saved["projector"])
