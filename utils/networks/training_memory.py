"""Memory of a training step: measured, and reduced by activation checkpointing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FRACTION = 0.5  # of the total memory; the rest is for images, other arrays and other processes
COPIES = 4  # of the weights: parameters, gradients and the two moments of AdamW
CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_budget(device: str) -> int:
    """Bytes that training may use: a fraction of the total memory of the device, the machine or its control group.

    It does not depend on free memory, which changes from run to run, so that a resumed training behaves the same.
    """
    if torch.device(device).type == "cuda":
        return int(FRACTION * torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in CONTROL_GROUPS if path.is_file()]
    return int(FRACTION * min([total, *(int(limit) for limit in limits if limit.isdigit())]))


def training_state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, their gradients and AdamW's state."""
    return COPIES * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that one forward pass saves for its backward pass, each storage counted once.

    `forward` runs the model and returns the tensor to differentiate; parameters are not counted. Buffers and random
    number generators are restored.
    """
    saved: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _restored(model), torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = forward()  # kept alive until all storages are counted, so that no address is reused
        n_bytes = sum(saved.values())
        del result
    return n_bytes


def checkpointable_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that can be recomputed: the elements with submodules of the network's outermost sequences."""
    blocks: list[nn.Module] = []
    queue = [model]
    while queue:
        module = queue.pop(0)
        for child in module.children():
            is_block = isinstance(module, nn.Sequential | nn.ModuleList) and any(True for _ in child.children())
            if is_block and any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList):
                blocks.append(child)
            else:
                queue.append(child)
    return blocks


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[int]:
    """Activation checkpointing of the model's `checkpointable_blocks` (Chen et al. 2016) within the context.

    Each block saves only its inputs and is recomputed in the backward pass. Gradients, BatchNorm statistics and dropout
    are those of a step without checkpointing. Yields the number of blocks.
    """
    blocks = checkpointable_blocks(model)
    for block in blocks:
        block.forward = _checkpointed(block)  # removed below
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            del block.forward  # restores the method of the class


def _checkpointed(block: nn.Module) -> Callable[..., Tensor]:
    original: Callable[..., Tensor] = block.forward

    def forward(*inputs: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return original(*inputs, **options)
        output: Tensor = checkpoint(
            original, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _restored(block)), **options
        )
        return output

    return forward


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """On exit, restore the random generators and the model's buffers, which forward passes in training mode update."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(before[name])  # through `data`, which bypasses autograd's check for in-place changes
