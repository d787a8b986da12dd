"""A member's network in joint training: order of the classes, resumed state, and release of its memory."""

from __future__ import annotations

import pytest
import torch
from joint_members import joint_members
from preprocessings import BASE_32

from utils.predictions.streaming import open_network
from utils.training.joint_networks import JointMember, JointTrainingSettings, TrainableMember, loaded_members

SETTINGS = JointTrainingSettings(1, 1e-3, 0.0, 1)


@pytest.fixture(scope="module")
def member(tmp_path_factory) -> JointMember:
    return joint_members(tmp_path_factory.mktemp("joint"))[0]


def train_step(network: TrainableMember) -> None:
    network.forward(network.member.validation_set.load(torch.arange(4), BASE_32, None))[0].square().sum().backward()
    network.optimizer.step()
    network.lr_schedule.step()


def test_logits_are_in_the_order_of_the_workspaces_classes(member):
    network = TrainableMember(member, None, SETTINGS, "cpu")
    images = member.validation_set.load(torch.arange(4), BASE_32, None)
    network.model.eval()
    with torch.no_grad():
        assert torch.equal(network.forward(images)[0], open_network(member.spec)(images)[:, member.class_order])


def test_weights_gradients_and_moments_are_freed_without_garbage_collection(member):
    with loaded_members([member], [None], SETTINGS, "cpu") as (network,):
        train_step(network)
        assert any("exp_avg" in state for state in network.optimizer.state.values())
    assert not network.optimizer.state
    tensors = [*network.model.parameters(), *network.model.buffers()]
    assert sum(tensor.numel() for tensor in tensors) == 0
    assert all(weight.grad is None for weight in network.model.parameters())


def test_a_state_restores_weights_optimizer_and_schedule(member):
    network = TrainableMember(member, None, SETTINGS, "cpu")
    train_step(network)
    restored = TrainableMember(member, network.state(), SETTINGS, "cpu")
    assert restored.lr_schedule.last_epoch == network.lr_schedule.last_epoch == 1
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(restored.model.state_dict()[name], tensor)
    moments = [state["exp_avg"] for state in network.optimizer.state.values()]
    restored_moments = [state["exp_avg"] for state in restored.optimizer.state.values()]
    assert len(moments) == len(restored_moments) > 0
    assert all(map(torch.equal, moments, restored_moments))


def test_a_step_needs_more_memory_for_more_images(member):
    network = TrainableMember(member, None, SETTINGS, "cpu")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.model.parameters())
    assert 4 * weights < network.step_bytes(2) < network.step_bytes(8)
