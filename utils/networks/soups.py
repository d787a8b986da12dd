"""Weights of several checkpoints of one architecture as one network: averages, interpolations, normalisation anew.

Numbers alone: which checkpoints, and whether the result is any better, is the business of whoever calls. Checkpoints
are opened one at a time and read block by block, so that memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.core.errors import UserError

BLOCKS = 8  # of a large network's weights; the more, the less memory, and the more often files are opened
BLOCK = 1 << 24  # bytes that no block falls short of
COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var", COUNTER)
NAMED = 3  # tensors that a message names

T = TypeVar("T")


@dataclass(frozen=True)
class Ingredient:
    """The weights of one network."""

    name: str
    open: Callable[[], Mapping[str, Tensor]]
    """Gives the state dictionary; each call may read the file again, best as a memory map."""


def state_dict_differences(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """In which tensors two state dictionaries do not go together, one line for each: missing, surplus, shape, type."""
    lines = [f"{name} is missing" for name in first if name not in other]
    lines += [f"{name} is not in the first" for name in other if name not in first]
    for name in (name for name in first if name in other):
        kinds = [
            (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in (first[name], other[name])
        ]
        if kinds[0] != kinds[1]:
            found, expected = (f"{kind} {list(shape)}" for shape, kind in reversed(kinds))
            lines.append(f"{name} is {found}, expected {expected}")
    return lines


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_cosine(first: Ingredient, second: Ingredient) -> float:
    """Cosine between two networks' weight matrices and kernels, taken as one vector.

    1 for equal weights, near 0 for networks that began with different random numbers, however well both were trained;
    what began with the same ones keeps a part of them. Biases, scales and running statistics, which begin alike in any
    two networks, say nothing of that and are left out.
    """
    one, other = first.open(), second.open()
    product = squares = other_squares = 0.0
    for name, tensor in one.items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            left, right = tensor.to(torch.float64).flatten(), other[name].to(torch.float64).flatten()
            product += float(left @ right)
            squares += float(left @ left)
            other_squares += float(right @ right)
    length = (squares * other_squares) ** 0.5
    return product / length if length else 0.0


def weighted_average(ingredients: Sequence[Ingredient], shares: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The weighted mean of state dictionaries, tensor by tensor, summed in float64 and kept in the type of the first.

    `shares` are whole numbers of at least 0, not all 0; without them all count alike, which is the uniform soup
    (Wortsman et al. 2022, Model soups). Two shares give a point on the line between two networks (Frankle et al. 2020;
    WiSE-FT: Wortsman et al. 2021). Equal tensors give that tensor, bit by bit (in double
    precision where the shares sum to a power of two). The counters of BatchNorm become the
    largest one; other integers and booleans must be equal. Raises UserError that names the tensors which differ in
    name, shape or type.
    """
    used = [pair for pair in zip(ingredients, shares or [1] * len(ingredients), strict=True) if pair[1]]
    form = {name: tensor.to("meta") for name, tensor in used[0][0].open().items()}
    mixed: dict[str, Tensor] = {}
    for number, names in enumerate(_blocks(form)):
        mixed |= _mixed_block(used, names, form, check=number == 0)
    return mixed


def _blocks(form: Mapping[str, Tensor]) -> list[list[str]]:
    """The names in their order, in parts of about equal size in bytes."""
    most = max(BLOCK, sum(tensor.nbytes for tensor in form.values()) / BLOCKS)
    blocks: list[list[str]] = [[]]
    size = 0
    for name, tensor in form.items():
        if blocks[-1] and size + tensor.nbytes > most:
            blocks.append([])
            size = 0
        blocks[-1].append(name)
        size += tensor.nbytes
    return blocks


def _mixed_block(
    used: Sequence[tuple[Ingredient, int]], names: Sequence[str], form: Mapping[str, Tensor], *, check: bool
) -> dict[str, Tensor]:
    """Some tensors of the mean; `check` looks at all of every checkpoint's form first."""
    sums: dict[str, Tensor] = {}
    for ingredient, share in used:
        weights = ingredient.open()
        if check and (lines := state_dict_differences(form, weights)):
            more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
            raise UserError(
                f"{ingredient.name}: its weights do not go together with those of {used[0][0].name}: "
                f"{'; '.join(lines[:NAMED])}{more}. Only checkpoints of one architecture and size can be averaged"
            )
        for name in names:
            tensor = weights[name]
            if name not in sums:
                # Multiplied, not added to zeros, which would turn -0.0 into 0.0.
                sums[name] = tensor.to(torch.float64) * share if tensor.is_floating_point() else tensor.clone()
            elif tensor.is_floating_point():
                sums[name].add_(tensor, alpha=share)
            elif name.endswith(COUNTER):
                sums[name] = torch.maximum(sums[name], tensor)
            elif not torch.equal(sums[name], tensor):
                raise UserError(
                    f"{ingredient.name}: {name} holds other {tensor.dtype} values than in {used[0][0].name}; there is "
                    "no mean of such values. Leave the checkpoint out"
                )
    total = sum(share for _, share in used)
    return {
        name: value.div_(total).to(form[name].dtype) if value.is_floating_point() else value
        for name, value in sums.items()
    }


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a network that keep running means and variances."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def recompute_bn_statistics(
    model: nn.Module, train_loader: Iterable[tuple[Tensor, Any]], num_batches: int = 100
) -> int:
    """Means and variances of all BatchNorm layers anew, from the first batches of (images, labels); returns how many.

    Averaged weights do not have the averages of their parts' activations. Every statistic is the plain mean over the
    batches (Izmailov et al. 2018, SWA), not a running mean that remembers the old one. Only these layers are in
    training mode meanwhile: dropout and stochastic depth are off when the network answers, so the statistics must be
    those without them. Batches should be shuffled and of one size. The model is left in evaluation mode. Raises
    UserError when the loader gives no batch.
    """
    model.eval()
    layers = batch_norms(model)
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    device = next(model.parameters()).device
    seen = 0
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True  # not train(), which reaches a dropout inside the layer
    try:
        with torch.no_grad():
            for images, _ in train_loader:
                if seen >= num_batches:
                    break
                model(images.to(device))
                seen += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
    if not seen:
        raise UserError("no batch to recompute the BatchNorm statistics from; expected images of the train split")
    return seen


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The running means, variances and counters among a network's state, on the CPU."""
    state = model.state_dict()
    return {name: tensor.cpu() for name, tensor in state.items() if name.rpartition(".")[2] in STATISTICS}


def error_barrier(first: float, second: float, midpoint: float) -> float:
    """Error or loss in the middle of the line between two networks above the mean of its ends.

    Above 0 by more than noise: they lie in different basins, and their average is worse than either (Frankle et al.
    2020, Linear mode connectivity).
    """
    return midpoint - (first + second) / 2


def greedy_soup(ordered: Sequence[T], score: Callable[[tuple[T, ...]], Any]) -> list[tuple[T, Any, bool]]:
    """The greedy soup (Wortsman et al. 2022): each ingredient, best first, is added unless the score falls.

    `score` of a tuple of ingredients, higher is better; the first is taken as it is. Returns (ingredient, score of the
    soup with it, whether it was kept) in the order in which they were tried.
    """
    best = score((ordered[0],))
    kept = (ordered[0],)
    steps = [(ordered[0], best, True)]
    for ingredient in ordered[1:]:
        found = score((*kept, ingredient))
        if is_kept := not found < best:
            best, kept = found, (*kept, ingredient)
        steps.append((ingredient, found, is_kept))
    return steps
