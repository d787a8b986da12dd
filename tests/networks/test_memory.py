"""Memory between networks: what running out of it looks like, and what a deleted network leaves."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from utils.networks import memory


def test_out_of_memory_is_known_on_every_device():
    message = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
    assert memory.out_of_memory(RuntimeError(message))
    assert memory.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert memory.out_of_memory(MemoryError())
    assert not memory.out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_a_deleted_network_holds_no_values_even_where_it_is_still_referred_to():
    model = nn.BatchNorm2d(7)
    memory.safe_delete_model(model)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) == 0


def test_a_network_in_a_reference_cycle_is_collected():
    model = nn.Linear(2, 2)
    model.cycle = [model]
    left = weakref.ref(model)
    del model
    assert left() is not None
    memory.cleanup_memory([left])
    assert left() is None
