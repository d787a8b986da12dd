"""The networks and the heads that are trained together: how they are opened, shown images, moved and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils import base_back
from utils.networks import training_memory
from utils.networks.construction import NetworkSpec
from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.memory import cleanup_memory, safe_delete_model
from utils.predictions.streaming import open_network
from utils.training.image_views import EVALUATION_BATCH_SIZE, Album, Lessons
from utils.training.progress import copied_weights, schedule_state

NETWORKS_SHARE = 0.1  # of the head's rate: the networks are trained already
PROBED = 2  # images by which a network's embedding is found


@dataclass(frozen=True)
class Part:
    """One member's network, how images are shown to it, and what it says before it moves."""

    name: str
    architecture: str
    """By which the base pipeline chooses rate, schedule and criterion."""
    spec: NetworkSpec
    order: list[int]
    """Places of the workspace's classes among the network's outputs"""
    lessons: Lessons
    exam: Album
    """The val images"""
    embeddings: tuple[Tensor, Tensor]
    """Of the train and the val images, float32 (N, D)"""


@dataclass(frozen=True)
class Course:
    """How long and how fast."""

    epochs: int
    lr: float
    """Of the heads; networks move at a tenth of it, times the base pipeline's factor."""
    label_smoothing: float
    seed: int


class FusionHeads(nn.Module):
    """Maps that stay as they are, and the heads that learn on what they give."""

    def __init__(self, maps: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.maps, self.heads = maps, nn.ModuleList(heads)

    def forward(self, embeddings: list[Tensor]) -> list[Tensor]:
        """M embeddings (B, D_m) -> the scores (B, C) of each head."""
        blocks = torch.cat(self.maps(embeddings), dim=1)
        return [head(blocks) for head in self.heads]


class Moving:
    """One network in memory with its optimizer and schedule."""

    def __init__(self, part: Part, saved: Mapping[str, Any] | None, course: Course, device: str) -> None:
        training = base_back.load("training")
        self.part, self.device = part, device
        self.model = open_network(part.spec, saved["weights"] if saved else None).to(device)
        self.outputs = EmbeddingExtractor(self.model, part.name, checks=False)
        with torch.no_grad():
            self.outputs.probe(self._plainly(torch.arange(min(PROBED, len(part.exam)))))
        self.model.train().requires_grad_(True)
        self.optimizer = training.create_optimized_optimizer(self.model, NETWORKS_SHARE * course.lr, part.architecture)
        steps = len(part.lessons)
        self.schedule = training.create_improved_scheduler(self.optimizer, course.epochs, steps, part.architecture)
        classes = len(part.exam.images.classes)
        self.criterion = training.get_loss_function_for_backbone(part.architecture, classes).to(device)
        if saved and "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])

    def answer(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) in the workspace's order of classes, and embeddings (B, D)."""
        logits, embeddings = self.outputs(images.to(self.device, non_blocking=True))
        logits = logits if isinstance(logits, Tensor) else logits[0]
        return logits[:, self.part.order], embeddings

    def seen(self, album: Album) -> Tensor:
        """Embeddings float32 (N, D) of an album's images by the evaluation transform."""
        self.model.eval()
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(album)).split(EVALUATION_BATCH_SIZE):
                images = album.show(rows, self.part.spec.img_size, None).to(self.device)
                found.append(self.outputs(images)[1].float().cpu())
        return torch.cat(found)

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and schedule, without functions, so that the file holds nothing but values."""
        return {
            "weights": copied_weights(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule_state(self.schedule),
        }

    def step_bytes(self, batch_size: int) -> int:
        """What a step on so many images fills."""
        rows = torch.arange(len(self.part.lessons.album))[:batch_size]
        images = self.part.lessons.album.show(rows, self.part.spec.img_size, None)
        kept = training_memory.activation_bytes(self.model, lambda: torch.cat(self.answer(images), dim=1))
        return training_memory.training_state_bytes(self.model) + kept

    def release(self) -> None:
        """Free weights, gradients and moments at once, though optimizer and schedule refer to one another."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        safe_delete_model(self.model)

    def _plainly(self, rows: Tensor) -> Tensor:
        return self.part.exam.show(rows, self.part.spec.img_size, None).to(self.device)


@contextmanager
def in_memory(parts: Sequence[Part], saved: Sequence[Any], course: Course, device: str) -> Iterator[list[Moving]]:
    """The networks, each from what `state` gave or its checkpoint; gone from memory at the end."""
    moving: list[Moving] = []
    try:
        for part, own in zip(parts, saved, strict=True):
            moving.append(Moving(part, own, course, device))
        yield moving
    finally:
        for one in moving:
            one.release()
        cleanup_memory(())
