"""Multinomial logistic regression on members' outputs: plain ridge, and shrunk to the log-linear pool.

Shrunk to the pool: logits = sum_m w_m log p_m + W x + b with w >= 0, the ridge on W and b alone, and the pool's prior
on the free sum of w (`pools.scale_prior`), so that a strong ridge is the log-linear pool (Genest and Zidek 1986) and a
weak one plain stacking (Wolpert 1992; Breiman 1996). Both are smooth convex problems, solved by L-BFGS-B along the
strengths, from the strongest on, each from the last, in coordinates of nearly equal curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from utils.combiners.stacking_features import FeatureRows, centred_log, features
from utils.numeric.metrics import softmax
from utils.numeric.pools import fit_log_linear, scale_prior
from utils.numeric.setting_paths import path_predictions, paths_of_length

STRENGTHS = tuple(float(f"{10.0**power:.0e}") for power in np.arange(1, -4.25, -0.75))
"""Of the ridge, as a share of the mean log-loss; strongest first."""
ITERATIONS = 200
TOLERANCE = 1e-5  # of the gradient of the mean log-loss
SMALLEST_CURVATURE = 1e-3  # that a coordinate is scaled by, where the fit is nearly certain
DECOMPOSED = 40  # times rows x classes: columns squared up to which their decomposition takes less time than the fits


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

    def paths(self) -> Sequence[Sequence[int]]:
        """One path per form and kind."""
        return paths_of_length(len(self.settings()), len(self.strengths))

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """A training per fit; features are computed once for all of them."""
        first = self.settings()[self.paths()[path][0]]
        rows = _Rows.of(logits, labels, first["form"], first["features"])
        return [
            ([number], _Training(_Path(rows, ~held_out), rows, held_out, self.strengths))
            for number, held_out in enumerate(held_out_sets)
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out logits (M, H, C) after fits on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Coefficients:
        """The model under one setting, along the same path as where the setting was chosen."""
        strengths = self.strengths[: self.strengths.index(setting["strength"]) + 1]
        path = fit_path(logits, labels, form=setting["form"], kind=setting["features"], strengths=strengths)
        return path[-1]


def fit_path(
    logits: np.ndarray, labels: np.ndarray, *, form: str, kind: str, strengths: Sequence[float]
) -> list[Coefficients]:
    """One model per strength, fitted on logits (M, N, C) and labels (N,)."""
    rows = _Rows.of(logits, labels, form, kind)
    path = _Path(rows, np.ones(len(labels), dtype=bool))
    return [path.fit(strength) for strength in strengths]


@dataclass(frozen=True)
class _Rows:
    """What fits of one path read of all rows."""

    table: FeatureRows
    centred: np.ndarray | None
    """float64 (M, N, C): centred log-probabilities; None in the plain form"""

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, form: str, kind: str) -> _Rows:
        centred = centred_log(softmax(logits)) if form == "shrunk_to_pool" else None
        return cls(FeatureRows.of(logits, labels, kind), centred)

    def predict_proba(self, model: Coefficients, inside: np.ndarray) -> np.ndarray:
        """Probabilities of the rows `inside`, bool (N,)."""
        scores = self.table.raw[inside] @ model.matrix + model.bias
        if self.centred is not None:
            scores += np.tensordot(model.weights, self.centred[:, inside], axes=1)
        return softmax(scores)


@dataclass
class _Training:
    """One fit along the strengths."""

    path: _Path
    rows: _Rows
    held_out: np.ndarray
    strengths: Sequence[float]
    done: int = 0

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        model = self.path.fit(self.strengths[self.done])
        self.done += 1
        return [self.rows.predict_proba(model, self.held_out).astype(np.float32)]


class _Path:
    """Fits on the rows `inside`, bool (N,), each from the last one's solution."""

    def __init__(self, rows: _Rows, inside: np.ndarray) -> None:
        self.rows, self.inside = rows, inside
        self.values: np.ndarray | None = None
        self.curvatures: tuple[np.ndarray, np.ndarray] | None = None

    def fit(self, strength: float) -> Coefficients:
        """The model of one strength."""
        table, centred, inside = self.rows.table, self.rows.centred, self.inside
        centre, scale = table.standardisation(inside)
        # Made anew for each strength: the paths of all fits are open at once, and a copy of the rows for each is large.
        problem = _Problem(
            x=(table.raw[inside] - centre) / scale,
            pools=None if centred is None else centred[:, inside].reshape(table.members, -1),
            labels=table.labels[inside],
            classes=table.classes,
        )
        if self.values is None:
            self.values, self.curvatures = problem.start(), problem.curvatures()
        assert self.curvatures is not None
        self.values = problem.minimise(strength, self.values, *self.curvatures)
        weights, matrix, bias = problem.split(self.values)
        matrix = matrix / scale[:, None]
        weights = weights.copy() if problem.free else np.zeros(table.members)
        return Coefficients(table.kind, weights, matrix, bias - centre @ matrix)


@dataclass(frozen=True)
class _Problem:
    """Mean log-loss, ridge and prior, over (weights of the pool, matrix, bias) in one vector.

    L-BFGS-B runs on variables of nearly equal curvature: the matrix in the directions of the features' principal
    components, each divided by the root of its curvature at the start. The decomposition serves all strengths.
    """

    x: np.ndarray
    """float64 (N, F), standardised"""
    pools: np.ndarray | None
    """float64 (M, N * C): centred log-probabilities; None in the plain form"""
    labels: np.ndarray
    """int64 (N,)"""
    classes: int

    @property
    def free(self) -> int:
        """How many weights of the pool come first."""
        return 0 if self.pools is None else len(self.pools)

    def start(self) -> np.ndarray:
        """The log-linear pool, which the strongest ridge leaves; zeros in the plain form."""
        values = np.zeros(self.free + (self.x.shape[1] + 1) * self.classes)
        if self.pools is not None:
            shape = self.free, len(self.labels), self.classes
            values[: self.free] = fit_log_linear(self.pools.reshape(shape), self.labels).weights
        return values

    def curvatures(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal components (F, F) of the features and their mean squares (F,).

        Where the decomposition would take longer than the fits, the features themselves stand for the components.
        """
        rows, width = self.x.shape
        if width**2 > DECOMPOSED * rows * self.classes:
            return np.eye(width), (self.x**2).mean(axis=0)
        squares, components = np.linalg.eigh(self.x.T @ self.x / rows)
        return components, np.maximum(squares, 0)

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights (M,) of the pool, matrix (F, C) and bias (C,)."""
        weights, rest = values[: self.free], values[self.free :]
        return weights, rest[: -self.classes].reshape(-1, self.classes), rest[-self.classes :]

    def minimise(self, strength: float, start: np.ndarray, components: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """The values of least loss under a strength, found from `start`."""
        from scipy.optimize import minimize

        probabilities = self._probabilities(start)[0]
        spread = (probabilities * (1 - probabilities)).mean(axis=0) + SMALLEST_CURVATURE
        of_matrix = 1 / np.sqrt(squares[:, None] * spread + strength)
        of_bias = 1 / np.sqrt(spread + self._ridge_on_bias(strength))
        of_weights = 1 / np.sqrt(self._pool_curvatures(probabilities) + SMALLEST_CURVATURE)
        last: dict[str, np.ndarray] = {}

        def values_of(point: np.ndarray) -> np.ndarray:
            weights, matrix, bias = self.split(point)
            parts = [weights * of_weights, components @ (matrix * of_matrix), bias * of_bias]
            return np.concatenate([part.ravel() for part in parts])

        def loss_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
            last["values"] = values_of(point)
            loss, last["gradient"] = self.loss_and_gradient(last["values"], strength)
            weights, matrix, bias = self.split(last["gradient"])
            parts = [weights * of_weights, (components.T @ matrix) * of_matrix, bias * of_bias]
            return loss, np.concatenate([part.ravel() for part in parts])

        def stop(point: np.ndarray) -> None:
            if self.slope(last["values"], last["gradient"]) <= TOLERANCE:
                raise StopIteration

        weights, matrix, bias = self.split(start)
        parts = [weights / of_weights, (components.T @ matrix) / of_matrix, bias / of_bias]
        point = np.concatenate([part.ravel() for part in parts])
        bounds = [(0, None) if index < self.free else (None, None) for index in range(len(point))]
        options = {"maxiter": ITERATIONS, "gtol": 0, "ftol": 0}
        solution = minimize(
            loss_and_gradient, point, jac=True, method="L-BFGS-B", bounds=bounds, options=options, callback=stop
        )
        return values_of(solution.x)

    def slope(self, values: np.ndarray, gradient: np.ndarray) -> float:
        """The largest slope of the mean loss in which the values may move."""
        free = gradient.copy()
        free[: self.free][(values[: self.free] <= 0) & (free[: self.free] > 0)] = 0
        return float(np.abs(free).max())

    def loss_and_gradient(self, values: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        """The loss and its gradient, both of the mean over rows."""
        weights, matrix, bias = self.split(values)
        error, loss = self._probabilities(values)
        rows = len(error)
        error[np.arange(rows), self.labels] -= 1
        error /= rows
        ridge_on_bias = self._ridge_on_bias(strength)
        loss += 0.5 * strength * float((matrix**2).sum()) + 0.5 * ridge_on_bias * float((bias**2).sum())
        parts = [self.x.T @ error + strength * matrix, error.sum(axis=0) + ridge_on_bias * bias]
        if self.pools is not None:
            prior, slope, _ = scale_prior(float(weights.sum()), rows)
            loss += prior
            parts.insert(0, self.pools @ error.ravel() + slope)
        return loss, np.concatenate([part.ravel() for part in parts])

    def _ridge_on_bias(self, strength: float) -> float:
        """The bias of the plain form is free, as in every ridge; that of the other belongs to what is shrunk."""
        return strength if self.free else 0.0

    def _probabilities(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """Probabilities (N, C) and their mean log-loss."""
        weights, matrix, bias = self.split(values)
        scores = self.x @ matrix
        scores += bias
        if self.pools is not None:
            scores += (weights @ self.pools).reshape(scores.shape)
        scores -= scores.max(axis=1, keepdims=True)
        of_labels = scores[np.arange(len(scores)), self.labels].sum()
        np.exp(scores, out=scores)
        sums = scores.sum(axis=1)
        loss = (np.log(sums).sum() - of_labels) / len(scores)
        scores /= sums[:, None]
        return scores, float(loss)

    def _pool_curvatures(self, probabilities: np.ndarray) -> np.ndarray:
        """Second derivatives (M,) of the mean loss by the weights of the pool."""
        if self.pools is None:
            return np.zeros(0)
        weighted = probabilities.ravel()
        rows = len(probabilities)
        curvatures = []
        for scores in self.pools:
            means = (scores * weighted).reshape(rows, -1).sum(axis=1)
            curvatures.append(((scores**2) @ weighted - (means**2).sum()) / rows)
        return np.array(curvatures)
