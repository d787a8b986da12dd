"""What a training step keeps in memory, measured, and the way to keep less: blocks computed twice instead of kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SHARE = 0.5  # of the memory that there is; the rest is for images, other arrays and whoever else is at work
COPIES = 4  # of the weights: themselves, their gradients, and the two moments of AdamW
CONTROL_GROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_budget(device: str) -> int:
    """Bytes that a training may fill: of what the device, the machine or its control group has, not of what is free.

    What is free changes from run to run, and with it a training that was interrupted would go on in another way.
    """
    if torch.device(device).type == "cuda":
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in CONTROL_GROUPS if path.is_file()]
    return int(SHARE * min([total, *(int(limit) for limit in limits if limit.isdigit())]))


def training_state_bytes(model: nn.Module) -> int:
    """Bytes of the parameters with all that AdamW keeps beside them."""
    return COPIES * sum(own.numel() * own.element_size() for own in model.parameters())


def activation_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that one forward pass keeps for its backward pass, each storage counted once.

    `forward` runs the model and gives what is differentiated; parameters are not counted. Buffers and random numbers
    are as they were afterwards.
    """
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _as_it_was(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # kept until all is counted, so that no storage is freed and its place taken by another
        found = sum(kept.values())
        del result
    return found


def checkpointable_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that can be computed twice: those with parts of their own in the outermost sequences of the network."""
    found: list[nn.Module] = []
    waiting = [model]
    while waiting:
        module = waiting.pop(0)
        for child in module.children():
            is_part = isinstance(module, nn.Sequential | nn.ModuleList) and any(True for _ in child.children())
            if is_part and any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList):
                found.append(child)
            else:
                waiting.append(child)
    return found


@contextmanager
def activation_checkpointing(model: nn.Module) -> Iterator[int]:
    """Activation checkpointing of the model's `checkpointable_blocks` within the context (Chen et al. 2016).

    Each block keeps its inputs alone and is computed again in the backward pass.

    Gradients, BatchNorm's statistics and dropout are those of a plain step. Gives the number of blocks.
    """
    parts = checkpointable_blocks(model)
    for part in parts:
        part.forward = _twice(part)  # type: ignore[method-assign]
    try:
        yield len(parts)
    finally:
        for part in parts:
            del part.forward  # the class's own is found again


def _twice(part: nn.Module) -> Callable[..., Tensor]:
    once = part.forward

    def forward(*given: Tensor, **named: object) -> Tensor:
        if not torch.is_grad_enabled():
            return once(*given, **named)  # type: ignore[no-any-return]
        return checkpoint(  # type: ignore[no-any-return]
            once, *given, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_it_was(part)), **named
        )

    return forward


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model's buffers, which a forward pass in training mode moves, put back at the end; random numbers as well."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.data.copy_(before[name])  # unseen by the check for changes since the forward pass
