"""Training of small torch modules on whole tensors in memory: no loader, one thread, the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

BATCH = 128
GATHERED = 2**20  # bytes of rows that are brought together at a time, where a batch is smaller
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, inputs, labels) of one batch -> what is minimised."""


def cross_entropy(module: nn.Module, inputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Of the module's scores (B, C); a share of each label may be spread over the classes (Szegedy et al. 2016)."""
    return nn.functional.cross_entropy(module(inputs), labels, label_smoothing=label_smoothing)


def train(
    make: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    stops: Sequence[int],
    lr: float,
    weight_decay: float,
    seed: int,
    loss: Loss = cross_entropy,
    batch: int = BATCH,
) -> Iterator[nn.Module]:
    """Train the module that `make` builds on inputs (N, ...) and labels (N,); yields it at each of the epochs `stops`.

    The module gives scores (N, C) whose soft-max are probabilities, unless the `loss` says otherwise. AdamW (Loshchilov
    and Hutter 2019) with a cosine schedule over `epochs`, whether or not the training is stopped before; `batch` rows
    at a time. What is yielded is trained on afterwards: take from it what is needed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order on every machine's cores
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            module = make().train()
            batches = max(1, len(inputs) // batch)
            optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
            step = 0
            # Several batches are gathered at once, into memory that is used again and stays in the processor's cache.
            sizes = [len(rows) for rows in torch.arange(len(inputs)).tensor_split(batches)]
            at_once = max(1, GATHERED // (max(sizes) * inputs[0].nbytes + 1))
            groups = [sizes[place : place + at_once] for place in range(0, batches, at_once)]
            together = [sum(group) for group in groups]
            values, truths = inputs[: max(together)].clone(), labels[: max(together)].clone()
            for epoch in range(1, max(stops) + 1):
                for rows, group in zip(torch.randperm(len(inputs)).split(together), groups, strict=True):
                    torch.index_select(inputs, 0, rows, out=values[: len(rows)])
                    torch.index_select(labels, 0, rows, out=truths[: len(rows)])
                    parts = values[: len(rows)].split(group), truths[: len(rows)].split(group)
                    for part, truth in zip(*parts, strict=True):
                        for options in optimizer.param_groups:
                            options["lr"] = lr * (1 + math.cos(math.pi * step / (epochs * batches))) / 2
                        optimizer.zero_grad(set_to_none=True)
                        loss(module, part, truth).backward()
                        optimizer.step()
                        step += 1
                if epoch in stops:
                    yield module
    finally:
        torch.set_num_threads(threads)
