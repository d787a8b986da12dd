"""Heads of fold networks that share the trunk of their full network: their outputs follow from stored embeddings.

One pass of the full network serves all folds.
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

AGREES = 0.02  # of the largest logit: on CUDA networks run in bfloat16, with a precision of eight bits


@dataclass(frozen=True)
class LinearHead:
    """Logits of embeddings (N, D) are `embeddings @ weight.T + bias`."""

    weight: np.ndarray
    """float32 (C, D)"""
    bias: np.ndarray
    """float32 (C,)"""

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """float32 (N, C)"""
        return np.asarray(embeddings, dtype=np.float32) @ self.weight.T + self.bias


def read(workspace: Workspace, member: Member, stages: tuple[str, ...]) -> tuple[LinearHead, list[LinearHead]] | None:
    """The full network's head and those of its fold networks; None where a head is more than one linear layer.

    Outputs are in the network's order. Raises UserError where a fold's trunk is not the full network's.
    """
    full = state_dict_of(read_checkpoint(member.network(workspace).checkpoint))
    heads = []
    for stage in stages:
        path = member.network(workspace, stage=stage).checkpoint
        record = read_checkpoint(path)
        if stage == stages[0] or trunk_of(path, record) != member.trunk:
            network_weights(path, record)  # raises for another trunk than the full network's
        head = _linear(state_dict_of(record))
        if head is None:
            return None
        heads.append(head)
    final = _linear({name: full[name] for name in state_dict_of(record)}) if heads else None
    return None if final is None else (final, heads)


def _linear(tensors: Mapping[str, Any]) -> LinearHead | None:
    """The one linear layer that these tensors are; None if they are anything else."""
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if len(tensors) != 2 or parts.keys() != {"weight", "bias"} or parts["weight"].ndim != 2:
        return None
    return LinearHead(parts["weight"].float().numpy(), parts["bias"].float().numpy())


def explains(head: LinearHead, logits: np.ndarray, embeddings: np.ndarray, columns: list[int]) -> bool:
    """Whether a head gives the logits (N, C) from the embeddings (N, D); `columns` are the classes' outputs."""
    if embeddings.shape[1] != head.weight.shape[1]:
        return False
    logits = np.asarray(logits)
    difference = np.abs(head.logits(embeddings)[:, columns] - logits).max(initial=0.0)
    return bool(difference <= AGREES * max(1.0, float(np.abs(logits).max(initial=0.0))))
