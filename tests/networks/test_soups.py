"""Weights brought together: averages bit by bit, tensors that do not go together, normalisation anew, barriers."""

from __future__ import annotations

import gc
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from utils.core.errors import UserError
from utils.networks import soups
from utils.networks.soups import Ingredient

SHAPES = {
    "stem.weight": (6, 3, 3, 3),
    "norm.running_mean": (6,),
    "head.weight": (5, 40),
    "head.bias": (5,),
    "scale": (),
}


def weights(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return found | {"norm.num_batches_tracked": torch.tensor(10 * seed), "index": torch.arange(4)}


def ingredient(state, name="a"):
    return Ingredient(name, lambda: state)


def ingredients(count, dtype=torch.float32):
    return [ingredient(weights(seed, dtype), f"s{seed}") for seed in range(count)]


def bits(state):
    return {name: (tensor.dtype, tensor.reshape(-1).view(torch.uint8).tolist()) for name, tensor in state.items()}


# averages -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "shares"),
    [
        *product((torch.float32, torch.float16, torch.bfloat16), ([1, 1], [1, 1, 1], [7, 3], [1, 2, 4, 4], [0, 1, 0])),
        *product((torch.float64,), ([1, 1], [1, 3, 4], [0, 1, 0])),
    ],
)
def test_copies_of_one_checkpoint_are_that_checkpoint_bit_by_bit(dtype, shares):
    state = weights(1, dtype)
    state["head.bias"][:3] = torch.tensor([-0.0, 1e-7, 3e4], dtype=dtype)
    mixed = soups.weighted_average([ingredient(state, f"c{n}") for n in range(len(shares))], shares)
    assert bits(mixed) == bits(state)
    assert list(mixed) == list(state)


@pytest.mark.parametrize("blocks", [1, 3, 1000])
def test_an_average_is_the_mean_in_double_precision_wherever_blocks_end(monkeypatch, blocks):
    monkeypatch.setattr(soups, "BLOCKS", blocks)
    monkeypatch.setattr(soups, "BLOCK", 0)
    parts = ingredients(5)
    mixed = soups.weighted_average(parts)
    for name, shape in SHAPES.items():
        expected = np.mean([part.open()[name].double().numpy() for part in parts], axis=0).astype(np.float32)
        np.testing.assert_array_equal(mixed[name].numpy(), expected)
        assert mixed[name].shape == shape


def test_sums_do_not_lose_what_single_precision_would():
    large, small = {"w": torch.tensor([2.0**30])}, {"w": torch.tensor([1.0])}
    parts = [ingredient(large), *(ingredient(small) for _ in range(63))]
    assert soups.weighted_average(parts)["w"].item() == np.float32((2.0**30 + 63) / 64)
    assert sum([np.float32(1)] * 63, np.float32(2.0**30)) == 2.0**30  # in single precision the small ones vanish


def test_two_shares_are_a_point_on_the_line():
    first, second = ingredients(2)
    mixed = soups.weighted_average([first, second], [3, 7])
    for name in SHAPES:
        expected = 0.3 * first.open()[name].double() + 0.7 * second.open()[name].double()
        torch.testing.assert_close(mixed[name], expected.float(), rtol=1e-7, atol=0)


def test_a_share_of_nothing_opens_nothing():
    never = Ingredient("never", lambda: pytest.fail("it was opened"))
    mixed = soups.weighted_average([ingredient(weights(1)), never], [1, 0])
    assert bits(mixed) == bits(weights(1))


def test_counters_become_the_largest_and_other_integers_must_agree():
    parts = ingredients(3)
    mixed = soups.weighted_average(parts)
    assert mixed["norm.num_batches_tracked"].item() == 20
    assert mixed["norm.num_batches_tracked"].dtype == torch.int64
    assert mixed["index"].tolist() == [0, 1, 2, 3]
    other = weights(9) | {"index": torch.tensor([0, 1, 3, 2])}
    with pytest.raises(UserError, match=r"s9: index holds other torch\.int64 values than in s0"):
        soups.weighted_average([*parts, ingredient(other, "s9")])


def test_nothing_that_was_averaged_is_changed():
    state = weights(1, torch.float64)
    before = bits(state)
    soups.weighted_average([ingredient(state), ingredient(weights(2, torch.float64))])
    assert bits(state) == before


def test_tensors_that_do_not_go_together_are_named():
    other = weights(2)
    other["head.weight"] = torch.zeros(7, 40)
    other["head.bias"] = other["head.bias"].half()
    del other["scale"]
    other["extra"] = torch.zeros(1)
    with pytest.raises(UserError) as error:
        soups.weighted_average([ingredient(weights(1), "final"), ingredient(other, "snapshot2")])
    assert str(error.value).startswith(
        "snapshot2: its weights do not go together with those of final: scale is missing; extra is not in the first; "
        "head.weight is float32 [7, 40], expected float32 [5, 40] and 1 more. "
    )
    assert soups.state_dict_differences(weights(1), other)[-1] == "head.bias is float16 [5], expected float32 [5]"
    assert soups.state_dict_differences(weights(1), weights(2)) == []


def test_one_checkpoint_at_a_time_is_open(monkeypatch):
    class Opened(dict):
        pass

    monkeypatch.setattr(soups, "BLOCK", 0)
    alive: list[weakref.ref] = []
    most = 0

    def opener(seed):
        def open_it():
            nonlocal most
            found = Opened(weights(seed))
            alive.append(weakref.ref(found))
            most = max(most, sum(reference() is not None for reference in alive))
            return found

        return open_it

    gc.disable()
    try:
        soups.weighted_average([Ingredient(f"s{seed}", opener(seed)) for seed in range(6)])
    finally:
        gc.enable()
    assert len(alive) > 12
    assert most == 2  # the last, until the next has been opened


def test_equal_weights_have_equal_digests_and_others_do_not():
    state = weights(1)
    same = soups.weights_digest(state)
    assert soups.weights_digest({name: state[name].clone() for name in reversed(state)}) == same
    changes = (
        {"scale": state["scale"] + 1},
        {"head.bias": state["head.bias"].double()},
        {"head.weight": state["head.weight"].reshape(40, 5)},
        {"index": state["index"].flip(0)},
        {"new": torch.zeros(0)},
    )
    assert same not in {soups.weights_digest(state | change) for change in changes}
    strided = state | {"head.weight": state["head.weight"].t().contiguous().t()}
    assert soups.weights_digest(strided) == same


# normalisation --------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two BatchNorms, the second behind a dropout when asked for."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.dropout = nn.Dropout(dropout)
        self.middle, self.norm2 = nn.Linear(4 * 36, 5), nn.BatchNorm1d(5)

    def forward(self, images):
        features = F.relu(self.norm(self.stem(images)))
        return self.norm2(self.middle(self.dropout(features.flatten(1))))


def net(**options):
    torch.manual_seed(3)
    return Net(**options).eval()


def batches(count=4, size=6):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(size, 3, 8, 8, generator=generator) + n, torch.zeros(size)) for n in range(count)]


def by_hand(model, seen):
    """Means of the batches' means and unbiased variances, layer by layer, in double precision."""
    model = model.double()
    found = {"norm": [], "norm2": []}
    for images, _ in seen:
        raw = model.stem(images.double())
        found["norm"].append((raw.mean(dim=(0, 2, 3)), raw.var(dim=(0, 2, 3), correction=1)))
        centred = (raw - raw.mean(dim=(0, 2, 3), keepdim=True)) / (
            raw.var(dim=(0, 2, 3), correction=0, keepdim=True) + model.norm.eps
        ).sqrt()
        features = F.relu(centred * model.norm.weight.view(1, -1, 1, 1) + model.norm.bias.view(1, -1, 1, 1))
        raw = model.middle(features.flatten(1))
        found["norm2"].append((raw.mean(dim=0), raw.var(dim=0, correction=1)))
    return {name: [torch.stack(part).mean(dim=0) for part in zip(*pairs, strict=True)] for name, pairs in found.items()}


def statistics(model):
    return {name: [getattr(model, name).running_mean, getattr(model, name).running_var] for name in ("norm", "norm2")}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("limit", "used"), [(100, 4), (3, 3)])
def test_statistics_are_those_of_a_pass_over_the_same_data_by_hand(dropout, limit, used):
    model = net(dropout=dropout)
    model.norm.running_mean += 100  # what was there before is forgotten
    model.norm.num_batches_tracked += 50
    assert soups.recompute_bn_statistics(model, batches(), num_batches=limit) == used
    with torch.no_grad():
        expected = by_hand(net(), batches()[:used])
    found = statistics(model)
    for name, pair in expected.items():
        for tensor, other in zip(found[name], pair, strict=True):
            torch.testing.assert_close(tensor.double(), other, rtol=1e-5, atol=1e-5)
    assert model.norm.num_batches_tracked.item() == used


def test_it_agrees_with_torchs_own_recomputation_where_there_is_no_dropout():
    ours, theirs = net(), net()
    soups.recompute_bn_statistics(ours, batches())
    torch.optim.swa_utils.update_bn(batches(), theirs)
    assert bits(ours.state_dict()) == bits(theirs.state_dict())


def test_the_model_is_left_as_it_came_but_for_its_statistics():
    model = net(dropout=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    soups.recompute_bn_statistics(model.train(), batches())
    assert not any(module.training for module in model.modules())
    assert model.norm.momentum == 0.3
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == soups.statistics_of(model).keys()
    assert changed == {f"{n}.{s}" for n in ("norm", "norm2") for s in soups.STATISTICS}


def test_a_network_without_batch_norm_is_left_as_it_is():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 3), nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    assert soups.recompute_bn_statistics(model, batches()) == 0
    assert soups.statistics_of(model) == {}


def test_without_a_batch_there_is_no_statistic():
    with pytest.raises(UserError, match="no batch to recompute"):
        soups.recompute_bn_statistics(net(), [])


# basins ---------------------------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """Tells the arms of a spiral apart."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, points):
        return self.layers(points)


def spiral(count=120):
    turn = torch.linspace(0.3, 1, count)
    arms = [
        torch.stack([turn * torch.sin(4 * turn + arm * 2.1), turn * torch.cos(4 * turn + arm * 2.1)], 1)
        for arm in range(3)
    ]
    return torch.cat(arms) * 2, torch.arange(3).repeat_interleave(count)


def train(model, steps, seed=0):
    points, labels = spiral()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        rows = torch.randint(len(points), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(points[rows]), labels[rows]).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def loss_and_error(state):
    model = Classifier(0)
    model.load_state_dict(state)
    points, labels = spiral()
    with torch.no_grad():
        logits = model(points)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) != labels).double().mean().item()


@pytest.fixture(scope="module")
def trunk():
    """A network that can already tell the arms apart, and another one that began with other numbers."""
    model, other = Classifier(1), Classifier(2)
    return train(model, 500), train(other, 500)


def grown(trunk, seed):
    model = Classifier(0)
    model.load_state_dict(trunk)
    return train(model, 60, seed)


def between(first, second):
    middle = soups.weighted_average([ingredient(first, "one"), ingredient(second, "other")])
    (loss, error), (other_loss, other_error), (mean_loss, mean_error) = map(loss_and_error, (first, second, middle))
    return soups.error_barrier(loss, other_loss, mean_loss), soups.error_barrier(error, other_error, mean_error)


def test_the_barrier_between_unrelated_initialisations_is_found(trunk):
    assert loss_and_error(trunk[0])[1] < 0.05
    assert loss_and_error(trunk[1])[1] < 0.05
    loss, error = between(*trunk)
    assert loss > 0.3
    assert error > 0.2
    assert abs(soups.weight_cosine(*map(ingredient, trunk))) < 0.1


def test_two_trainings_from_one_network_have_none(trunk):
    first, second = grown(trunk[0], 10), grown(trunk[0], 11)
    loss, error = between(first, second)
    assert loss < 0.02
    assert error < 0.02
    assert soups.weight_cosine(ingredient(first), ingredient(second)) > 0.9


def test_a_barrier_is_what_lies_above_the_mean_of_the_ends():
    assert soups.error_barrier(0.2, 0.4, 0.5) == pytest.approx(0.2)
    assert soups.error_barrier(0.0, 0.5, 0.2) == pytest.approx(-0.05)


def test_similarity_looks_at_matrices_alone():
    one = {"w": torch.tensor([[1.0, 0.0]]), "b": torch.ones(9)}
    assert soups.weight_cosine(ingredient(one), ingredient(one)) == 1
    assert soups.weight_cosine(ingredient(one), ingredient({"w": torch.tensor([[0.0, 5.0]]), "b": torch.ones(9)})) == 0
    assert soups.weight_cosine(ingredient(one), ingredient({"w": torch.tensor([[-3.0, 3.0]]), "b": one["b"]})) == (
        pytest.approx(-(0.5**0.5))
    )
    assert soups.weight_cosine(ingredient({"b": one["b"]}), ingredient({"b": one["b"]})) == 0


# soups that are worth it ----------------------------------------------------------------------------------------------
def test_a_soup_beats_each_of_its_parts(trunk):
    parts = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        noisy = {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in trunk[0].items()}
        parts.append(ingredient(noisy, f"noisy{seed}"))
    found = loss_and_error(soups.weighted_average(parts))
    of_parts = [loss_and_error(part.open()) for part in parts]
    assert found[0] < 0.8 * min(loss for loss, _ in of_parts)
    assert found[1] <= min(error for _, error in of_parts)


def literal_greedy(names, score):
    """As the paper's algorithm reads."""
    kept = []
    for name in names:
        if not kept or score((*kept, name)) >= score(tuple(kept)):
            kept.append(name)
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_papers_algorithm_and_never_ends_below_its_first(seed):
    rng = np.random.default_rng(seed)
    table = {}

    def score(names):
        return table.setdefault(tuple(names), float(rng.integers(0, 4)))

    names = "abcdef"[: 1 + seed % 6]
    steps = soups.greedy_soup(names, score)
    kept = [name for name, _, is_kept in steps if is_kept]
    assert kept == literal_greedy(names, score)
    assert [name for name, _, _ in steps] == list(names)
    assert table[tuple(kept)] >= table[names[0],]
    assert all(value == table[(*kept[: kept.index(name)], name)] for name, value, is_kept in steps if is_kept)
