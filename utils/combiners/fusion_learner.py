"""Training of fusion heads on blocks of embeddings in memory; rank and length of the training are left open.

The heads at several epochs of one training are settings that `utils.numeric.nested_cv` chooses from: early stopping on
rows that are held out, and never on those that a cross-fitted copy answers for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.core.errors import UserError
from utils.networks.memory import out_of_memory
from utils.numeric.metrics import softmax
from utils.numeric.nested_cv import evenly_spaced_epochs
from utils.predictions.rows import MemberOutputs

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("disease_pipeline")

STOPS = 6
WEIGHT_DECAY = 1.0  # of AdamW, as in utils/combiners/perceptron.py
RANKS = (16, 64)  # of bilinear products
STEPS, SMALLEST_BATCH = 16, 16  # of an epoch at least, as long as batches are not smaller: few rows need them


@dataclass(frozen=True)
class HeadShape:
    """What a head is built from."""

    method: str
    """A name of `fusion_heads.HEADS`"""
    widths: tuple[int, ...]
    """Of the blocks"""
    hidden: tuple[int, ...]
    classes: int
    rank: int
    """Of bilinear products; 0 where there are none"""

    def head(self, dropout: float = 0.0) -> nn.Module:
        """A head with random weights."""
        from utils.combiners.fusion_heads import HEADS

        return HEADS[self.method](self.widths, self.hidden, self.classes, dropout, self.rank)

    def cost(self) -> dict[str, int]:
        """Numbers that are learned, which is about how many multiplications an image takes."""
        from math import comb

        record = {"parameters": sum(values.numel() for values in self.head().parameters())}
        if self.rank:
            pairs = comb(len(self.widths), 2)
            full = sum(self.widths) ** 2 - sum(width**2 for width in self.widths)
            record |= {"pairs": pairs, "parameters_of_full_products": self.classes * full // 2}
        return record


@dataclass(frozen=True)
class TrainedHeads:
    """Trained heads of one shape, which differ by their seed; their mean probability is the answer."""

    shape: HeadShape
    weights: tuple[dict[str, np.ndarray], ...]
    """One set of named float32 arrays per seed."""

    def modules(self, dropout: float = 0.0) -> list[nn.Module]:
        """The heads as torch modules in evaluation mode; `dropout` for those that are trained further."""
        import torch

        heads = []
        for weights in self.weights:
            head = self.shape.head(dropout).eval().requires_grad_(False)
            head.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
            heads.append(head)
        return heads

    def predict_proba(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Outputs whose embeddings are blocks (N, R) -> probabilities float64 (N, C).

        `present` (N, M), for attention alone: which members there are.
        """
        return np.mean(
            [softmax(scores) for scores in self._each(outputs, lambda head, *arguments: head(*arguments), present)],
            axis=0,
        )

    def attention(self, outputs: MemberOutputs, present: np.ndarray | None = None) -> np.ndarray:
        """Attention's weights of the members, float64 (N, M)."""
        return np.mean(self._each(outputs, lambda head, *arguments: head.weights(*arguments), present), axis=0)

    def _each(self, outputs: MemberOutputs, call: Any, present: np.ndarray | None) -> list[np.ndarray]:
        import torch

        values = torch.from_numpy(np.concatenate(outputs.embeddings, axis=1).astype(np.float64))
        arguments = (values,) if present is None else (values, torch.from_numpy(present))
        # In double precision a row's answer does not depend on the other rows.
        with torch.no_grad():
            return [call(head.double(), *arguments).numpy() for head in self.modules()]


@dataclass(frozen=True)
class HeadLearner:
    """One training per rank and seed, stopped at several epochs."""

    method: str
    hidden: tuple[int, ...]
    epochs: int
    lr: float
    dropout: float
    label_smoothing: float
    seeds: int
    seed: int
    thread_safe: ClassVar[bool] = False  # torch's random numbers are the process's

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """Ranks by stops, the cheapest first."""
        return [{"rank": rank, "epochs": stop} for rank in self._ranks() for stop in self._stops()]

    def predictions(self, outputs: MemberOutputs, labels: np.ndarray, held_out: MemberOutputs) -> np.ndarray:
        """Probabilities float32 (G, H, C) of held-out blocks after trainings on the others; (M, N, C) as outputs."""
        by_setting = []
        for rank in self._ranks():
            shape = self._shape(outputs, rank)
            answers = [
                [
                    TrainedHeads(shape, (weights,)).predict_proba(held_out)
                    for weights in self._train(outputs, labels, shape, seed)
                ]
                for seed in self._seeds()
            ]
            by_setting += list(np.mean(answers, axis=0).astype(np.float32))  # over the seeds, at each stop
        return np.stack(by_setting)

    def fit(self, outputs: MemberOutputs, labels: np.ndarray, setting: Mapping[str, Any]) -> TrainedHeads:
        """The heads of all seeds under one setting: the same schedule, stopped where the setting says."""
        shape = self._shape(outputs, setting["rank"])
        stop = [setting["epochs"]]
        trained = [weights for seed in self._seeds() for weights in self._train(outputs, labels, shape, seed, stop)]
        return TrainedHeads(shape, tuple(trained))

    def _ranks(self) -> tuple[int, ...]:
        return RANKS if self.method == "bilinear" else (0,)

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)

    def _stops(self) -> list[int]:
        return evenly_spaced_epochs(self.epochs, STOPS)

    def _shape(self, outputs: MemberOutputs, rank: int) -> HeadShape:
        widths = tuple(embedding.shape[1] for embedding in outputs.embeddings)
        return HeadShape(self.method, widths, self.hidden, outputs.shape[2], rank)

    def _train(
        self,
        outputs: MemberOutputs,
        labels: np.ndarray,
        shape: HeadShape,
        seed: int,
        stops: Sequence[int] | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Named weights at each stop. Where memory runs out, training restarts with half as many rows at a time."""
        import torch

        from utils.numeric.module_training import BATCH_SIZE, cross_entropy, train_module

        inputs = torch.from_numpy(np.concatenate(outputs.embeddings, axis=1))
        truth = torch.from_numpy(np.asarray(labels))
        batch = min(BATCH_SIZE, max(SMALLEST_BATCH, len(inputs) // STEPS))
        while True:
            modules = train_module(
                lambda: shape.head(self.dropout),
                inputs,
                truth,
                epochs=self.epochs,
                checkpoint_epochs=stops or self._stops(),
                lr=self.lr,
                weight_decay=WEIGHT_DECAY,
                seed=seed,
                loss=partial(cross_entropy, label_smoothing=self.label_smoothing),
                batch_size=batch,
            )
            try:
                weights_at_stops = [
                    {name: values.detach().numpy().copy() for name, values in module.state_dict().items()}
                    for module in modules
                ]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if batch == 1:
                    raise UserError(
                        f"fusion_{self.method}: out of memory with one row at a time. Free memory, or make "
                        "runs.fusion.fusion_config.hidden_dims smaller"
                    ) from error
            else:
                yield from weights_at_stops
                return
            batch //= 2
            logger.warning("fusion_%s: out of memory; going on with %d rows at a time", self.method, batch)
