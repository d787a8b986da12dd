"""Training of small torch modules on whole tensors in memory: no loader, one thread, the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

BATCH = 128


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
    label_smoothing: float = 0.0,
    batch: int = BATCH,
) -> Iterator[nn.Module]:
    """Train the module that `make` builds on inputs (N, ...) and labels (N,); yields it at each of the epochs `stops`.

    The module gives scores (N, C) whose soft-max are probabilities. AdamW (Loshchilov and Hutter 2019) with a cosine
    schedule over `epochs`, whether or not the training is stopped before; `batch` rows at a time. What is yielded is
    trained on afterwards: take from it what is needed.
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
            # Gathered once per epoch into the same memory: batches are views, and nothing is copied between two steps.
            values, truths = torch.empty_like(inputs), torch.empty_like(labels)
            parts = list(zip(values.tensor_split(batches), truths.tensor_split(batches), strict=True))
            for epoch in range(1, max(stops) + 1):
                order = torch.randperm(len(inputs))
                torch.index_select(inputs, 0, order, out=values)
                torch.index_select(labels, 0, order, out=truths)
                for part, truth in parts:
                    for group in optimizer.param_groups:
                        group["lr"] = lr * (1 + math.cos(math.pi * step / (epochs * batches))) / 2
                    optimizer.zero_grad(set_to_none=True)
                    scores = module(part)
                    nn.functional.cross_entropy(scores, truth, label_smoothing=label_smoothing).backward()
                    optimizer.step()
                    step += 1
                if epoch in stops:
                    yield module
    finally:
        torch.set_num_threads(threads)
