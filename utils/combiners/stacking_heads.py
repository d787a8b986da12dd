"""Stackers as torch modules: member logits (B, M, C) in, class probabilities (B, C) out, for any B."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from utils.combiners.heads import tempered
from utils.combiners.stacking_features import STEPS, STEPS_PER_NAT
from utils.numeric.metrics import SMALLEST_PROBABILITY


class TemperedBlend(nn.Module):
    """A learner's probabilities at a temperature, mixed with the members' unweighted mean at another temperature."""

    def __init__(self, learner: nn.Module, temperature: float, share: float, mean_temperature: float = 1.0) -> None:
        super().__init__()
        self.learner, self.temperature, self.share = learner, temperature, share
        self.mean_temperature = mean_temperature

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        scores = self.learner(logits).clamp_min(SMALLEST_PROBABILITY).log()
        mean = tempered(torch.softmax(logits, dim=2).mean(dim=1), self.mean_temperature)
        return self.share * torch.softmax(scores / self.temperature, dim=1) + (1 - self.share) * mean


class StackingFeatures(nn.Module):
    """The features of `utils.combiners.stacking_features`: logits (B, M, C) -> (B, F)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> features (B, F): members times classes, then disagreement."""
        probabilities = torch.softmax(logits, dim=2)
        if self.kind == STEPS:
            main = torch.round(probabilities.clamp_min(SMALLEST_PROBABILITY).log() * STEPS_PER_NAT)
        elif self.kind.startswith("log_probabilities"):
            main = _centred_log(probabilities)
        else:
            main = probabilities
        columns = [main.flatten(1)]
        if self.kind.endswith("+disagreement"):
            mean = probabilities.mean(dim=1)
            total, mean_entropy = _entropy(mean), _entropy(probabilities).mean(dim=1)
            spread = (probabilities - mean[:, None]).square().mean(dim=1).sqrt()
            columns += [torch.stack([total, mean_entropy, total - mean_entropy], dim=1), spread]
        return torch.cat(columns, dim=1)


class LogisticOnFeatures(nn.Module):
    """Softmax of a log-linear pool plus a linear layer on the features."""

    weights: Tensor
    matrix: Tensor
    bias: Tensor

    def __init__(self, kind: str, weights: np.ndarray, matrix: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.features = StackingFeatures(kind)
        self.register_buffer("weights", _tensor(weights).reshape(1, -1, 1))
        self.register_buffer("matrix", _tensor(matrix))
        self.register_buffer("bias", _tensor(bias))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        pooled = (self.weights * _centred_log(torch.softmax(logits, dim=2))).sum(dim=1)
        return torch.softmax(pooled + self.features(logits) @ self.matrix + self.bias, dim=1)


class PerceptronOnFeatures(nn.Module):
    """Softmax of linear layers with ReLU between them on the features."""

    def __init__(self, kind: str, matrices: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.features = StackingFeatures(kind)
        layers: list[nn.Module] = []
        for matrix, bias in zip(matrices, biases, strict=True):
            layer = nn.Linear(*matrix.shape)
            layer.weight = nn.Parameter(_tensor(matrix.T), requires_grad=False)
            layer.bias = nn.Parameter(_tensor(bias), requires_grad=False)
            layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        return torch.softmax(self.layers(self.features(logits)), dim=1)


class OnFeatures(nn.Module):
    """A module applied to the features."""

    def __init__(self, kind: str, module: nn.Module) -> None:
        super().__init__()
        self.features, self.module = StackingFeatures(kind), module

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        return self.module(self.features(logits))


class GatedMixture(nn.Module):
    """Mixture of the members' probabilities with weights by a small network for each image."""

    hidden_matrix: Tensor
    hidden_bias: Tensor
    scores_matrix: Tensor
    scores_bias: Tensor

    def __init__(self, matrices: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> None:
        super().__init__()
        self.features = StackingFeatures("log_probabilities")
        for name, matrix, bias in zip(("hidden", "scores"), matrices, biases, strict=True):
            self.register_buffer(f"{name}_matrix", _tensor(matrix))
            self.register_buffer(f"{name}_bias", _tensor(bias))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        hidden = torch.relu(self.features(logits) @ self.hidden_matrix + self.hidden_bias)
        weights = torch.softmax(hidden @ self.scores_matrix + self.scores_bias, dim=1)
        return (weights[:, :, None] * torch.softmax(logits, dim=2)).sum(dim=1)


class _Fused(nn.Module):
    """A fuser over ensembles that share members; `member_indices` are the indices of each ensemble's members."""

    def __init__(self, inputs: Sequence[nn.Module], member_indices: Sequence[np.ndarray], fuser: nn.Module) -> None:
        super().__init__()
        self.inputs, self.fuser = nn.ModuleList(inputs), fuser
        for number, indices in enumerate(member_indices):
            self.register_buffer(f"places{number}", torch.from_numpy(np.asarray(indices, dtype=np.int64)))

    def _logits_of(self, number: int, logits: Tensor) -> Tensor:
        return logits.index_select(1, self.get_buffer(f"places{number}"))

    def _fuse(self, probabilities: list[Tensor]) -> Tensor:
        fused: Tensor = self.fuser(torch.stack(probabilities, dim=1).clamp_min(SMALLEST_PROBABILITY).log())
        return fused


class FusedInputs(_Fused):
    """A fuser over ensembles that read logits."""

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, M, C) -> probabilities (B, C)."""
        return self._fuse([module(self._logits_of(number, logits)) for number, module in enumerate(self.inputs)])


class FusedInputsWithEmbeddings(_Fused):
    """A fuser over ensembles, of which those whose `reads` is true also read the members' embeddings."""

    def __init__(
        self, inputs: Sequence[nn.Module], member_indices: Sequence[np.ndarray], fuser: nn.Module, reads: Sequence[bool]
    ) -> None:
        super().__init__(inputs, member_indices, fuser)
        self.indices = [tuple(int(index) for index in indices) for indices in member_indices]
        self.reads = tuple(reads)

    def forward(self, logits: Tensor, embeddings: list[Tensor]) -> Tensor:
        """Logits (B, M, C) and M embeddings (B, D_m) -> probabilities (B, C)."""
        probabilities = []
        for number, module in enumerate(self.inputs):
            read = ([embeddings[index] for index in self.indices[number]],) if self.reads[number] else ()
            probabilities.append(module(self._logits_of(number, logits), *read))
        return self._fuse(probabilities)


def _centred_log(probabilities: Tensor) -> Tensor:
    logs = probabilities.clamp_min(SMALLEST_PROBABILITY).log()
    return logs - logs.mean(dim=-1, keepdim=True)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(SMALLEST_PROBABILITY).log()).sum(dim=-1)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
