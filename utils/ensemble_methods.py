"""Score-level combiners: voting, which fits nothing, and what is fitted on the members' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners.greedy import GreedySelection
from utils.combiners.protocol import Combiner, Inputs, MemberFacts, unsaved
from utils.combiners.weighting import WeightedPool
from utils.core.config import Config
from utils.numeric import temperature
from utils.numeric.metrics import softmax

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Voting(Combiner):
    """A combiner that fits nothing. A subclass may have settings: fields that `configured` sets."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Nothing to set."""
        return cls()

    def fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Nothing to fit; logits (M, N, C), labels (N,), folds (N,)."""
        return self

    def restricted(self, used: np.ndarray) -> Self:
        """Itself: every member is as good as another."""
        return self

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Equal weights."""
        return {"weights": dict.fromkeys(names, 1 / len(names))}


class SoftVoting(Voting):
    """Plain mean of the members' probabilities."""

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return softmax(logits).mean(axis=0)

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import MeanOfProbabilities

        return MeanOfProbabilities()


class HardVoting(Voting):
    """Share of the members that vote for a class, each with one vote for the class of its largest logit.

    Equal shares are told apart by the mean probability, of which `TIE_SHARE` is mixed in: too little to change a
    share in the sixth digit, enough to decide a tie, and no class of a tied vote wins by its place in the alphabet.
    A member's own tie goes to its first class.
    """

    TIE_SHARE: ClassVar[float] = 5e-7

    is_discontinuous = True

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        members, rows, classes = logits.shape
        shares = np.zeros((rows, classes))
        votes = logits.argmax(axis=2)
        for member in range(members):
            shares[np.arange(rows), votes[member]] += 1 / members
        return (1 - self.TIE_SHARE) * shares + self.TIE_SHARE * softmax(logits).mean(axis=0)

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import VoteShares

        return VoteShares(self.TIE_SHARE)


@dataclass(kw_only=True)
class LogitAveraging(Combiner):
    """Soft-max of the plain mean of the members' logits: the normalised geometric mean of their probabilities.

    A temperature divides the mean where held-out folds gain by it, and with `per_member` each member's logits before.
    """

    settings: ClassVar[tuple[str, ...]] = ("runs.score_ensemble.temperature",)
    learns: ClassVar[bool] = True

    calibration: str = unsaved("auto")
    """auto, off or per_member"""
    temperature: float = unsaved(1.0)
    member_temperatures: np.ndarray = unsaved(factory=lambda: np.ones(1))
    """(M,), or one for all before it is fitted"""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the kind of temperature of `runs.score_ensemble`."""
        return cls(calibration=config.runs.score_ensemble.temperature)

    def fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Find the temperatures on logits (M, N, C), labels (N,), folds (N,); 1 with one fold or one class."""
        self.member_temperatures, self.temperature = np.ones(len(logits)), 1.0
        if self.calibration == "off" or min(len(np.unique(folds)), len(np.unique(labels))) < 2:
            return self
        if self.calibration == "per_member":
            self.member_temperatures = temperature.select_member_temperatures(logits, labels, folds)
        self.temperature = temperature.select_temperature(self._mean(logits), labels, folds).temperature
        return self

    def _mean(self, logits: np.ndarray) -> np.ndarray:
        divided = logits / self.member_temperatures[:, None, None]
        mean: np.ndarray = divided.mean(axis=0, dtype=np.float64)
        return mean

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        return softmax(self._mean(logits) / self.temperature)

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import ProbabilityOfMeanLogits

        return ProbabilityOfMeanLogits(self.temperature, self.member_temperatures)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """The temperatures, (1,) and (M,)."""
        return {"temperature": np.array([self.temperature]), "member_temperatures": self.member_temperatures}

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the temperatures."""
        self.temperature, self.member_temperatures = float(arrays["temperature"][0]), arrays["member_temperatures"]

    def restricted(self, used: np.ndarray) -> Self:
        """The same map on the used members' logits."""
        return replace(self, member_temperatures=self.member_temperatures[used])

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Equal weights, and the temperatures."""
        of_members = dict(zip(names, self.member_temperatures.tolist(), strict=True))
        return {
            "weights": dict.fromkeys(names, 1 / len(names)),
            "temperature": self.temperature,
            "member_temperatures": of_members if (self.member_temperatures != 1).any() else None,
        }


SAVED_AS: dict[str, type[Combiner]] = {
    "snapshot": SoftVoting,
    "uniform_soup": SoftVoting,
    "greedy_soup": SoftVoting,
    "wise_ft": SoftVoting,
    "distilled": SoftVoting,
}
"""Ensembles whose work was done in making their members: the one network, or the mean of a few, answers."""
COMBINERS: dict[str, type[Combiner]] = {
    "soft_voting": SoftVoting,
    "hard_voting": HardVoting,
    "logit_averaging": LogitAveraging,
    "weighted": WeightedPool,
    "greedy_selection": GreedySelection,
}
