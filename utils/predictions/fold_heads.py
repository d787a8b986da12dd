"""Fold networks that share the trunk of their full network: their outputs are computed from stored embeddings.

One pass of the full network suffices for all folds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.core.workspace import Workspace
from utils.networks.checkpoints import read_checkpoint, state_dict_of
from utils.networks.shared_trunks import network_weights, trunk_of
from utils.predictions.catalog import Member

AGREES = 0.02  # relative to the largest logit: on CUDA, networks run in bfloat16 with eight bits of precision


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier: the logits of embeddings (N, D) are `embeddings @ weight.T + bias`."""

    weight: np.ndarray
    """float32 (C, D)"""
    bias: np.ndarray
    """float32 (C,)"""

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """Logits, float32 (N, C), of embeddings (N, D)."""
        return np.asarray(embeddings, dtype=np.float32) @ self.weight.T + self.bias


def read(workspace: Workspace, member: Member, stages: tuple[str, ...]) -> tuple[LinearHead, list[LinearHead]] | None:
    """Read the heads of the full network and of its fold networks; None if a head is not a single linear layer.

    Outputs are in the network's order. Raises UserError if a fold's trunk differs from the full network's.
    """
    full = state_dict_of(read_checkpoint(member.network(workspace).checkpoint))
    heads = []
    for stage in stages:
        path = member.network(workspace, stage=stage).checkpoint
        record = read_checkpoint(path)
        if stage == stages[0] or trunk_of(path, record) != member.trunk:
            network_weights(path, record)  # raises if the trunk differs from the full network's
        head = _linear(state_dict_of(record))
        if head is None:
            return None
        heads.append(head)
    final = _linear({name: full[name] for name in state_dict_of(record)}) if heads else None
    return None if final is None else (final, heads)


def _linear(tensors: Mapping[str, Any]) -> LinearHead | None:
    """The linear layer with these tensors; None if they are not those of one linear layer."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if len(tensors) != 2 or parts.keys() != {"weight", "bias"} or parts["weight"].ndim != 2:
        return None
    return LinearHead(parts["weight"].float().numpy(), parts["bias"].float().numpy())


def explains(head: LinearHead, logits: np.ndarray, embeddings: np.ndarray, columns: list[int]) -> bool:
    """Whether the head's logits of the embeddings (N, D) equal `logits` (N, C); `columns` are the classes' outputs."""
    if embeddings.shape[1] != head.weight.shape[1]:
        return False
    logits = np.asarray(logits)
    difference = np.abs(head.logits(embeddings)[:, columns] - logits).max(initial=0.0)
    return bool(difference <= AGREES * max(1.0, float(np.abs(logits).max(initial=0.0))))
