"""A multi-layer perceptron on members' outputs, trained on whole tensors in memory; when to stop is left open.

The models at several epochs of one training are the settings that `utils.numeric.nested_cv` chooses from: early
stopping on rows that are held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import features, standardisation
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs

STOPS = 6
WEIGHT_DECAY = 1.0  # of AdamW; less of it let held-out log-loss rise again on digits


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
        for index, (matrix, bias) in enumerate(zip(self.matrices, self.biases, strict=True)):
            values = (np.maximum(values, 0) if index else values) @ matrix.astype(np.float64) + bias
        return softmax(values)


@dataclass(frozen=True)
class PerceptronLearner:
    """One training per kind of features, stopped at several epochs."""

    kinds: tuple[str, ...]
    hidden_dims: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's random numbers are the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Kinds of features by stops."""
        return [{"features": kind, "epochs": stop} for kind in self.kinds for stop in self._stops()]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after trainings on logits (M, N, C)."""
        models = [model for kind in self.kinds for model in self._train(logits, labels, kind, self._stops())]
        return np.stack([model.predict_proba(held_out).astype(np.float32) for model in models])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Layers:
        """The model under one setting: the same schedule, stopped where the setting says."""
        (model,) = self._train(logits, labels, setting["features"], [setting["epochs"]])
        return model

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)

    def _train(self, logits: np.ndarray, labels: np.ndarray, kind: str, stops: Sequence[int]) -> Iterator[Layers]:
        import torch
        from torch import nn

        from utils.numeric.module_training import train_module

        raw = features(logits, kind)
        width, classes = logits.shape[0] * logits.shape[2], logits.shape[2]
        centre, scale = standardisation(raw, [width] + [1] * (raw.shape[1] - width))
        sizes = [raw.shape[1], *self.hidden_dims, classes]

        def make() -> nn.Sequential:
            layers: list[nn.Module] = []
            for pair in pairwise(sizes):
                layers += [nn.Linear(*pair), nn.ReLU(), nn.Dropout(self.dropout)]
            return nn.Sequential(*layers[:-2])

        inputs = torch.from_numpy(((raw - centre) / scale).astype(np.float32))
        modules = train_module(
            make,
            inputs,
            torch.from_numpy(labels),
            epochs=self.epochs,
            checkpoint_epochs=stops,
            lr=self.lr,
            weight_decay=WEIGHT_DECAY,
            seed=self.seed,
        )
        for module in modules:
            yield _kept([layer for layer in module if isinstance(layer, nn.Linear)], kind, centre, scale)


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
