"""Members' networks and heads for joint training: loading, forward passes, optimizer state and release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import base_back
from utils.networks import training_memory
from utils.networks.construction import NetworkSpec
from utils.networks.embeddings import EmbeddingExtractor
from utils.networks.memory import cleanup_memory, safe_delete_model
from utils.predictions.streaming import open_network
from utils.training.batch_schedule import BatchSchedule
from utils.training.image_source import ImageSource
from utils.training.progress import copied_weights, schedule_state

NETWORK_LR_FACTOR = 0.1  # relative to the heads' rate, since the networks are already trained
PROBE_IMAGES = 2  # images in the forward pass that locates the embedding


@dataclass(frozen=True)
class JointMember:
    """A member's network, its images, and its embeddings before joint training."""

    name: str
    architecture: str
    """Name that selects rate, schedule and criterion of the base pipeline."""
    spec: NetworkSpec
    class_order: list[int]
    """Indices of the workspace's classes in the network's outputs."""
    batch_schedule: BatchSchedule
    """Batches of the train images."""
    validation_set: ImageSource
    embeddings: tuple[Tensor, Tensor]
    """Embeddings of the train and of the val images, float32 (N, D) each."""


@dataclass(frozen=True)
class JointTrainingSettings:
    """Hyperparameters of a joint training."""

    epochs: int
    lr: float
    """Learning rate of the heads; the networks' is multiplied by `NETWORK_LR_FACTOR` and the base pipeline's factor."""
    label_smoothing: float
    seed: int


class FusionHeads(nn.Module):
    """Frozen maps of the embeddings, followed by the trained heads."""

    def __init__(self, maps: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.maps, self.heads = maps, nn.ModuleList(heads)

    def forward(self, embeddings: list[Tensor]) -> list[Tensor]:
        """Map M embeddings (B, D_m) to the logits (B, C) of each head."""
        blocks = torch.cat(self.maps(embeddings), dim=1)
        return [head(blocks) for head in self.heads]

    def arrays(self) -> list[dict[str, np.ndarray]]:
        """The weights of each head, float32, by name."""
        return [
            {name: tensor.detach().cpu().numpy().astype(np.float32) for name, tensor in head.state_dict().items()}
            for head in self.heads
        ]


class TrainableMember:
    """A member's network in memory, with its optimizer and learning-rate schedule."""

    def __init__(
        self, member: JointMember, saved: Mapping[str, Any] | None, settings: JointTrainingSettings, device: str
    ) -> None:
        training = base_back.load("training")
        self.member, self.device = member, device
        self.model = open_network(member.spec, saved["weights"] if saved else None).to(device)
        self.outputs = EmbeddingExtractor(self.model, member.name, checks=False)
        with torch.no_grad():
            self.outputs.probe(self._evaluation_crops(torch.arange(min(PROBE_IMAGES, len(member.validation_set)))))
        self.model.train().requires_grad_(True)
        rate = NETWORK_LR_FACTOR * settings.lr
        self.optimizer = training.create_optimized_optimizer(self.model, rate, member.architecture)
        steps = len(member.batch_schedule)
        self.lr_schedule = training.create_improved_scheduler(
            self.optimizer, settings.epochs, steps, member.architecture
        )
        classes = len(member.validation_set.images.classes)
        self.criterion = training.get_loss_function_for_backbone(member.architecture, classes).to(device)
        if saved and "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.lr_schedule.load_state_dict(saved["schedule"])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) in the workspace's class order, and embeddings (B, D)."""
        logits, embeddings = self.outputs(images.to(self.device))
        logits = logits if isinstance(logits, Tensor) else logits[0]
        return logits[:, self.member.class_order], embeddings

    def embed(self, image_source: ImageSource) -> Tensor:
        """Embeddings, float32 (N, D), of images with the evaluation transform."""
        self.model.eval()
        embeddings = []
        with torch.no_grad():
            for _, images in image_source.evaluation_batches(self.member.spec.preprocessing, device=self.device):
                embeddings.append(self.outputs(images)[1].float().cpu())
        return torch.cat(embeddings)

    def state(self) -> dict[str, Any]:
        """States of network, optimizer and learning-rate schedule, to pass as `saved` to a later instance."""
        return {
            "weights": copied_weights(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": schedule_state(self.lr_schedule),
        }

    def step_bytes(self, batch_size: int) -> int:
        """Bytes of memory that one training step on `batch_size` images needs."""
        train = self.member.batch_schedule.image_source
        images = train.load(torch.arange(len(train))[:batch_size], self.member.spec.preprocessing, None)
        activations = training_memory.activation_bytes(self.model, lambda: torch.cat(self.forward(images), dim=1))
        return training_memory.training_state_bytes(self.model) + activations

    def release(self) -> None:
        """Free weights, gradients and moments at once, despite the reference cycle of optimizer and schedule."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        safe_delete_model(self.model)

    def _evaluation_crops(self, rows: Tensor) -> Tensor:
        return self.member.validation_set.load(rows, self.member.spec.preprocessing, None, self.device)


@contextmanager
def loaded_members(
    members: Sequence[JointMember], saved: Sequence[Any], settings: JointTrainingSettings, device: str
) -> Iterator[list[TrainableMember]]:
    """Load the networks, from `saved` states or, if None, from their checkpoints; free them on exit."""
    loaded: list[TrainableMember] = []
    try:
        for member, state in zip(members, saved, strict=True):
            loaded.append(TrainableMember(member, state, settings, device))
        yield loaded
    finally:
        for network in loaded:
            network.release()
        cleanup_memory(())
