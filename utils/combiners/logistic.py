"""Multinomial logistic regression on members' outputs: plain ridge, and shrunk to the log-linear pool.

Shrunk to the pool: logits = sum_m w_m log p_m + W x + b with w >= 0, the ridge on W and b alone, and the pool's prior
on the free sum of w (`pools.scale_prior`), so that a strong ridge is the log-linear pool (Genest and Zidek 1986) and a
weak one plain stacking (Wolpert 1992; Breiman 1996). Both are smooth convex problems, solved by L-BFGS-B along the
strengths, from the strongest on, each from the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import centred_log, features, standardisation
from utils.numeric.metrics import softmax
from utils.numeric.pools import scale_prior

STRENGTHS = tuple(float(f"{10.0**power:.0e}") for power in np.arange(1, -4.25, -0.75))
"""Of the ridge, as a share of the mean log-loss; strongest first."""
ITERATIONS = 200
TOLERANCE = 1e-5  # of the gradient of the mean log-loss


@dataclass(frozen=True)
class Coefficients:
    """A fitted model: logits = sum_m weights_m centred log p_m + x matrix + bias."""

    kind: str
    """Of the features x."""
    weights: np.ndarray
    """float64 (M,); zeros in the plain form"""
    matrix: np.ndarray
    """float64 (F, C), for features as they are"""
    bias: np.ndarray
    """float64 (C,)"""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        scores = features(logits, self.kind) @ self.matrix + self.bias
        return softmax(scores + np.tensordot(self.weights, centred_log(softmax(logits)), axes=1))


@dataclass(frozen=True)
class LogisticLearner:
    """Both forms on several kinds of features, each along the strengths."""

    kinds: tuple[str, ...]
    forms: tuple[str, ...] = ("shrunk_to_pool", "ridge")
    strengths: tuple[float, ...] = STRENGTHS
    thread_safe: ClassVar[bool] = True

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Form by form, kind by kind, the strongest ridge first."""
        return [
            {"form": form, "features": kind, "strength": strength}
            for form in self.forms
            for kind in self.kinds
            for strength in self.strengths
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after fits on logits (M, N, C)."""
        models = [
            model
            for form in self.forms
            for kind in self.kinds
            for model in fit_path(logits, labels, form=form, kind=kind, strengths=self.strengths)
        ]
        return np.stack([model.predict_proba(held_out).astype(np.float32) for model in models])

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Coefficients:
        """The model under one setting, along the same path as where the setting was chosen."""
        strengths = self.strengths[: self.strengths.index(setting["strength"]) + 1]
        path = fit_path(logits, labels, form=setting["form"], kind=setting["features"], strengths=strengths)
        return path[-1]


def fit_path(
    logits: np.ndarray, labels: np.ndarray, *, form: str, kind: str, strengths: Sequence[float]
) -> list[Coefficients]:
    """One model per strength, fitted on logits (M, N, C) and labels (N,)."""
    from scipy.optimize import minimize

    members, rows, classes = logits.shape
    raw = features(logits, kind)
    width = members * classes
    centre, scale = standardisation(raw, [width] + [1] * (raw.shape[1] - width))
    problem = _Problem(
        x=(raw - centre) / scale,
        pools=centred_log(softmax(logits)).reshape(members, rows * classes) if form == "shrunk_to_pool" else None,
        truth=np.eye(classes)[labels],
    )
    start = problem.start(members)
    bounds = [(0, None) if index < problem.free else (None, None) for index in range(len(start))]
    path = []
    for strength in strengths:
        solution = minimize(
            problem.loss_and_gradient,
            start,
            args=(strength,),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": ITERATIONS, "gtol": TOLERANCE, "ftol": 0},
        )
        start = solution.x
        weights, matrix, bias = problem.split(start)
        matrix = matrix / scale[:, None]
        weights = weights if problem.free else np.zeros(members)
        path.append(Coefficients(kind, weights.copy(), matrix, bias - centre @ matrix))
    return path


@dataclass(frozen=True)
class _Problem:
    """Mean log-loss, ridge and prior, over (weights of the pool, matrix, bias) in one vector."""

    x: np.ndarray
    """float64 (N, F), standardised"""
    pools: np.ndarray | None
    """float64 (M, N * C): centred log-probabilities; None in the plain form"""
    truth: np.ndarray
    """float64 (N, C), one-hot"""

    @property
    def free(self) -> int:
        """How many weights of the pool come first."""
        return 0 if self.pools is None else len(self.pools)

    def start(self, members: int) -> np.ndarray:
        values = np.zeros(self.free + (self.x.shape[1] + 1) * self.truth.shape[1])
        values[: self.free] = 1 / members
        return values

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        classes = self.truth.shape[1]
        weights, rest = values[: self.free], values[self.free :]
        return weights, rest[:-classes].reshape(-1, classes), rest[-classes:]

    def loss_and_gradient(self, values: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        weights, matrix, bias = self.split(values)
        scores = self.x @ matrix + bias
        if self.pools is not None:
            scores += (weights @ self.pools).reshape(scores.shape)
        scores -= scores.max(axis=1, keepdims=True)
        powers = np.exp(scores)
        sums = powers.sum(axis=1)
        rows = len(scores)
        loss = (np.log(sums).sum() - (scores * self.truth).sum()) / rows
        error = (powers / sums[:, None] - self.truth) / rows
        # The bias of the plain form is free, as in every ridge; that of the other belongs to what is shrunk.
        ridge_on_bias = strength if self.free else 0.0
        loss += 0.5 * strength * (matrix**2).sum() + 0.5 * ridge_on_bias * (bias**2).sum()
        parts = [self.x.T @ error + strength * matrix, error.sum(axis=0) + ridge_on_bias * bias]
        if self.pools is not None:
            prior, slope, _ = scale_prior(float(weights.sum()), rows)
            loss += prior
            parts.insert(0, self.pools @ error.ravel() + slope)
        return float(loss), np.concatenate([part.ravel() for part in parts])
