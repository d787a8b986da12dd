"""Fusion heads that are trained side by side: each is the training of its module alone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from utils.combiners.batched_heads import BATCHED
from utils.combiners.fusion_heads import ABSENT, HEADS
from utils.combiners.trained_heads import HeadShape
from utils.numeric.batched_training import RANDOM_VALUES, BatchShape, Schedule
from utils.numeric.setting_paths import torch_threads

N, C, WIDTHS = 420, 5, (4, 7, 5)
EQUAL = (4, 7, 4, 4)  # the members of equal widths are not neighbours
COUNTS = (150, 148, 145)  # of rows, in three batches each
SEEDS = (3, 3, 8)
SCHEDULE = Schedule(epochs=4, lr=0.01, weight_decay=1.0, dropout=0.3, label_smoothing=0.1)
SHAPES = {
    "concat_mlp": HeadShape("concat_mlp", WIDTHS, (16,), C, 0),
    "linear": HeadShape("concat_mlp", WIDTHS, (), C, 0),
    "attention": HeadShape("attention", WIDTHS, (16, 8), C, 0),
    "attention of odd width": HeadShape("attention", WIDTHS, (11,), C, 0),
    "attention of its own width": HeadShape("attention", WIDTHS, (), C, 0),
    "attention of equal blocks": HeadShape("attention", EQUAL, (16, 8), C, 0),
    "bilinear": HeadShape("bilinear", WIDTHS, (16,), C, 16),
    "bilinear of equal blocks": HeadShape("bilinear", EQUAL, (16,), C, 16),
    "bilinear of odd rank": HeadShape("bilinear", WIDTHS, (16,), C, 6),
    "cca_aligned": HeadShape("cca_aligned", (9,), (16,), C, 0),
}


@pytest.fixture(autouse=True)
def one_thread():
    with torch_threads(1):
        yield


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def table_of(shape):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(N, sum(shape.widths), generator=generator)
    return table, torch.randint(0, C, (N,), generator=generator)


def fits():
    rng = np.random.default_rng(1)
    return [np.sort(rng.permutation(N)[:count]) for count in COUNTS]


def trained(shape, places, *, epochs=4, schedule=SCHEDULE):
    """The heads of some of the fits, trained side by side."""
    kind, rows = BATCHED[shape.method], fits()
    batches = BatchShape.of(max(COUNTS), 3)
    arguments = [rows[place] for place in places], [SEEDS[place] for place in places]
    heads = kind(shape, *table_of(shape), *arguments, batches, schedule)
    heads.run_to(epochs)
    return heads


class Stream:
    """Random numbers of one fit."""

    def __init__(self, seed):
        self.noise = np.random.SFC64(seed)

    def kept(self, shape, share):
        size = math.prod(shape)
        drawn = self.noise.random_raw(-(-size // 4)).view(np.int16)[:size].reshape(shape)
        return torch.from_numpy(drawn >= round(share * RANDOM_VALUES) - RANDOM_VALUES // 2)


class DropoutFrom(nn.Module):
    """Dropout by the numbers of a fit, as long as it is `on`."""

    def __init__(self, stream, share):
        super().__init__()
        self.stream, self.share, self.on = stream, round(share * RANDOM_VALUES) / RANDOM_VALUES, share > 0

    def forward(self, values):
        return values * self.stream.kept(values.shape, self.share) / (1 - self.share) if self.on else values


def replace_dropout(module, dropout):
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, dropout)
        replace_dropout(child, dropout)


def reference(shape, place, schedule):
    """The same training of one module by autograd, from the same weights and random numbers.

    Returns probabilities (N, C) and the gradients of the last step, {name of a weight: gradient}.
    """
    start, stream = trained(shape, [place], epochs=0), Stream(SEEDS[place])
    head = HEADS[shape.method](shape.widths, shape.hidden, shape.classes, schedule.dropout, shape.rank)
    head.load_state_dict({name: torch.from_numpy(values) for name, values in start.weights(0).items()})
    dropout = DropoutFrom(stream, schedule.dropout)
    replace_dropout(head, dropout)
    head.eval()  # attention draws no absences of its own
    table, labels = table_of(shape)
    inputs, truth, step = table[fits()[place]], labels[fits()[place]], 0
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=schedule.weight_decay)
    for _ in range(schedule.epochs):
        for places in torch.randperm(len(inputs), generator=start.generators[0]).tensor_split(3):
            arguments = [inputs[places]]
            if shape.method == "attention":
                arguments.append(stream.kept((len(places), len(shape.widths)), ABSENT))
            optimizer.param_groups[0]["lr"] = schedule.lr * (1 + math.cos(math.pi * step / (3 * schedule.epochs))) / 2
            optimizer.zero_grad()
            smoothing = schedule.label_smoothing
            nn.functional.cross_entropy(head(*arguments), truth[places], label_smoothing=smoothing).backward()
            optimizer.step()
            step += 1
    dropout.on = False
    gradients = {name: values.grad.numpy() for name, values in head.named_parameters()}
    with torch.no_grad():
        return torch.softmax(head(table), dim=1).numpy(), gradients


@pytest.mark.parametrize("dropout", [0.3, 0.0])
def test_each_is_the_training_of_its_module_alone(shape, dropout):
    schedule = replace(SCHEDULE, dropout=dropout)
    heads = trained(shape, [0, 1, 2], schedule=schedule)
    for place in range(3):
        expected, gradients = reference(shape, place, schedule)
        # AdamW's steps hardly depend on the scale of a gradient, so that the weights tell nothing about it.
        for name, slope in zip(heads.weights(place), heads.all_slopes, strict=True):
            slope = slope[place].numpy()
            of_module = gradients[name]
            of_heads = slope.T if name.endswith("weight") else slope[0]
            np.testing.assert_allclose(of_heads, of_module, rtol=0, atol=0.02 * np.abs(of_module).max() + 1e-7)
        np.testing.assert_allclose(heads.predict(place, np.arange(N)), expected, rtol=0, atol=1e-5)
        assert np.abs(expected - heads.predict((place + 1) % 3, np.arange(N))).max() > 1e-3


def independent():
    names = [name for name, shape in SHAPES.items() if BATCHED[shape.method].are_independent(shape)]
    return pytest.mark.parametrize("name", names)


def test_heads_whose_bytes_could_depend_on_others_are_known():
    found = {name for name, shape in SHAPES.items() if not BATCHED[shape.method].are_independent(shape)}
    assert found == {"attention of odd width", "bilinear of odd rank"}
    twelve = replace(SHAPES["attention"], hidden=(12,))  # no whole vectors
    assert not BATCHED["attention"].are_independent(twelve)


@independent()
def test_the_fits_beside_it_change_no_byte(name):
    shape = SHAPES[name]
    together = trained(shape, [0, 1, 2])
    for place in range(3):
        alone = trained(shape, [place])
        assert torch.equal(alone.values[0], together.values[place])
        rows = np.arange(50)
        assert alone.predict(0, rows).tobytes() == together.predict(place, rows).tobytes()


@independent()
def test_fits_that_stop_change_no_byte_of_the_others(name):
    shape = SHAPES[name]
    heads = trained(shape, [0, 1, 2], epochs=1)
    heads.keep([0, 2])
    heads.run_to(2)
    heads.keep([1])
    heads.run_to(3)
    assert torch.equal(heads.values[0], trained(shape, [0, 1, 2], epochs=3).values[2])


def test_weights_are_those_of_the_module_of_the_head(shape):
    heads = trained(shape, [1])
    head = HEADS[shape.method](shape.widths, shape.hidden, shape.classes, 0.0, shape.rank).eval()
    head.load_state_dict({name: torch.from_numpy(values) for name, values in heads.weights(0).items()})
    table, _ = table_of(shape)
    with torch.no_grad():
        expected = torch.softmax(head(table), dim=1).numpy()
    np.testing.assert_allclose(heads.predict(0, np.arange(N)), expected, rtol=0, atol=1e-6)
    assert BATCHED[shape.method].numbers(shape) == sum(values.numel() for values in head.parameters())


def test_heads_start_as_torch_draws_linear_maps_and_scores_of_attention_at_zero(shape):
    rows = [np.arange(30)] * 200
    batches = BatchShape.of(30, 1)
    heads = BATCHED[shape.method](shape, *table_of(shape), rows, list(range(200)), batches, SCHEDULE)
    drawn = [heads.weights(number) for number in range(200)]
    for name in drawn[0]:
        values = np.stack([weights[name] for weights in drawn])
        if name.startswith("score"):
            assert not values.any()
            continue
        width = drawn[0][name.replace("bias", "weight")].shape[1]
        assert np.abs(values).max() <= 1 / math.sqrt(width)
        np.testing.assert_allclose(values.std(), 1 / math.sqrt(3 * width), rtol=0.1)
