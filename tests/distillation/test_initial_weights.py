"""What a student's training starts from: pretrained weights on this machine, a member's weights, or random ones."""

from __future__ import annotations

import pytest
import torch
from given_predictions import logged
from pretrained_files import write_weights
from student_runs import SMALL, config, distill, record, store_of
from synthetic_votes import own, votes

from utils import base_back
from utils.core.errors import UserError
from utils.distillation import students, teachers
from utils.predictions import catalog

__all__ = ["own", "votes"]
NETWORK = "test_resnet"
TIMM_STUDENT = f"distillation.student=timm:{NETWORK}"


@pytest.fixture
def weights(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    """Weights of a network of timm in the folder where they are looked for."""
    monkeypatch.setattr(base_back.settings(), "PRETRAINED_DIR", tmp_path / "pretrained")
    return torch.load(write_weights(tmp_path / "pretrained" / f"{NETWORK}.pth"), weights_only=True)


def test_a_network_of_timm_starts_from_pretrained_weights_at_its_own_input_size(votes, weights):
    store = store_of(votes, TIMM_STUDENT)
    student = students.resolve(store, store.config.distillation.student)
    assert (student.name, student.architecture, student.img_size) == (NETWORK, f"timm:{NETWORK}", 64)
    assert student.preprocessing != students.resolve(store, "CustomConvNeXt").preprocessing
    state = students.initial_network(store, student).state_dict()
    head = {name for name in state if state[name].shape != weights[name].shape}
    assert head == {"fc.weight"} | ({"fc.bias"} if "fc.bias" in state else set())
    assert not state["fc.weight"].any()
    assert all(torch.equal(state[name], weights[name]) for name in state if name not in head)
    again = store_of(votes, TIMM_STUDENT, "distillation.initial_weights=random")
    assert students.resolve(again, NETWORK).identity() != student.identity()


def test_a_pretrained_student_records_its_weights_and_is_shown_the_views_of_its_teacher(own, weights, caplog):
    with logged(caplog):
        distill(own, TIMM_STUDENT, "distillation.epochs=1", "distillation.targets=consistent")
    assert record(own, TIMM_STUDENT)["initial_weights"] == f"file:{NETWORK}.pth"
    assert "the student reads images otherwise" in caplog.text
    member = catalog.load(own).members[f"{NETWORK}_distilled"]
    assert (member.img_size, member.pretrained_on) == (64, "unknown")
    extra = torch.load(own.checkpoint(NETWORK, "distilled"), weights_only=True)["extra"]
    assert extra["weights"]["trained_on"] == "unknown"
    assert distill(own, TIMM_STUDENT, "distillation.epochs=1", "distillation.targets=consistent").document[
        "up_to_date"
    ] == [f"distilled_{NETWORK}"]


def test_without_weights_auto_is_random_and_pretrained_says_what_to_do(votes, tmp_path, monkeypatch):
    monkeypatch.setattr(base_back.settings(), "PRETRAINED_DIR", tmp_path)
    store = store_of(votes, TIMM_STUDENT)
    student = students.resolve(store, NETWORK)
    assert student.pretrained is None
    assert student.img_size == 32
    required = store_of(votes, TIMM_STUDENT, "distillation.initial_weights=pretrained")
    with pytest.raises(UserError, match=r"no pretrained weights of test_resnet on this machine.*or set it to random"):
        students.resolve(required, NETWORK)


def test_a_student_starts_from_the_teachers_member_of_its_architecture(votes):
    store = store_of(votes, SMALL, "distillation.initial_weights=member")
    student = students.resolve(store, "CustomConvNeXt")
    members = teachers.members_of(store, teachers.resolve(store, "soft_voting", excluded_member="x"))
    expected = torch.load(votes.checkpoint("CustomConvNeXt", "final"), weights_only=True)["model_state_dict"]
    state = students.initial_network(store, student, members).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    others = [member for member in members if member.name != "CustomConvNeXt"]
    with pytest.raises(UserError, match=r"needs a member of the teacher with the student's architecture"):
        students.initial_network(store, student, others)


def test_every_seed_has_its_own_random_weights(votes):
    store = store_of(votes, SMALL)
    student = students.resolve(store, "CustomConvNeXt")
    networks = [students.initial_network(store, student, seed=seed) for seed in (None, config().seed, 7)]
    first, same, other = (torch.cat([weight.flatten() for weight in each.parameters()]) for each in networks)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
