"""What a step of training fills, and that blocks computed twice change nothing but that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from utils import base_back
from utils.networks import training_memory


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return base_back.load("models").create_custom_backbone(name, 3, size="tiny", img_size=32).train()


def step(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Gradients, buffers, and the next random number."""
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().mean().backward()
    gradients = [own.grad.clone() for own in model.parameters() if own.grad is not None]
    return [*gradients, *(buffer.clone() for buffer in model.buffers()), torch.rand(1)]


@pytest.mark.parametrize("name", ["CustomResNetMish", "CustomSwinTransformer", "CustomDenseNetHybrid"])
def test_a_step_of_blocks_computed_twice_is_the_same_step_and_keeps_less(name):
    model, images = network(name), torch.randn(8, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plain = step(model, images)
    kept = training_memory.activation_bytes(model, lambda: model(images))
    model.load_state_dict(weights)
    with training_memory.activation_checkpointing(model) as count:
        assert count > 1
        twice = step(model, images)
        less = training_memory.activation_bytes(model, lambda: model(images))
        with torch.no_grad():
            assert model(images).shape == (8, 3)
    assert less < 0.8 * kept
    assert len(plain) == len(twice)
    assert all(torch.equal(one, other) for one, other in zip(plain, twice, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_activations_are_those_that_autograd_keeps():
    model = nn.Sequential(nn.Linear(100, 50), nn.Sigmoid(), nn.BatchNorm1d(50))
    images = torch.randn(10, 100)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = training_memory.activation_bytes(model, lambda: model(images))
    # The input of the linear layer, the sigmoid's result, and BatchNorm's running and own statistics.
    assert found == 4 * (10 * 100 + 10 * 50 + 4 * 50)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert training_memory.training_state_bytes(model) == 4 * 4 * (100 * 50 + 50 + 2 * 50)


def test_the_budget_is_of_what_there_is_not_of_what_is_free(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(training_memory, "CONTROL_GROUPS", (limit,))
    whole = training_memory.memory_budget("cpu")
    assert 1e8 < whole < 1e14
    limit.write_text("max\n")
    assert training_memory.memory_budget("cpu") == whole
    limit.write_text("1000000\n")
    assert training_memory.memory_budget("cpu") == 500_000
