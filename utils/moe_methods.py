"""Combiners that run only the members an image needs: a mixture of experts behind a gate, and a cascade.

Experts and chains are the members that greedy forward selection by log-loss selects first. The cost of a member is its
measured latency, else its size; if neither is known, better members come first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.combiners.gate_learners import SparseLearner
from utils.combiners.gates import SparseGate
from utils.combiners.protocol import Combiner, MemberFacts, NestedPredictions, unsaved
from utils.combiners.routing import SparseCombiner, routed_members
from utils.combiners.subset_search import SubsetProblem, greedy_forward
from utils.core.config import Config
from utils.numeric import temperature
from utils.numeric.metrics import ROUNDING, clipped_log, softmax
from utils.stacking_methods import Learner, Model, Stacker

if TYPE_CHECKING:
    from torch import nn

THRESHOLDS = np.append(1 - np.logspace(0, -4, 161), 2.0)
"""Confidence thresholds of a cascade, from always to never exiting; fixed, so that none equals a row's confidence."""


def best_members(logits: np.ndarray, labels: np.ndarray, *, count: int) -> tuple[int, ...]:
    """Return the indices of at most `count` members in the order of greedy selection by logits (M, N, C)."""
    names = tuple(map(str, range(len(logits))))
    problem = SubsetProblem(names, softmax(logits).astype(np.float32), labels, "log_loss", min(count, len(logits)))
    return greedy_forward(problem)[-1].members


def member_costs(members: MemberFacts) -> np.ndarray | None:
    """Return the cost of running each member (M,): milliseconds, else megabytes; None if neither is known for all."""
    complete = [costs for costs in (members.latency_ms, members.size_mb) if not np.isnan(costs).any()]
    return complete[0] if complete else None


@dataclass
class MixtureOfExperts(Stacker, SparseCombiner):
    """A few experts for each image, mixed by a gate that reads the cheapest of them (`utils.combiners.gates`).

    Nested cross-validation selects the number of epochs of the gate as for stackers. If held-out rows do not gain by a
    gate, the same `top_k` experts serve every image, if `runs.stacking.fallback` allows it. The members' mean has no
    weight, because it would need all members.
    """

    settings = ("runs.moe", "runs.stacking.fallback", "runs.score_ensemble.temperature", "device")
    is_discontinuous = True

    expert_use: dict[str, Any] = unsaved(factory=dict)
    """Use of the experts on the rows of the fit."""

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted mixture with the settings of `runs.moe`."""
        mixture = super().configured(config, members)
        assert isinstance(mixture.learner, SparseLearner)
        mixture.learner = replace(mixture.learner, costs=member_costs(members))
        mixture.fallback = False
        return mixture

    @classmethod
    def make_learner(cls, config: Config) -> Learner:
        moe = config.runs.moe
        choose = partial(best_members, count=moe.num_experts)
        allow_fixed = config.runs.stacking.fallback
        return SparseLearner(choose, moe.top_k, moe.gating_hidden_dim, moe.epochs, config.seed, allow_fixed)

    def _fit_nested(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> NestedPredictions:
        """Fit as a stacker does, and record the use of the experts."""
        nested = super()._fit_nested(logits, labels, folds)
        gate, has_run = self.gate, routed_members(self, logits)
        weights, scores = gate.weights(logits), gate.scores(logits)
        choices = gate.chosen(scores).mean(axis=0) / gate.top_k
        self.expert_use = {
            "expected_experts": float(has_run.sum(axis=0).mean()),
            "balance": float(len(gate.experts) * (choices * softmax(scores).mean(axis=0)).sum()),
            "runs": has_run[gate.experts].mean(axis=1),
            "weight": weights.mean(axis=0),
        }
        return nested

    @property
    def gate(self) -> SparseGate:
        """The fitted gate."""
        assert isinstance(self.model, SparseGate), "not fitted"
        return self.model

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """Return the expert that the gate reads, then those that it selects; see `SparseCombiner.route`."""
        return self.gate.route(logits, ran)

    def dense(self) -> Self:
        """Return an unfitted mixture that runs all experts for every image."""
        assert isinstance(self.learner, SparseLearner)
        learner = replace(self.learner, top_k=sys.maxsize)
        return type(self)(learner=learner, use_temperature=self.use_temperature, fallback=False, n_jobs=self.n_jobs)

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        return self._learner_module()

    def used(self, members: int) -> np.ndarray:
        """Return which of the members are experts, bool (M,)."""
        return np.isin(np.arange(members), self.gate.experts)

    def restricted(self, used: np.ndarray) -> Self:
        """Return the same combiner on the used members only."""
        gate = replace(self.gate, experts=(np.cumsum(used) - 1)[self.gate.experts])
        return replace(self, model=gate)

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the experts, the one that the gate reads, the mean number that run per image, and their use.

        `balance` is 1 if the experts are used evenly, and the number of experts if one serves all images.
        """
        stacker_report, gate = super().report(names), self.gate
        del stacker_report["share_of_stacker"], stacker_report["mean_temperature"]
        experts = [names[index] for index in gate.experts]
        use_by_expert = {
            name: {"runs": float(runs), "weight": float(weight)}
            for name, runs, weight in zip(experts, self.expert_use["runs"], self.expert_use["weight"], strict=True)
        }
        return {
            **stacker_report,
            "experts": experts,
            "gate_reads": experts[gate.reader],
            "top_k": gate.top_k,
            "is_fixed": stacker_report["setting"]["epochs"] == 0,
            "expected_experts": self.expert_use["expected_experts"],
            "balance": self.expert_use["balance"],
            "expert_use": use_by_expert,
        }

    def _learner_module(self) -> nn.Module:
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
    """Run members in turn, the cheapest first, until their mean is confident enough (Wang et al. 2022).

    A row exits with the mean of the members that have run once its largest probability is at least `threshold`. The
    threshold and the temperature are cross-validated over the folds of `fit`: the rows of a fold pass the chain that is
    selected without it. The threshold is the lowest from which upwards the accuracy is at most `max_accuracy_loss`
    below that of the whole chain. With a single fold, the rows that selected the chain are used, without a temperature.
    """

    settings: ClassVar[tuple[str, ...]] = ("runs.cascade", "runs.score_ensemble.temperature", "device")
    learns: ClassVar[bool] = True
    is_discontinuous: ClassVar[bool] = True

    costs: np.ndarray | None = unsaved()
    """float64 (M,): cost of running each member, in any unit; None if unknown"""
    max_members: int = unsaved(5)
    max_accuracy_loss: float = unsaved(0.005)
    use_temperature: bool = unsaved(True)
    chain: np.ndarray = unsaved(factory=lambda: np.empty(0, dtype=np.int64))
    """int64 (S,): indices of the members in the order in which they run"""
    threshold: float = unsaved(THRESHOLDS[-1])
    temperature: float = unsaved(1.0)
    facts: dict[str, Any] = unsaved(factory=dict)

    @classmethod
    def configured(cls, config: Config, members: MemberFacts) -> Self:
        """Return an unfitted cascade with the settings of `runs.cascade`."""
        cascade, use_temperature = config.runs.cascade, config.runs.score_ensemble.temperature != "off"
        return cls(member_costs(members), cascade.max_members, cascade.max_accuracy_loss, use_temperature)

    def dense(self) -> Self:
        """Return an unfitted cascade that runs the whole chain for every image."""
        return type(self)(self.costs, self.max_members, -1.0, self.use_temperature)

    def _fit(self, logits: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> None:
        """Fit on logits (M, N, C), labels (N,), folds (N,)."""
        fold_names = np.unique(folds)
        held_out_masks = [folds == name for name in fold_names] if len(fold_names) > 1 else []
        self.chain = self._select_chain(logits, labels)
        means = _running_means(logits[self.chain])
        for inside in held_out_masks:
            chain = self._select_chain(logits[:, ~inside], labels[~inside])
            means[:, inside] = _running_means(logits[chain][:, inside])
        hits = means.argmax(axis=2) == labels
        accuracies = np.array([_at_stage(hits, _exit_stages(means, threshold)).mean() for threshold in THRESHOLDS])
        too_low = np.flatnonzero(accuracies < accuracies[-1] - self.max_accuracy_loss - ROUNDING)
        # The last threshold loses no accuracy, so that there is a threshold above each that loses too much.
        self.threshold = float(THRESHOLDS[min(too_low[-1] + 1 if len(too_low) else 0, len(THRESHOLDS) - 1)])
        if self.threshold == 0:  # every row exits after the first member
            self.chain = self.chain[:1]
        stages = _exit_stages(means, self.threshold)
        if self.use_temperature and held_out_masks:
            scores = clipped_log(_at_stage(means, stages))
            self.temperature = temperature.select_temperature(scores, labels, folds).temperature
        else:
            self.temperature = 1.0
        self.facts = {
            "max_accuracy_loss": self.max_accuracy_loss,
            "accuracy_of_all": float(accuracies[-1]),
            "accuracy": float(_at_stage(hits, stages).mean()),
            "expected_experts": float(stages.mean() + 1),
            "leaves": np.bincount(stages, minlength=len(self.chain)) / len(labels),
        }

    def _predict_proba(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (N, C) for logits (M, N, C)."""
        means = _running_means(logits[self.chain])
        return self._tempered(_at_stage(means, _exit_stages(means, self.threshold)))

    def route(self, logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
        """Return the next member of the chain for rows that do not exit yet; see `SparseCombiner.route`."""
        stages = _exit_stages(_running_means(logits[self.chain]), self.threshold)
        requested = np.zeros(ran.shape, dtype=bool)
        next_stage = ran[self.chain].sum(axis=0)  # the chain runs in order
        # Logits of members that have not run do not matter: the exit stage of a row that exits is before them.
        rows = np.flatnonzero((stages >= next_stage) & (next_stage < len(self.chain)))
        requested[self.chain[next_stage[rows]], rows] = True
        return requested

    def _to_module(self) -> nn.Module:
        """Return the torch module: logits (B, M, C) -> probabilities (B, C)."""
        from utils.combiners.routing_heads import EarlyExit

        return EarlyExit(self.chain, self.threshold, self.temperature)

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the chain (S,), threshold (1,) and temperature (1,)."""
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
        """Return which of the members are in the chain, bool (M,)."""
        return np.isin(np.arange(members), self.chain)

    def restricted(self, used: np.ndarray) -> Self:
        """Return the same combiner on the used members only."""
        return replace(self, chain=(np.cumsum(used) - 1)[self.chain])

    def report(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the chain, its threshold, its accuracies, and the fraction of images that exits after each member."""
        chain = [names[index] for index in self.chain]
        exits = dict(zip(chain, self.facts["leaves"].tolist(), strict=True))
        settings = {"chain": chain, "threshold": self.threshold, "temperature": self.temperature, "weights": None}
        return {**self.facts, **settings, "leaves": exits}

    def _select_chain(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the indices (S,) of the chain, the cheapest first; of equally cheap members the better first."""
        chain = np.array(best_members(logits, labels, count=self.max_members), dtype=np.int64)
        return chain if self.costs is None else chain[np.argsort(self.costs[chain], kind="stable")]

    def _tempered(self, probabilities: np.ndarray) -> np.ndarray:
        if self.temperature == 1:
            return probabilities
        return softmax(clipped_log(probabilities) / self.temperature)


def _running_means(logits: np.ndarray) -> np.ndarray:
    """Return the mean probabilities (S, N, C) of the first 1, 2, ... S members of a chain with logits (S, N, C)."""
    return softmax(logits).cumsum(axis=0) / np.arange(1, len(logits) + 1)[:, None, None]


def _exit_stages(means: np.ndarray, threshold: float) -> np.ndarray:
    """Return the stage (N,) after which each row exits, from running means (S, N, C)."""
    exits = means.max(axis=2) >= threshold
    exits[-1] = True
    return exits.argmax(axis=0)


def _at_stage(values: np.ndarray, stages: np.ndarray) -> np.ndarray:
    """Return values (S, N, ...) at each row's stage (N,), as (N, ...)."""
    return values[stages, np.arange(len(stages))]


COMBINERS: dict[str, type[Combiner]] = {"moe": MixtureOfExperts, "cascade": CascadeCombiner}
