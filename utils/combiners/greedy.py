"""The greedy ensemble: members selected with replacement; held-out folds select their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from utils.combiners.pooled_members import PooledMembers
from utils.combiners.pooling import PIECEWISE_CONSTANT, tuning_rows
from utils.combiners.protocol import MemberFacts, unsaved
from utils.combiners.shared_fits import SharedFits
from utils.core.config import Config
from utils.numeric import temperature
from utils.numeric.metrics import METRICS, clipped_log, row_losses, softmax
from utils.numeric.selection import Selection, select_members

STEPS = 25
BAGS = 20
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Tried:
    """One variant of the selection, evaluated on held-out folds."""

    bags: int
    losses: Floats
    """(S,): loss of held-out rows when each bag keeps 1, 2, ... S members"""
    size: int
    """The smallest size whose loss is within one standard error of the least."""
    crossfit: Floats
    """Cross-fitted probabilities (N, C) at this size."""


@dataclass(kw_only=True)
class GreedySelection(PooledMembers):
    """Mean of members selected with replacement for the configured metric, with a sorted start.

    See `utils.numeric.selection`. The number of members is the smallest whose loss on held-out folds is within one
    standard error of the least. Bags of half the members each (Caruana et al. 2006), and a temperature, are used only
    if they lower the held-out loss. With accuracy and macro F1 many candidates tie: log-loss breaks the ties. At most
    `pooling.MAX_TUNING_ROWS` rows select number, bags and temperature; all rows select the members.
    """

    settings: ClassVar[tuple[str, ...]] = ("runs.score_ensemble.optimization_metric", "runs.score_ensemble.temperature")

    seed: int = unsaved(42)
    shared: SharedFits = unsaved(factory=SharedFits)

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted combiner with the metric and the kind of temperature of `runs.score_ensemble`."""
        settings = config.runs.score_ensemble
        return cls(metric=settings.optimization_metric, calibration=settings.temperature, seed=config.seed)

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on logits (M, N, C), labels (N,) and folds (N,).

        With one fold nothing can be held out: one selection without bags or temperature, which stops at its least loss.
        """
        testable = bool(np.ptp(folds))
        self.member_temperatures, self.temperature = np.ones(len(logits)), 1.0
        if testable and self.calibration == "per_member":
            self.member_temperatures = temperature.select_member_temperatures(logits, labels, folds)
        probabilities = np.exp(self._scores(logits)).astype(np.float32)
        if not testable:
            selection = self._select(probabilities, labels, bags=0)
            self._keep(selection, selection.paths[0].size, None, logits, labels)
            return
        sample = tuning_rows(labels, folds, scores_per_row=1)
        folds = folds[sample]
        variants = [self._tried(probabilities[:, sample], labels[sample], folds, bags=bags) for bags in (0, BAGS)]
        best = min(variants, key=lambda variant: variant.losses[variant.size - 1])  # ties go to the one without bags
        crossfit = best.crossfit
        if self.calibration != "off":
            scores = clipped_log(crossfit)
            choice = temperature.select_temperature(scores, labels[sample], folds)
            self.temperature, crossfit = choice.temperature, softmax(scores / choice.row_temperatures[:, None])
        selection = self._select(probabilities, labels, bags=best.bags)
        self._keep(selection, best.size, crossfit, logits[:, sample], labels[sample])
        if len(folds) < len(labels):
            self.facts["notes"].append(
                f"number, bags, temperature and scores by {len(folds):,} of {len(labels):,} rows"
            )
        self.facts["held_out_scores"] = self._scores_of(best.losses)

    def _select(self, probabilities: NDArray[np.float32], labels: np.ndarray, *, bags: int) -> Selection:
        options: dict[str, Any] = {
            "metric": self.metric,
            "steps": STEPS,
            "sorted_start": True,
            "bags": bags,
            "seed": self.seed,
            "tie_breaker": "log_loss" if self.metric in PIECEWISE_CONSTANT else None,
        }
        rows = probabilities, labels
        return self.shared.result(options, rows, lambda: select_members(*rows, **options))

    def _tried(self, probabilities: NDArray[np.float32], labels: np.ndarray, folds: np.ndarray, *, bags: int) -> _Tried:
        held_out = [folds == fold for fold in np.unique(folds)]
        shares = [
            self._select(probabilities[:, ~inside], labels[~inside], bags=bags).weights_by_size().astype(np.float32)
            for inside in held_out
        ]

        unseen = [probabilities[:, inside] for inside in held_out]

        def mixture(size: int) -> NDArray[np.float32]:  # one at a time: all sizes together are large
            mixed = np.empty(probabilities.shape[1:], dtype=np.float32)
            for inside, weights, values in zip(held_out, shares, unseen, strict=True):
                used = np.flatnonzero(weights[size - 1])  # few of hundreds of members
                mixed[inside] = np.tensordot(weights[size - 1, used], values[used], axes=1)
            return mixed

        losses = np.stack([row_losses(mixture(size), labels, self.metric) for size in range(1, STEPS + 1)])
        size = fewest_within_one_error(losses)
        return _Tried(bags, losses.mean(axis=1), size, mixture(size).astype(np.float64))

    def _keep(
        self, selection: Selection, size: int, crossfit: Floats | None, logits: np.ndarray, labels: np.ndarray
    ) -> None:
        """Set the weights to the members of the first `size` steps, and record their scores in `facts`."""
        self.weights = selection.weights_by_size()[size - 1]
        notes = (
            [] if crossfit is not None else ["one fold only: no early stop by held-out rows, no bags, no temperature"]
        )
        self.facts = {
            "size": size,
            "bags": [
                {"path": path.members[:size], "scores": self._scores_of(np.array(path.losses[:size]))}
                for path in selection.paths
            ],
            **self._compared(crossfit, logits, labels, notes),
        }

    def _scores_of(self, losses: Floats) -> list[float]:
        return (1 - losses if METRICS[self.metric].higher_is_better else losses).tolist()

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the report of `PooledMembers`, with the names and the score after each step of the path of each bag.

        `held_out_scores` are the scores on held-out folds when each bag keeps 1, 2, ... members.
        """
        record = super().report(names)
        if "bags" in record:
            record["bags"] = [{**bag, "path": [names[member] for member in bag["path"]]} for bag in record["bags"]]
        return record


def fewest_within_one_error(losses: Floats) -> int:
    """Return the first of sizes 1, 2, ... S whose mean loss is within one standard error of the least.

    Takes losses (S, N). The standard error is that of the mean of paired differences (one-standard-error rule, Breiman
    et al. 1984).
    """
    means = losses.mean(axis=1)
    differences = losses - losses[means.argmin()]
    errors = differences.std(axis=1, ddof=1 if losses.shape[1] > 1 else 0) / np.sqrt(losses.shape[1])
    return int(np.flatnonzero(differences.mean(axis=1) <= errors + 1e-12)[0]) + 1
