"""A multi-layer perceptron on members' outputs, trained on whole tensors in memory; when to stop is left open.

Trained by AdamW (Loshchilov and Hutter 2019) with a cosine schedule. The models at several epochs of one training and
at several weight decays are the settings that `utils.nested` chooses from: early stopping on rows that are held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from utils.metrics import softmax
from utils.stacking_features import features, standardisation

BATCH = 128
STOPS = 6
DECAYS = (0.1, 1.0)


@dataclass(frozen=True)
class Layers:
    """A fitted perceptron: affine maps with ReLU between them, for features as they are."""

    kind: str
    """Of the features."""
    matrices: tuple[np.ndarray, ...]
    """float32 (in, out) each"""
    biases: tuple[np.ndarray, ...]
    """float32 (out,) each"""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        values = features(logits, self.kind)
        for place, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            values = (np.maximum(values, 0) if place else values) @ matrix.astype(np.float64) + bias
        return softmax(values)


@dataclass(frozen=True)
class PerceptronLearner:
    """Trainings of one shape, stopped at several epochs, at several weight decays."""

    kinds: tuple[str, ...]
    hidden_dims: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    seed: int
    threads: ClassVar[bool] = False  # torch's random numbers are the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Kinds of features by weight decays by stops."""
        return [
            {"features": kind, "weight_decay": decay, "epochs": stop}
            for kind in self.kinds
            for decay in DECAYS
            for stop in self._stops()
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
        models = [
            model
            for kind in self.kinds
            for decay in DECAYS
            for model in self._train(logits, labels, kind, decay, self._stops())
        ]
        return np.stack([model.predict_proba(held_out).astype(np.float32) for model in models])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Layers:
        """The model under one setting: the same schedule, stopped where the setting says."""
        (model,) = self._train(logits, labels, setting["features"], setting["weight_decay"], [setting["epochs"]])
        return model

    def _stops(self) -> list[int]:
        """Epochs at which a model is kept."""
        return sorted({max(1, round(self.epochs * share)) for share in np.linspace(1 / STOPS, 1, STOPS)})

    def _train(
        self, logits: np.ndarray, labels: np.ndarray, kind: str, decay: float, stops: Sequence[int]
    ) -> Iterator[Layers]:
        import torch
        from torch.nn import functional as F

        raw = features(logits, kind)
        width, classes = logits.shape[0] * logits.shape[2], logits.shape[2]
        centre, scale = standardisation(raw, [width] + [1] * (raw.shape[1] - width))
        x = torch.from_numpy(((raw - centre) / scale).astype(np.float32))
        y = torch.from_numpy(labels)
        sizes = [x.shape[1], *self.hidden_dims, classes]
        batches = max(1, len(x) // BATCH)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same sums in the same order on every machine's cores
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.manual_seed(self.seed)
                layers = [torch.nn.Linear(*pair) for pair in pairwise(sizes)]
                parameters = [parameter for layer in layers for parameter in layer.parameters()]
                optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=decay)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
                for epoch in range(1, max(stops) + 1):
                    for rows in torch.randperm(len(x)).tensor_split(batches):
                        values = x[rows]
                        for place, layer in enumerate(layers):
                            values = layer(F.dropout(F.relu(values), self.dropout) if place else values)
                        optimizer.zero_grad(set_to_none=True)
                        F.cross_entropy(values, y[rows]).backward()
                        optimizer.step()
                        schedule.step()
                    if epoch in stops:
                        yield _kept(layers, kind, centre, scale)
        finally:
            torch.set_num_threads(threads)


def _kept(layers: Sequence[Any], kind: str, centre: np.ndarray, scale: np.ndarray) -> Layers:
    """A copy of the layers as they are now, the standardisation taken into the first."""
    matrices = [layer.weight.detach().numpy().astype(np.float64).T for layer in layers]
    biases = [layer.bias.detach().numpy().astype(np.float64) for layer in layers]
    matrices[0] = matrices[0] / scale[:, None]
    biases[0] = biases[0] - centre @ matrices[0]
    return Layers(
        kind,
        tuple(matrix.astype(np.float32) for matrix in matrices),
        tuple(bias.astype(np.float32) for bias in biases),
    )
