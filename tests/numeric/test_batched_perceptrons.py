"""Perceptrons that are trained side by side: each is the training of it alone."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from utils.numeric.batched_perceptrons import BatchedPerceptrons, FitRows, batch_shape
from utils.numeric.batched_training import Schedule

SIZES = [12, 24, 8, 5]
N = 420
SEED = 3


@pytest.fixture
def table():
    torch.manual_seed(0)
    return torch.randn(N, SIZES[0]), torch.randint(0, SIZES[-1], (N,))


def fits():
    """Three fits of 300, 298 and 297 rows, two batches of up to 150 rows each, filled up to 152."""
    rng = np.random.default_rng(1)
    found = []
    for count in (300, 298, 297):
        rows = np.sort(rng.permutation(N)[:count])
        found.append(FitRows(rows, rng.normal(size=SIZES[0]), rng.uniform(0.5, 2, SIZES[0])))
    return found


def trained(table, chosen, *, dropout=0.0, epochs=3):
    batched = BatchedPerceptrons(*table, chosen, SIZES, Schedule(4, 0.01, 1.0, dropout), seed=SEED)
    batched.run_to(epochs)
    return batched


def reference(table, fit, *, dropout, epochs=3):
    """The same training by modules and autograd; the factors of dropout come from the generator that a fit has."""
    noise = np.random.SFC64(SEED)
    generator = torch.Generator().manual_seed(SEED)
    layers = [nn.Linear(*pair) for pair in pairwise(SIZES)]
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    inputs = (table[0][fit.rows] - torch.tensor(fit.centre)) / torch.tensor(fit.scale)
    inputs, labels, batches, step = inputs.float(), table[1][fit.rows], batch_shape(len(fit.rows)).n_batches, 0
    optimizer = torch.optim.AdamW([values for layer in layers for values in layer.parameters()], weight_decay=1.0)

    def dropped(values):
        size = values.numel()
        drawn = noise.random_raw(-(-size // 4)).view(np.int16)[:size].reshape(values.shape)
        share = round(dropout * 2**16) / 2**16
        return values * torch.from_numpy(drawn >= round(share * 2**16) - 2**15) / (1 - share)

    for _ in range(epochs):
        for places in torch.randperm(len(inputs), generator=generator).tensor_split(batches):
            values = inputs[places]
            for layer in layers[:-1]:
                values = torch.relu(layer(values))
                values = dropped(values) if dropout else values
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / (4 * batches))) / 2
            optimizer.zero_grad()
            nn.functional.cross_entropy(layers[-1](values), labels[places]).backward()
            optimizer.step()
            step += 1
    return layers


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_each_is_the_training_of_it_alone_by_autograd(table, dropout):
    chosen = fits()
    batched = trained(table, chosen, dropout=dropout)
    for number, fit in enumerate(chosen):
        matrices, biases = batched.layers(number)
        layers = reference(table, fit, dropout=dropout)
        matrices[0] = matrices[0] * fit.scale[:, None]
        biases[0] = biases[0] + (fit.centre / fit.scale) @ matrices[0]
        for layer, matrix, bias in zip(layers, matrices, biases, strict=True):
            np.testing.assert_allclose(matrix, layer.weight.detach().numpy().T, atol=2e-5)
            np.testing.assert_allclose(bias, layer.bias.detach().numpy(), atol=2e-5)


def test_the_fits_beside_it_change_no_byte(table):
    chosen = fits()
    together = trained(table, chosen, dropout=0.3)
    for number, fit in enumerate(chosen):
        alone = trained(table, [fit], dropout=0.3)
        assert torch.equal(alone.values[0], together.values[number])
        rows = np.arange(50)
        assert alone.predict(0, rows).tobytes() == together.predict(number, rows).tobytes()


def test_fits_that_stop_change_no_byte_of_the_others(table):
    chosen = fits()
    batched = trained(table, chosen, dropout=0.3, epochs=1)
    batched.keep([0, 2])
    batched.run_to(2)
    batched.keep([1])
    batched.run_to(3)
    assert torch.equal(batched.values[0], trained(table, chosen, dropout=0.3).values[2])


def test_predictions_are_those_of_the_layers(table):
    chosen = fits()
    batched = trained(table, chosen)
    rows = np.arange(40)
    values = table[0][rows].numpy()
    matrices, biases = batched.layers(1)
    for place, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        values = (np.maximum(values, 0) if place else values) @ matrix + bias
    powers = np.exp(values)
    np.testing.assert_allclose(batched.predict(1, rows), powers / powers.sum(axis=1, keepdims=True), atol=1e-5)


def test_fits_with_batches_of_another_shape_are_refused(table):
    rows = np.arange(100)
    with pytest.raises(ValueError, match="too many values"):
        trained(table, [fits()[0], FitRows(rows, np.zeros(SIZES[0]), np.ones(SIZES[0]))])
