"""Combiners that run only the members an image needs: a mixture of experts behind a gate, and a cascade.

Experts and chains are members that greedy forward selection takes first for log-loss. What a member costs is its
measured latency, else its size, else nothing is known and the better come first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners.gating import GateLearner, SparseGate
from utils.combiners.protocol import Combiner, MemberFacts, unsaved
from utils.combiners.routing import SparseCombiner, routed_members
from utils.combiners.subset_search import SubsetProblem, greedy_forward
from utils.core.config import Config
from utils.numeric import temperature
from utils.numeric.metrics import SMALLEST_PROBABILITY, softmax
from utils.stacking_methods import Learner, Model, Stacker

if TYPE_CHECKING:
    from torch import nn

THRESHOLDS = np.append(1 - np.logspace(0, -4, 161), 2.0)
"""Of a cascade: from stopping at once to never. Fixed, so that no row of the fit lies on the one that is chosen."""
ROUNDING = 1e-12


def best_members(logits: np.ndarray, labels: np.ndarray, *, count: int) -> tuple[int, ...]:
    """Places of `count` of M members, all where there are fewer, as greedy selection takes them by logits (M, N, C)."""
    names = tuple(map(str, range(len(logits))))
    problem = SubsetProblem(names, softmax(logits).astype(np.float32), labels, "log_loss", min(count, len(logits)))
    return greedy_forward(problem)[-1].members


def member_costs(members: MemberFacts) -> np.ndarray | None:
    """What running each of the members costs (M,): milliseconds, else megabytes; None where neither is known of all."""
    known = [costs for costs in (members.latency_ms, members.size_mb) if not np.isnan(costs).any()]
    return known[0] if known else None


@dataclass
class MixtureOfExperts(Stacker, SparseCombiner):
    """A few experts for each image, mixed by a gate that reads the cheapest of them (`utils.combiners.gating`).

    How long the gate is trained, if at all, is decided by nested folds as for stackers: where held-out rows do not gain
    by a gate, the same `top_k` experts serve every image (`runs.stacking.fallback` allows it). There is no share of the
    plain mean, for which all members would have to run.
    """

    settings = ("runs.moe", "runs.stacking.fallback", "runs.score_ensemble.temperature", "device")
    is_discontinuous = True

    expert_use: dict[str, Any] = unsaved(factory=dict)
    """How the rows of the fit are spread over the experts."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the settings of `runs.moe`."""
        found = super().configured(config, members)
        assert isinstance(found.learner, GateLearner)
        found.learner = replace(found.learner, costs=member_costs(members))
        found.fallback = False
        return found

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        own = config.runs.moe
        choose = partial(best_members, count=own.num_experts)
        fixed = config.runs.stacking.fallback
        return GateLearner(choose, own.top_k, own.gating_hidden_dim, own.epochs, config.seed, fixed)

    def fit_crossfitted(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """As a stacker does; keeps beside it how the rows are spread over the experts."""
        unseen = super().fit_crossfitted(logits, labels, folds)
        gate, ran = self.gate, routed_members(self, logits)
        weights, scores = gate.weights(logits), gate.scores(logits)
        choices = gate.chosen(scores).mean(axis=0) / gate.top_k
        self.expert_use = {
            "expected_experts": float(ran.sum(axis=0).mean()),
            "balance": float(len(gate.experts) * (choices * softmax(scores).mean(axis=0)).sum()),
            "runs": ran[gate.experts].mean(axis=1),
            "weight": weights.mean(axis=0),
        }
        return unseen

    @property
    def gate(self) -> SparseGate:
        """The fitted gate."""
        assert isinstance(self.model, SparseGate), "not fitted"
        return self.model

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """First the expert that the gate reads, then those that it chooses; see `routing.Sparse.route`."""
        return self.gate.route(logits, ran)

    def dense(self) -> Self:
        """Unfitted, with all experts for every image."""
        assert isinstance(self.learner, GateLearner)
        every = replace(self.learner, top_k=sys.maxsize)
        return type(self)(learner=every, use_temperature=self.use_temperature, fallback=False, n_jobs=self.n_jobs)

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        return self._module()

    def used(self, members: int) -> np.ndarray:
        """The experts, bool (M,)."""
        return np.isin(np.arange(members), self.gate.experts)

    def restricted(self, used: np.ndarray) -> Self:
        """The same over the used members alone."""
        gate = replace(self.gate, experts=(np.cumsum(used) - 1)[self.gate.experts])
        return replace(self, model=gate)

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Experts, which of them the gate reads, how many run per image, and the table of their use.

        `balance` is 1 where choices and probabilities are spread evenly, and the number of experts where one has all.
        """
        found, gate = super().report(names), self.gate
        del found["share_of_stacker"]
        experts = [names[place] for place in gate.experts]
        table = {
            name: {"runs": float(runs), "weight": float(weight)}
            for name, runs, weight in zip(experts, self.expert_use["runs"], self.expert_use["weight"], strict=True)
        }
        return {
            **found,
            "experts": experts,
            "gate_reads": experts[gate.reader],
            "top_k": gate.top_k,
            "is_fixed": found["setting"]["epochs"] == 0,
            "expected_experts": self.expert_use["expected_experts"],
            "balance": self.expert_use["balance"],
            "expert_use": table,
        }

    def _module(self) -> nn.Module:
        from utils.combiners.routing_heads import SparseMixture

        gate = self.gate
        layers = (gate.matrices[0], gate.biases[0], gate.matrices[1], gate.biases[1])
        return SparseMixture(gate.experts, gate.reader, gate.top_k, layers, self.calibration.temperature)

    def _arrays(self) -> dict[str, np.ndarray]:
        gate = self.gate
        return {
            "experts": gate.experts,
            "reader": np.array([gate.reader]),
            "top_k": np.array([gate.top_k]),
            "hidden_matrix": gate.matrices[0],
            "hidden_bias": gate.biases[0],
            "scores_matrix": gate.matrices[1],
            "scores_bias": gate.biases[1],
        }

    @classmethod
    def _model(cls, state: Mapping[str, np.ndarray]) -> Model:
        return SparseGate(
            state["experts"],
            int(state["reader"][0]),
            int(state["top_k"][0]),
            (state["hidden_matrix"], state["scores_matrix"]),
            (state["hidden_bias"], state["scores_bias"]),
        )


@dataclass
class CascadeCombiner(SparseCombiner):
    """Members one after the other, the cheapest first, until their mean is sure enough (Wang et al. 2022).

    A row leaves with the plain mean of the members that have run, once its largest probability is at least `threshold`.
    Chain, threshold and temperature are judged by the folds given to `fit`: the rows of a fold pass the chain that was
    chosen without it, and of the thresholds from which upwards no more accuracy is lost than `max_accuracy_loss`,
    against running all of the chain, the lowest is taken. With one fold the rows that chose the chain decide, and there
    is no temperature.
    """

    settings: ClassVar[tuple[str, ...]] = ("runs.cascade", "runs.score_ensemble.temperature", "device")
    learns: ClassVar[bool] = True
    is_discontinuous: ClassVar[bool] = True

    costs: np.ndarray | None = unsaved()
    """float64 (M,): what running a member costs, in any unit; None where nobody knows"""
    max_members: int = unsaved(5)
    max_accuracy_loss: float = unsaved(0.005)
    use_temperature: bool = unsaved(True)
    chain: np.ndarray = unsaved(factory=lambda: np.empty(0, dtype=np.int64))
    """int64 (S,): places among the M members in the order in which they run"""
    threshold: float = unsaved(THRESHOLDS[-1])
    temperature: float = unsaved(1.0)
    facts: dict[str, Any] = unsaved(factory=dict)

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """With the settings of `runs.cascade`."""
        own, use_temperature = config.runs.cascade, config.runs.score_ensemble.temperature != "off"
        return cls(member_costs(members), own.max_members, own.max_accuracy_loss, use_temperature)

    def dense(self) -> Self:
        """Unfitted, with all of the chain for every image."""
        return type(self)(self.costs, self.max_members, -1.0, self.use_temperature)

    def fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> Self:
        """Fit on logits (M, N, C), labels (N,), folds (N,)."""
        numbers = np.unique(folds)
        parts = [folds == number for number in numbers] if len(numbers) > 1 else []
        self.chain = self._chosen(logits, labels)
        means = _running(logits[self.chain])
        for inside in parts:
            means[:, inside] = _running(logits[self._chosen(logits[:, ~inside], labels[~inside])][:, inside])
        hits = means.argmax(axis=2) == labels
        accuracies = np.array([_of_stage(hits, _leaves(means, threshold)).mean() for threshold in THRESHOLDS])
        loses = np.flatnonzero(accuracies < accuracies[-1] - self.max_accuracy_loss - ROUNDING)
        # The last threshold loses nothing, so that there is one above whatever loses too much.
        self.threshold = float(THRESHOLDS[min(loses[-1] + 1 if len(loses) else 0, len(THRESHOLDS) - 1)])
        if self.threshold == 0:  # nobody waits for the others
            self.chain = self.chain[:1]
        leaves = _leaves(means, self.threshold)
        answers = np.log(np.maximum(_of_stage(means, leaves), SMALLEST_PROBABILITY))
        calibrate = self.use_temperature and bool(parts)
        self.temperature = temperature.select_temperature(answers, labels, folds).temperature if calibrate else 1.0
        self.facts = {
            "max_accuracy_loss": self.max_accuracy_loss,
            "accuracy_of_all": float(accuracies[-1]),
            "accuracy": float(_of_stage(hits, leaves).mean()),
            "expected_experts": float(leaves.mean() + 1),
            "leaves": np.bincount(leaves, minlength=len(self.chain)) / len(labels),
        }
        return self

    def predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Logits (M, N, C) -> probabilities (N, C)."""
        means = _running(logits[self.chain])
        return self._tempered(_of_stage(means, _leaves(means, self.threshold)))

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """The next of the chain for rows that are not sure yet; as `utils.combiners.routing.Sparse.route`."""
        leaves = _leaves(_running(logits[self.chain]), self.threshold)
        wanted, own = np.zeros(ran.shape, dtype=bool), ran[self.chain]
        following = own.sum(axis=0)  # the chain runs in its order, so that this is the place of the next one
        # What has not run is not looked at: a row that leaves does so among those that have.
        rows = np.flatnonzero((leaves >= following) & (following < len(self.chain)))
        wanted[self.chain[following[rows]], rows] = True
        return wanted

    def to_module(self) -> nn.Module:
        """Logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.routing_heads import EarlyExit

        return EarlyExit(self.chain, self.threshold, self.temperature)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """The chain (S,), threshold and temperature (1,)."""
        return {
            "chain": self.chain,
            "threshold": np.array([self.threshold]),
            "temperature": np.array([self.temperature]),
        }

    def set_fitted_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the chain, threshold and temperature."""
        self.chain = arrays["chain"]
        self.threshold, self.temperature = (float(arrays[name][0]) for name in ("threshold", "temperature"))

    def used(self, members: int) -> np.ndarray:
        """The chain, bool (M,)."""
        return np.isin(np.arange(members), self.chain)

    def restricted(self, used: np.ndarray) -> Self:
        """The same over the used members alone."""
        return replace(self, chain=(np.cumsum(used) - 1)[self.chain])

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The chain, its threshold, what it loses, and which share of the images leaves after which member."""
        chain = [names[place] for place in self.chain]
        leaves = dict(zip(chain, self.facts["leaves"].tolist(), strict=True))
        kept = {"chain": chain, "threshold": self.threshold, "temperature": self.temperature, "weights": None}
        return {**self.facts, **kept, "leaves": leaves}

    def _chosen(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Places (S,) of the members of the chain, the cheapest first; of equally cheap ones the better first."""
        found = np.array(best_members(logits, labels, count=self.max_members), dtype=np.int64)
        return found if self.costs is None else found[np.argsort(self.costs[found], kind="stable")]

    def _tempered(self, probabilities: np.ndarray) -> np.ndarray:
        if self.temperature == 1:
            return probabilities
        return softmax(np.log(np.maximum(probabilities, SMALLEST_PROBABILITY)) / self.temperature)


def _running(logits: np.ndarray) -> np.ndarray:
    """Logits (S, N, C) of a chain -> plain means (S, N, C) of the first 1, 2, ... S members' probabilities."""
    return softmax(logits).cumsum(axis=0) / np.arange(1, len(logits) + 1)[:, None, None]


def _leaves(means: np.ndarray, threshold: float) -> np.ndarray:
    """The stage (N,) after which each row leaves, given running means (S, N, C)."""
    sure = means.max(axis=2) >= threshold
    sure[-1] = True
    return sure.argmax(axis=0)


def _of_stage(values: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """Values (S, N, ...) at each row's stage (N,) -> (N, ...)."""
    return values[stages, np.arange(len(stages))]


COMBINERS: dict[str, type[Combiner]] = {"moe": MixtureOfExperts, "cascade": CascadeCombiner}
