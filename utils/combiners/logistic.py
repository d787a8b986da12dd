"""Multinomial logistic regression on members' outputs, with a plain ridge or shrunk to the log-linear pool.

Shrunk to the pool: logits = sum_m w_m log p_m + W x + b with w >= 0, the ridge on W and b only, and the pool's prior on
the sum of w (`pools.scale_prior`), so that a strong ridge gives the log-linear pool (Genest and Zidek 1986) and a weak
one plain stacking (Wolpert 1992; Breiman 1996). Both are smooth convex problems, solved by L-BFGS-B along the strengths
from the strongest to the weakest with warm starts, in coordinates of nearly equal curvature. Many rows are
float32, which halves the time; coefficients are float64. Scores are (C, N), as NumPy reduces a short first axis many
times as fast as a short last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from utils.combiners.fit_demand import FitDemand
from utils.combiners.shared_fits import SharedFits
from utils.combiners.stacking_features import FeatureRows, centred_log, features
from utils.numeric.metrics import softmax
from utils.numeric.pools import fit_log_linear, scale_prior
from utils.numeric.setting_paths import path_predictions, paths_of_length

STRENGTHS = tuple(float(f"{10.0**power:.0e}") for power in np.arange(1, -4.25, -0.75))
"""Strengths of the ridge, relative to the mean log-loss; strongest first."""
ITERATIONS = 200
TOLERANCE = 3e-5  # of the gradient of the mean log-loss; 1e-5 changes held-out losses by less than 1e-4 nats
SMALLEST_CURVATURE = 1e-3  # lower bound in the scaling of coordinates, where probabilities are near 0 or 1
SINGLE_PRECISION = 2**18  # numbers of features from which rows are float32; with few, rounding can end a line search
EVALUATIONS = 100  # of a path of strengths
VECTORS = 30  # of the size of all weights, most of them the history of L-BFGS-B
FLOPS = 1e10  # operations per second in products of matrices, on one core
EVALUATION_SECONDS = 1e-3  # of an evaluation beside its products: with few rows, a fit takes 0.5 s
DECOMPOSED = 40  # times rows x classes: columns squared up to which the decomposition takes less time than the fits


@dataclass(frozen=True)
class Coefficients:
    """A fitted model: logits = sum_m weights_m centred log p_m + x matrix + bias."""

    kind: str
    """Kind of the features x."""
    weights: np.ndarray
    """float64 (M,); zeros in the plain form"""
    matrix: np.ndarray
    """float64 (F, C), for unstandardised features"""
    bias: np.ndarray
    """float64 (C,)"""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        scores = features(logits, self.kind) @ self.matrix + self.bias
        return softmax(scores + np.tensordot(self.weights, centred_log(softmax(logits)), axes=1))


@dataclass(frozen=True)
class LogisticLearner:
    """Both forms on several kinds of features, each along a path of strengths."""

    kinds: tuple[str, ...]
    forms: tuple[str, ...] = ("shrunk_to_pool", "ridge")
    strengths: tuple[float, ...] = STRENGTHS
    pools: SharedFits = field(default_factory=SharedFits, compare=False, repr=False)
    """Log-linear pools, from which the fits on all kinds of features start"""
    thread_safe: ClassVar[bool] = True

    def demand(self, members: int, rows: int, classes: int) -> FitDemand:
        """Return memory and time of a fit: the vectors of L-BFGS-B, and two products of all rows per evaluation."""
        weights = (members * classes + classes) * classes
        evaluations = EVALUATIONS * len(self.forms) * len(self.kinds)
        n_bytes = 8.0 * (VECTORS * weights + 6 * rows * (members + 1) * classes)
        return FitDemand(n_bytes, evaluations * (EVALUATION_SECONDS + 4 * rows * weights / FLOPS))

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Return the settings: forms times kinds times strengths, the strongest ridge first."""
        return [
            {"form": form, "features": kind, "strength": strength}
            for form in self.forms
            for kind in self.kinds
            for strength in self.strengths
        ]

    def paths(self) -> Sequence[Sequence[int]]:
        """Return one path per form and kind."""
        return paths_of_length(len(self.settings()), len(self.strengths))

    def trainings(
        self, path: int, logits: np.ndarray, labels: np.ndarray, held_out_sets: Sequence[np.ndarray]
    ) -> list[tuple[Sequence[int], _Training]]:
        """Return one training per fit; features are computed once for all of them."""
        first = self.settings()[self.paths()[path][0]]
        rows = _Rows.of(logits, labels, first["form"], first["features"], self.pools)
        return [
            ([number], _Training(_Path(rows, ~held_out), rows, held_out, self.strengths))
            for number, held_out in enumerate(held_out_sets)
        ]

    def predictions(self, logits: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        """Return probabilities float32 (G, H, C) of held-out logits (M, H, C) after fits on logits (M, N, C)."""
        return path_predictions(self, logits, labels, held_out)

    def fit(self, logits: np.ndarray, labels: np.ndarray, setting: Mapping[str, Any]) -> Coefficients:
        """Return the model under one setting, fitted along the same path as in the selection of the setting."""
        strengths = self.strengths[: self.strengths.index(setting["strength"]) + 1]
        path = fit_path(logits, labels, form=setting["form"], kind=setting["features"], strengths=strengths)
        return path[-1]


def fit_path(
    logits: np.ndarray, labels: np.ndarray, *, form: str, kind: str, strengths: Sequence[float]
) -> list[Coefficients]:
    """Return one model per strength, fitted on logits (M, N, C) and labels (N,)."""
    rows = _Rows.of(logits, labels, form, kind, SharedFits())
    path = _Path(rows, np.ones(len(labels), dtype=bool))
    return [path.fit(strength) for strength in strengths]


@dataclass(frozen=True)
class _Rows:
    """The features of all rows, for the fits of one path."""

    table: FeatureRows
    centred: np.ndarray | None
    """Float (M, C, N): centred log-probabilities; None in the plain form"""
    dtype: type[np.floating[Any]]
    """Of the rows in a fit"""
    pools: SharedFits
    """Log-linear pools of fits on equal rows"""

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, form: str, kind: str, pools: SharedFits) -> _Rows:
        dtype = np.float32 if logits.size >= SINGLE_PRECISION else np.float64
        centred = None
        if form == "shrunk_to_pool":
            centred = centred_log(softmax(logits)).transpose(0, 2, 1).astype(dtype, order="C")
        return cls(FeatureRows.of(logits, labels, kind), centred, dtype, pools)

    def predict_proba(self, model: Coefficients, inside: np.ndarray) -> np.ndarray:
        """Return probabilities (n, C) of the rows `inside`, bool (N,)."""
        scores = self.table.raw[inside] @ model.matrix + model.bias
        if self.centred is not None:
            scores += np.tensordot(model.weights, self.centred[:, :, inside], axes=1).T
        return softmax(scores)


@dataclass
class _Training:
    """One fit along the strengths."""

    path: _Path
    rows: _Rows
    held_out: np.ndarray
    """bool (N,)"""
    strengths: Sequence[float]
    done: int = 0
    """Number of strengths fitted"""

    def advance(self, wanted: Sequence[int]) -> list[np.ndarray]:
        model = self.path.fit(self.strengths[self.done])
        self.done += 1
        return [self.rows.predict_proba(model, self.held_out).astype(np.float32)]


class _Path:
    """Fits on the rows `inside`, bool (N,), each started from the previous solution."""

    def __init__(self, rows: _Rows, inside: np.ndarray) -> None:
        self.rows, self.inside = rows, inside
        # Made by the first fit: on a cluster each job makes all paths and fits one.
        self.standardisation: tuple[np.ndarray, np.ndarray] | None = None
        self.values: np.ndarray | None = None
        self.curvatures: tuple[np.ndarray, np.ndarray] | None = None

    def fit(self, strength: float) -> Coefficients:
        """Return the model of one strength."""
        table, centred, inside = self.rows.table, self.rows.centred, self.inside
        if self.standardisation is None:
            self.standardisation = table.standardisation(inside)
        centre, scale = self.standardisation
        # Rebuilt for each strength: the paths of all fits are open at once, and keeping a copy of the rows for each
        # would take too much memory.
        x = table.raw[inside]
        x -= centre
        x /= scale
        problem = _Problem(
            x=x.astype(self.rows.dtype, copy=False),
            pools=None if centred is None else centred[:, :, inside].reshape(table.members, -1),
            labels=table.labels[inside],
            classes=table.classes,
        )
        if self.values is None:
            self.values, self.curvatures = problem.start(self.rows.pools), problem.curvatures()
        assert self.curvatures is not None
        self.values = problem.minimise(strength, self.values, *self.curvatures)
        weights, matrix, bias = problem.split(self.values)
        matrix = matrix / scale[:, None]
        weights = weights.copy() if problem.free else np.zeros(table.members)
        return Coefficients(table.kind, weights, matrix, bias - centre @ matrix)


@dataclass(frozen=True)
class _Problem:
    """Mean log-loss plus ridge and prior, as a function of one vector of pool weights, matrix and bias.

    L-BFGS-B runs on variables of nearly equal curvature: the matrix in the directions of the features' principal
    components, each scaled by the inverse square root of its curvature at the start. All strengths share the
    decomposition.
    """

    x: np.ndarray
    """Float (N, F), standardised"""
    pools: np.ndarray | None
    """Float (M, C * N): centred log-probabilities; None in the plain form"""
    labels: np.ndarray
    """int64 (N,)"""
    classes: int

    @property
    def free(self) -> int:
        """Number of pool weights, which come first in the vector."""
        return 0 if self.pools is None else len(self.pools)

    @cached_property
    def columns(self) -> np.ndarray:
        """`x` as contiguous (F, N), in which scores take less time."""
        return np.ascontiguousarray(self.x.T)

    def start(self, pools: SharedFits) -> np.ndarray:
        """Return the starting vector: the log-linear pool, the limit of a strong ridge; zeros in the plain form."""
        values = np.zeros(self.free + (self.x.shape[1] + 1) * self.classes)
        if self.pools is not None:
            scores = self.pools.reshape(self.free, self.classes, -1).transpose(0, 2, 1)
            fit = partial(fit_log_linear, scores, self.labels)
            values[: self.free] = pools.result("log-linear pool", (self.pools, self.labels), fit).weights
        return values

    def curvatures(self) -> tuple[np.ndarray, np.ndarray]:
        """Return principal components (F, F) of the features and their mean squares (F,).

        Where the decomposition would take longer than the fits, the features themselves replace the components.
        """
        rows, width = self.x.shape
        if width**2 > DECOMPOSED * rows * self.classes:
            return np.eye(width), (self.x**2).mean(axis=0, dtype=np.float64)
        squares, components = np.linalg.eigh((self.x.T @ self.x).astype(np.float64) / rows)
        return components, np.maximum(squares, 0)

    def split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split a vector into pool weights (M,), matrix (F, C) and bias (C,)."""
        weights, rest = values[: self.free], values[self.free :]
        return weights, rest[: -self.classes].reshape(-1, self.classes), rest[-self.classes :]

    def minimise(self, strength: float, start: np.ndarray, components: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """Return the vector of least loss under a strength, starting from `start`.

        `components` (F, F) and `squares` (F,) are those of `curvatures`.
        """
        from scipy.optimize import minimize

        probabilities = self._probabilities(start)[0]
        spread = (probabilities * (1 - probabilities)).mean(axis=1) + SMALLEST_CURVATURE
        matrix_scale = 1 / np.sqrt(squares[:, None] * spread + strength)
        bias_scale = 1 / np.sqrt(spread + self._ridge_on_bias(strength))
        weight_scale = 1 / np.sqrt(self._pool_curvatures(probabilities) + SMALLEST_CURVATURE)
        last: dict[str, np.ndarray] = {}

        def values_of(point: np.ndarray) -> np.ndarray:
            weights, matrix, bias = self.split(point)
            parts = [weights * weight_scale, components @ (matrix * matrix_scale), bias * bias_scale]
            return np.concatenate([part.ravel() for part in parts])

        def loss_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
            last["values"] = values_of(point)
            loss, last["gradient"] = self.loss_and_gradient(last["values"], strength)
            weights, matrix, bias = self.split(last["gradient"])
            parts = [weights * weight_scale, (components.T @ matrix) * matrix_scale, bias * bias_scale]
            return loss, np.concatenate([part.ravel() for part in parts])

        def stop(point: np.ndarray) -> None:
            if self.slope(last["values"], last["gradient"]) <= TOLERANCE:
                raise StopIteration

        weights, matrix, bias = self.split(start)
        parts = [weights / weight_scale, (components.T @ matrix) / matrix_scale, bias / bias_scale]
        point = np.concatenate([part.ravel() for part in parts])
        bounds = [(0, None)] * self.free + [(None, None)] * (len(point) - self.free) if self.free else None
        options = {"maxiter": ITERATIONS, "gtol": 0, "ftol": 0}
        solution = minimize(
            loss_and_gradient, point, jac=True, method="L-BFGS-B", bounds=bounds, options=options, callback=stop
        )
        return values_of(solution.x)

    def slope(self, values: np.ndarray, gradient: np.ndarray) -> float:
        """Return the largest absolute gradient among coordinates that are not at an active bound."""
        free = gradient.copy()
        free[: self.free][(values[: self.free] <= 0) & (free[: self.free] > 0)] = 0
        return float(np.abs(free).max())

    def loss_and_gradient(self, values: np.ndarray, strength: float) -> tuple[float, np.ndarray]:
        """Return the mean loss with ridge and prior, and its gradient."""
        weights, matrix, bias = self.split(values)
        error, loss = self._probabilities(values)
        rows = len(self.labels)
        error[self.labels, np.arange(rows)] -= 1
        error /= rows
        ridge_on_bias = self._ridge_on_bias(strength)
        loss += 0.5 * strength * float((matrix**2).sum()) + 0.5 * ridge_on_bias * float((bias**2).sum())
        parts = [
            (error @ self.x).T + strength * matrix,
            error.sum(axis=1, dtype=np.float64) + ridge_on_bias * bias,
        ]
        if self.pools is not None:
            prior, slope, _ = scale_prior(float(weights.sum()), rows)
            loss += prior
            parts.insert(0, self.pools @ error.ravel() + slope)
        return loss, np.concatenate([part.ravel() for part in parts])

    def _ridge_on_bias(self, strength: float) -> float:
        """Return the penalty of the bias: 0 in the plain form, as usual; shrinkage to the pool includes the bias."""
        return strength if self.free else 0.0

    def _probabilities(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """Return probabilities (C, N) of the type of the rows, and their mean log-loss."""
        weights, matrix, bias = self.split(values.astype(self.x.dtype))
        scores = matrix.T @ self.columns
        scores += bias[:, None]
        if self.pools is not None:
            scores += (weights @ self.pools).reshape(scores.shape)
        scores -= scores.max(axis=0)
        label_scores = scores[self.labels, np.arange(len(self.labels))].sum(dtype=np.float64)
        np.exp(scores, out=scores)
        sums = scores.sum(axis=0)
        loss = (np.log(sums).sum(dtype=np.float64) - label_scores) / len(sums)
        scores /= sums
        return scores, float(loss)

    def _pool_curvatures(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the second derivatives (M,) of the mean loss with respect to the pool weights."""
        if self.pools is None:
            return np.zeros(0)
        weighted, rows = probabilities.ravel(), len(self.labels)
        curvatures: list[float] = []
        for scores in self.pools:
            means = (scores * weighted).reshape(self.classes, -1).sum(axis=0)
            curvatures.append(float((scores**2) @ weighted - (means**2).sum()) / rows)
        return np.maximum(curvatures, 0.0)  # rounding of float32 can make a curvature near 0 negative
