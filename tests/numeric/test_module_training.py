"""The training loop: rows gathered in groups change nothing about the training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from utils.numeric import module_training


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (5, 3), (300, 7), (900, 300), (900, 2500)])
def test_it_is_the_training_by_plain_batches_bit_for_bit(rows, width):
    torch.manual_seed(0)
    inputs, labels = torch.randn(rows, width), torch.randint(0, 3, (rows,))
    options = {"epochs": 3, "checkpoint_epochs": [2], "seed": 1, "lr": 0.01, "weight_decay": 1.0}
    (found,) = module_training.train_module(lambda: nn.Linear(width, 3), inputs, labels, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    module = nn.Linear(width, 3)
    batches, step = max(1, rows // module_training.BATCH_SIZE), 0
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=1.0, fused=True)
    for _ in range(2):
        for places in torch.randperm(rows).tensor_split(batches):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (1 + math.cos(math.pi * step / (3 * batches))) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[places]), labels[places]).backward()
            optimizer.step()
            step += 1
    torch.set_num_threads(threads)
    assert torch.equal(found.weight, module.weight)
    assert torch.equal(found.bias, module.bias)
