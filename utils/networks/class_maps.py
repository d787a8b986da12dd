"""Class-activation maps for any architecture: which positions of an image the logit of a class depends on.

HiResCAM (Draelos and Carin 2020): the positive part of the product of a layer's outputs and the gradient of the logit,
summed over channels. Before global pooling and a linear head this is CAM (Zhou et al. 2016), and Grad-CAM (Selvaraju et
al. 2017) up to its averaging of the gradient. The mean of all logits is subtracted from the logit, since only
differences of logits affect the prediction. Probing selects the layer: the last one with at least `FINE_GRID` positions
per side whose effective receptive fields (Luo et al. 2016), measured by gradients of the input, are local. If it is a
feature map, the logits must depend on the image only through it; for the tokens of a vision transformer the layer is
often the input of the first attention, since later layers mix all positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils.core.errors import UserError

FINE_GRID = 7  # positions per side; with 4 x 4, deletion is no better than chance (benchmarks/maps.py)
SEEN_NEAR = 0.9
"""Minimum share of a position's input gradient within a quarter of the image's side around it. Selected on photographs
from the training data of networks; with a lower share, deletion is no better than chance."""
LEAST_GRID = 4  # positions per side; a coarser map does not localise
MOST_PREFIX = 8  # class, distillation and register tokens before the patch tokens
TOKENS = "BNC"
WITHOUT_FEATURES = (nn.Dropout, nn.Softmax)  # may return attention weights between positions


class NoMapError(UserError):
    """A network has no layer from which a map can be computed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}. Leave it out, or run without --maps")
        self.reason = reason


class _Call(NamedTuple):
    """One call of a layer in a forward pass."""

    layer: nn.Module
    number: int
    """Index of the layer's call in the forward pass, from 0"""


class ClassMaps:
    """Maps (B, h, w) of a network for one class per image; values are at least 0 and sum to 1."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model.eval()
        self.name = name
        self._call: _Call | None = None

    def probe(self, images: Tensor) -> None:
        """Select the layer on a few images (B, 3, S, S).

        Raises NoMapError for a network without a grid of positions that its logits depend on.
        """
        layers = [layer for layer in self.model.modules() if not isinstance(layer, WITHOUT_FEATURES)]
        logits, calls, inputs = self._recorded(images, layers)
        grid_calls = [(call, output) for call, output in calls if _grid(output, images) is not None]
        score = _relative(logits, logits.argmax(dim=1))
        gradients = (
            torch.autograd.grad(score, [output for _, output in grid_calls], retain_graph=True, allow_unused=True)
            if grid_calls
            else ()
        )
        deciding = [
            (call, output)
            for (call, output), gradient in zip(grid_calls, gradients, strict=True)
            if gradient is not None and bool(_positions(output * gradient, images).abs().sum() > 0)
        ]
        self._call = self._chosen(images, inputs, deciding)
        if self._call is not None:
            return
        raise NoMapError(
            self.name,
            f"no layer with a grid of {LEAST_GRID} x {LEAST_GRID} positions or more that its logits depend on, so it "
            "has no class-activation map",
        )

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Maps (B, h, w) of the logits of the classes `targets` (B,) for images (B, 3, S, S), after `probe`."""
        assert self._call is not None, "probe comes first"
        logits, calls, _ = self._recorded(images, [self._call.layer])
        output = dict(calls)[self._call]
        (gradient,) = torch.autograd.grad(_relative(logits, targets), [output])
        maps = _positions(output * gradient, images).detach().float().clamp_min(0)
        total = maps.sum(dim=(1, 2), keepdim=True)
        uniform = torch.full_like(maps, 1 / maps[0].numel())  # for images without positive evidence
        return torch.where(total > 0, maps / total.clamp_min(torch.finfo(torch.float32).tiny), uniform)

    def _chosen(self, images: Tensor, inputs: Tensor, deciding: list[tuple[_Call, Tensor]]) -> _Call | None:
        """Select the call to map among those with a grid that the logits depend on; None without any.

        Locality decreases from layer to layer, so bisection finds the number of local layers.
        """
        low, high = 0, len(deciding)
        while low < high:
            middle = (low + high) // 2
            if _seen_near(deciding[middle][1], inputs) >= SEEN_NEAR:
                low = middle + 1
            else:
                high = middle
        for least_side, candidates in ((FINE_GRID, deciding[:low]), (LEAST_GRID, deciding)):
            for call, output in reversed(candidates):
                layout, side = _grid(output, images) or ("", 0)
                if side >= least_side and (layout == TOKENS or self._passes_all(images, call)):
                    return call
        return deciding[-1][0] if deciding else None  # networks with parallel branches up to the last feature map

    def _passes_all(self, images: Tensor, call: _Call) -> bool:
        """Whether the logits depend on the image only through the output of this call."""
        logits, _, inputs = self._recorded(images, [call.layer], cut=call)
        if not logits.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(logits.sum(), [inputs], allow_unused=True)
        return gradient is None

    def _recorded(
        self, images: Tensor, layers: list[nn.Module], *, cut: _Call | None = None
    ) -> tuple[Tensor, list[tuple[_Call, Tensor]], Tensor]:
        """Run the network; returns logits with graph, the outputs of all calls of the layers in order, and the input.

        The output of the call `cut` is detached.
        """
        calls: list[tuple[_Call, Tensor]] = []
        counts: dict[nn.Module, int] = {}

        def record(layer: nn.Module, _: Any, output: Any) -> Any:
            number = counts[layer] = counts.get(layer, -1) + 1
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            calls.append((_Call(layer, number), output))
            return output.detach() if cut == calls[-1][0] else None

        handles = [layer.register_forward_hook(record) for layer in layers]
        try:
            with torch.enable_grad():
                # With a gradient of the input, every output has one, even if the weights are frozen.
                inputs = images.detach().clone().requires_grad_()
                logits: Tensor = self.model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return logits, calls, inputs


def _relative(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over images of the target logit minus the mean logit."""
    return (logits.gather(1, targets[:, None])[:, 0] - logits.mean(dim=1)).sum()


def _grid(output: Tensor, images: Tensor) -> tuple[str, int] | None:
    """Layout (`BCHW`, `BHWC` or `BNC`) and side length of a layer's grid of positions; None without a square grid."""
    side, shape = images.shape[3], tuple(output.shape)
    if shape[0] != len(images):
        return None
    if output.ndim == 4:
        layout, grid = ("BCHW", shape[2]) if shape[2] == shape[3] else ("BHWC", shape[1])
        is_square = shape[2] == shape[3] or shape[1] == shape[2]
        return (layout, grid) if is_square and LEAST_GRID <= grid <= side else None
    if output.ndim != 3:
        return None
    grid = math.isqrt(shape[1])
    is_grid = grid >= LEAST_GRID and side % grid == 0 and shape[1] - grid * grid <= MOST_PREFIX
    return (TOKENS, grid) if is_grid else None


def _seen_near(output: Tensor, inputs: Tensor) -> float:
    """The share of the absolute input gradient near a position of the output, averaged over nine positions."""
    layout_and_side = _grid(output, inputs)
    assert layout_and_side is not None, "only outputs with a grid are kept"
    layout, grid = layout_and_side
    side = inputs.shape[3]
    pixels = torch.arange(side, device=inputs.device) + 0.5
    signs = torch.ones(output.shape[1 if layout == "BCHW" else -1], device=output.device)
    signs[::2] = -1  # so that channels do not cancel out, as they do after a normalisation
    indices = (grid // 4, grid // 2, 3 * grid // 4)
    shares = []
    for row in indices:
        for column in indices:
            if layout == TOKENS:
                at_place = output[:, output.shape[1] - grid * grid + row * grid + column]
            else:
                at_place = output[:, :, row, column] if layout == "BCHW" else output[:, row, column]
            (gradient,) = torch.autograd.grad((at_place * signs).sum(), [inputs], retain_graph=True)
            depends = gradient.abs().sum(dim=(0, 1))
            down, across = ((pixels - (index + 0.5) * side / grid).abs() <= side / 4 for index in (row, column))
            local = depends[down][:, across].sum()
            shares.append(float(local / depends.sum().clamp_min(torch.finfo(torch.float32).tiny)))
    return sum(shares) / len(shares)


def _positions(products: Tensor, images: Tensor) -> Tensor:
    """Sums over the channels at each position, (B, h, w)."""
    layout_and_side = _grid(products, images)
    assert layout_and_side is not None, "only outputs with a grid are kept"
    layout, grid = layout_and_side
    if layout == TOKENS:
        return products[:, products.shape[1] - grid * grid :].sum(dim=2).reshape(len(products), grid, grid)
    return products.sum(dim=1 if layout == "BCHW" else 3)
