"""Averages and interpolations of the weights of several checkpoints of one architecture, with BatchNorm statistics.

Callers select the checkpoints and evaluate the result. Checkpoints are opened one at a time and read block by block, so
that memory does not grow with their number.

`torch.optim.swa_utils` differs: `AveragedModel` updates a running mean in the dtype of the parameters, while
`weighted_average` sums in float64; `update_bn` puts the whole model into training mode, including dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.core.display_text import first_names
from utils.core.errors import UserError

BLOCKS = 8  # blocks of a large network's weights; more blocks need less memory, but open files more often
BLOCK = 1 << 24  # minimum block size in bytes
COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var", COUNTER)
MOST_NAMED = 3  # tensors named in a message

T = TypeVar("T")


@dataclass(frozen=True)
class Ingredient:
    """The weights of one network."""

    name: str
    open: Callable[[], Mapping[str, Tensor]]
    """Returns the state dict; each call may read the file again, preferably as a memory map."""


def state_dict_differences(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """One line for each tensor in which two state dicts differ: missing, unexpected, shape, dtype."""
    lines = [f"{name} is missing" for name in first if name not in other]
    lines += [f"{name} is not in the first" for name in other if name not in first]
    for name in (name for name in first if name in other):
        expected, actual = (
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (first[name], other[name])
        )
        if actual != expected:
            lines.append(f"{name} is {actual}, expected {expected}")
    return lines


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_cosine(first: Ingredient, second: Ingredient) -> float:
    """Cosine similarity of two networks' weight matrices and kernels, each flattened to one vector.

    It is 1 for equal weights and near 0 for trained networks with independent random initialisations; networks with a
    common initialisation are in between. Biases, scales and running statistics are omitted, since their initial values
    are the same in any two networks.
    """
    first_weights, second_weights = first.open(), second.open()
    product = first_squares = second_squares = 0.0
    for name, tensor in first_weights.items():
        if tensor.is_floating_point() and tensor.ndim >= 2:
            first_vector, second_vector = (
                tensor.to(torch.float64).flatten(),
                second_weights[name].to(torch.float64).flatten(),
            )
            product += float(first_vector @ second_vector)
            first_squares += float(first_vector @ first_vector)
            second_squares += float(second_vector @ second_vector)
    norm = (first_squares * second_squares) ** 0.5
    return product / norm if norm else 0.0


def weighted_average(ingredients: Sequence[Ingredient], weights: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The weighted mean of state dicts, tensor by tensor, summed in float64, with the dtypes of the first one.

    `weights` are nonnegative integers, not all 0; by default all are 1, which gives the uniform soup (Wortsman et al.
    2022, Model soups). Two weights give a point on the line between two networks (Frankle et al. 2020; WiSE-FT:
    Wortsman et al. 2021). The mean of equal tensors is that tensor, bit for bit (for float64 tensors if the weights sum
    to a power of two). BatchNorm counters become the largest one; other integers and booleans must be equal. Raises
    UserError naming the tensors that differ in name, shape or dtype.
    """
    used = [pair for pair in zip(ingredients, weights or [1] * len(ingredients), strict=True) if pair[1]]
    template = {name: tensor.to("meta") for name, tensor in used[0][0].open().items()}
    average: dict[str, Tensor] = {}
    for number, names in enumerate(_blocks(template)):
        average |= _average_block(used, names, template, check=number == 0)
    return average


def _blocks(template: Mapping[str, Tensor]) -> list[list[str]]:
    """The names in order, in blocks of about equal size in bytes."""
    block_bytes = max(BLOCK, sum(tensor.nbytes for tensor in template.values()) / BLOCKS)
    blocks: list[list[str]] = [[]]
    size = 0
    for name, tensor in template.items():
        if blocks[-1] and size + tensor.nbytes > block_bytes:
            blocks.append([])
            size = 0
        blocks[-1].append(name)
        size += tensor.nbytes
    return blocks


def _average_block(
    used: Sequence[tuple[Ingredient, int]], names: Sequence[str], template: Mapping[str, Tensor], *, check: bool
) -> dict[str, Tensor]:
    """The named tensors of the mean; `check` first compares the names, shapes and dtypes of all tensors."""
    sums: dict[str, Tensor] = {}
    for ingredient, weight in used:
        state = ingredient.open()
        if check and (lines := state_dict_differences(template, state)):
            raise UserError(
                f"{ingredient.name}: its weights do not go together with those of {used[0][0].name}: "
                f"{first_names(lines, MOST_NAMED, '; ')}. Only checkpoints of one architecture and size can be averaged"
            )
        for name in names:
            tensor = state[name]
            if name not in sums:
                # Not added to zeros, which would turn -0.0 into 0.0.
                sums[name] = tensor.to(torch.float64) * weight if tensor.is_floating_point() else tensor.clone()
            elif tensor.is_floating_point():
                sums[name].add_(tensor, alpha=weight)
            elif name.endswith(COUNTER):
                sums[name] = torch.maximum(sums[name], tensor)
            elif not torch.equal(sums[name], tensor):
                raise UserError(
                    f"{ingredient.name}: {name} holds other {tensor.dtype} values than in {used[0][0].name}; there is "
                    "no mean of such values. Leave the checkpoint out"
                )
    total = sum(weight for _, weight in used)
    return {
        name: value.div_(total).to(template[name].dtype) if value.is_floating_point() else value
        for name, value in sums.items()
    }


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a network with running means and variances."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


def recompute_bn_statistics(
    model: nn.Module, train_loader: Iterable[tuple[Tensor, Any]], num_batches: int = 100
) -> int:
    """Recompute the statistics of all BatchNorm layers from the first `num_batches` batches of (images, labels).

    Averaged weights need new statistics, since their activations are not averages of the networks' activations. Each
    statistic is the mean over the batches (Izmailov et al. 2018, SWA). Only the BatchNorm layers are in training mode,
    since dropout and stochastic depth are off at inference. Batches should be shuffled and of equal size. The model is
    left in evaluation mode. Returns the number of batches used. Raises UserError if the loader yields no batch.
    """
    model.eval()
    layers = batch_norms(model)
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    device = next(model.parameters()).device
    n_batches = 0
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.training = True  # not train(), which would also enable dropout inside the layer
    try:
        with torch.no_grad():
            for images, _ in train_loader:
                if n_batches >= num_batches:
                    break
                model(images.to(device))
                n_batches += 1
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()
    if not n_batches:
        raise UserError("no batch to recompute the BatchNorm statistics from; expected images of the train split")
    return n_batches


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """The running means, variances and counters in a network's state dict, on the CPU."""
    state = model.state_dict()
    return {name: tensor.cpu() for name, tensor in state.items() if name.rpartition(".")[2] in STATISTICS}


def error_barrier(first: float, second: float, midpoint: float) -> float:
    """Error or loss at the midpoint between two networks' weights minus the mean of the two networks' errors or losses.

    Two networks with a barrier significantly above 0 are not linearly connected, and their average is worse than either
    (Frankle et al. 2020, Linear mode connectivity).
    """
    return midpoint - (first + second) / 2


def greedy_soup(ordered: Sequence[T], score: Callable[[tuple[T, ...]], Any]) -> list[tuple[T, Any, bool]]:
    """The greedy soup (Wortsman et al. 2022): each ingredient, best first, is added unless the score falls.

    Higher values of `score(ingredients)` are better; the first ingredient is always added. Returns (ingredient, score
    of the soup with it, whether it was added) in the order of the trials.
    """
    soup: tuple[T, ...] = (ordered[0],)
    best = score(soup)
    steps = [(ordered[0], best, True)]
    for ingredient in ordered[1:]:
        candidate = (*soup, ingredient)
        candidate_score = score(candidate)
        if is_added := not candidate_score < best:
            best, soup = candidate_score, candidate
        steps.append((ingredient, candidate_score, is_added))
    return steps
