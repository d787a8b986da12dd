"""Score-level combiners: votes, which fit nothing, calibrated votes, weighted pools and greedy selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners.calibrated_votes import CalibratedBestSingle, CalibratedLogitAveraging, CalibratedSoftVoting
from utils.combiners.greedy import GreedySelection
from utils.combiners.protocol import Combiner, Inputs, MemberFacts, unsaved
from utils.combiners.weighting import WeightedPool
from utils.core.config import Config
from utils.numeric.metrics import softmax

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Voting(Combiner):
    """A combiner that fits nothing. A subclass may have settings: fields that `configured` sets."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return a new combiner; it has no settings."""
        return cls()

    def _fit(self, logits: Inputs, labels: np.ndarray, folds: np.ndarray) -> None:
        """Do nothing, since there is nothing to fit."""

    def restricted(self, used: np.ndarray) -> Self:
        """Return itself, since all members count equally."""
        return self

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return equal weights."""
        return {"weights": dict.fromkeys(names, 1 / len(names))}


class SoftVoting(Voting):
    """Mean of the members' probabilities."""

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""
        return softmax(logits).mean(axis=0)

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import MeanOfProbabilities

        return MeanOfProbabilities()


class HardVoting(Voting):
    """Fraction of the members that vote for each class; a member votes for the class of its largest logit.

    The mean probability is mixed in with weight `TIE_WEIGHT`, which breaks ties and leaves the first six digits of the
    fractions unchanged. A member with equal largest logits votes for the first of these classes.
    """

    TIE_WEIGHT: ClassVar[float] = 5e-7

    is_discontinuous = True

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""
        members, rows, classes = logits.shape
        fractions = np.zeros((rows, classes))
        votes = logits.argmax(axis=2)
        for member in range(members):
            fractions[np.arange(rows), votes[member]] += 1 / members
        return (1 - self.TIE_WEIGHT) * fractions + self.TIE_WEIGHT * softmax(logits).mean(axis=0)

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import VoteShares

        return VoteShares(self.TIE_WEIGHT)


@dataclass(kw_only=True)
class LogitAveraging(Voting):
    """Softmax of the mean of the members' logits: the normalised geometric mean of their probabilities.

    Temperatures are 1 except in ensembles that an earlier version saved with fitted ones.
    """

    temperature: float = unsaved(1.0)
    member_temperatures: np.ndarray = unsaved(factory=lambda: np.ones(1))
    """(M,), or a single one for all members"""

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""
        mean = (logits / self.member_temperatures[:, None, None]).mean(axis=0, dtype=np.float64)
        return softmax(mean / self.temperature)

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.heads import ProbabilityOfMeanLogits

        return ProbabilityOfMeanLogits(self.temperature, self.member_temperatures)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the temperatures, (1,) and (M,), if any is not 1."""
        if self.temperature == 1 and (self.member_temperatures == 1).all():
            return {}
        return {"temperature": np.array([self.temperature]), "member_temperatures": self.member_temperatures}

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the temperatures."""
        if arrays:
            self.temperature, self.member_temperatures = float(arrays["temperature"][0]), arrays["member_temperatures"]

    def restricted(self, used: np.ndarray) -> Self:
        """Return the same combiner on the used members only."""
        return replace(self, member_temperatures=self.member_temperatures[used]) if self.fitted_arrays() else self


SAVED_AS: dict[str, type[Combiner]] = {
    "snapshot": SoftVoting,
    "uniform_soup": SoftVoting,
    "greedy_soup": SoftVoting,
    "wise_ft": SoftVoting,
    "distilled": SoftVoting,
    "tta": SoftVoting,
}
"""{method that creates networks: combiner of these networks, which is their mean}"""
COMBINERS: dict[str, type[Combiner]] = {
    "soft_voting": SoftVoting,
    "hard_voting": HardVoting,
    "logit_averaging": LogitAveraging,
    "soft_voting_calibrated": CalibratedSoftVoting,
    "logit_averaging_calibrated": CalibratedLogitAveraging,
    "best_single_calibrated": CalibratedBestSingle,
    "weighted": WeightedPool,
    "greedy_selection": GreedySelection,
}
