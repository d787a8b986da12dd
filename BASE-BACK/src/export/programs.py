"""Networks as `torch.export` programs: the format `exported_program`, and the input of the ONNX exporter `dynamo`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from utils.torchscript import exporter_without_notices

OLDEST_TORCH = (2, 13)
"""Oldest release that captures every network: 2.6 treats the batch size of CustomSwinTransformer as a constant."""
STACK_TRACE = "stack_trace"


def _has_old_torch(network: nn.Module) -> bool:
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH


def _has_images_of_any_size(network: nn.Module) -> bool:
    return any(set(axes) != {0} for axes in getattr(network, "free_axes", {}).values())


REFUSALS: dict[str, Callable[[nn.Module], bool]] = {
    f"torch {torch.__version__} cannot capture every network; expected {'.'.join(map(str, OLDEST_TORCH))} or newer": (
        _has_old_torch
    ),
    "it takes images of any height and width, which scripted code resizes": _has_images_of_any_size,
}
"""{reason: whether it keeps `torch.export` from capturing a network}; such networks are exported to ONNX by tracing."""


def refusal(network: nn.Module) -> str | None:
    """The reason why `torch.export` cannot capture a network; None if it can."""
    return next((reason for reason, applies in REFUSALS.items() if applies(network)), None)


def capture(network: nn.Module, example: tuple[Tensor, ...]) -> Any:
    """Capture a network in evaluation mode as a `torch.export.ExportedProgram` with a dynamic batch size.

    `example` holds one batch `(B, ...)` per input, B at least 2: a batch size of one is treated as a constant. Raises
    ValueError for a network that cannot be captured.
    """
    if reason := refusal(network):
        raise ValueError(f"torch.export cannot capture the network: {reason}")
    free = {0: torch.export.Dim("batch")}
    arguments = inspect.signature(network.forward).bind(*example).arguments
    shapes = {
        name: tuple(free for _ in value) if isinstance(value, tuple) else free for name, value in arguments.items()
    }
    with exporter_without_notices(), torch.no_grad():
        program = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
    # Files contain nothing that depends on the machine: no source paths, and no images.
    program.example_inputs = None
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop(STACK_TRACE, None)
    return program
