"""Train small torch modules on tensors in memory: no data loader, one thread, reproducible to the byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from utils.numeric.setting_paths import FIT_THREADS, torch_threads

BATCH_SIZE = 128
GATHER_BYTES = 2**20  # bytes of rows that one gather copies if a batch is smaller
Trained = TypeVar("Trained", bound=nn.Module)
BatchLoss = Callable[[Any, Tensor, Tensor], Tensor]
"""(module, inputs, labels) of one batch -> the loss to minimise."""


def cross_entropy(module: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the module's logits (B, C)."""
    return nn.functional.cross_entropy(module(inputs), labels)


def train_module(
    make_module: Callable[[], Trained],
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    checkpoint_epochs: Sequence[int],
    lr: float,
    weight_decay: float,
    seed: int,
    loss: BatchLoss = cross_entropy,
) -> Iterator[Trained]:
    """Train a module on inputs (N, ...) and labels (N,); yield it after each of the `checkpoint_epochs`.

    `make_module` is called after the random number generator is seeded. The module returns logits (B, C) unless the
    `loss` expects something else. AdamW (Loshchilov and Hutter 2019) with a cosine schedule over `epochs`, even if the
    last checkpoint comes earlier. Training continues on the yielded module: copy what you need before the next
    iteration.
    """
    # One thread: the same order of summation for any number of cores.
    with torch_threads(FIT_THREADS), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        module = make_module().train()
        n_batches = max(1, len(inputs) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        step = 0
        # One gather serves several batches and reuses its buffer, which stays in the processor's cache.
        batch_sizes = [len(rows) for rows in torch.arange(len(inputs)).tensor_split(n_batches)]
        per_gather = max(1, GATHER_BYTES // (max(batch_sizes) * inputs[0].nbytes + 1))
        groups = [batch_sizes[first : first + per_gather] for first in range(0, n_batches, per_gather)]
        group_sizes = [sum(group) for group in groups]
        input_buffer, label_buffer = inputs[: max(group_sizes)].clone(), labels[: max(group_sizes)].clone()
        for epoch in range(1, max(checkpoint_epochs) + 1):
            for rows, group in zip(torch.randperm(len(inputs)).split(group_sizes), groups, strict=True):
                torch.index_select(inputs, 0, rows, out=input_buffer[: len(rows)])
                torch.index_select(labels, 0, rows, out=label_buffer[: len(rows)])
                batches = input_buffer[: len(rows)].split(group), label_buffer[: len(rows)].split(group)
                for batch_inputs, batch_labels in zip(*batches, strict=True):
                    for parameters in optimizer.param_groups:
                        parameters["lr"] = lr * (1 + math.cos(math.pi * step / (epochs * n_batches))) / 2
                    optimizer.zero_grad(set_to_none=True)
                    loss(module, batch_inputs, batch_labels).backward()
                    optimizer.step()
                    step += 1
            if epoch in checkpoint_epochs:
                yield module
