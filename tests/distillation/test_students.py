"""Students: their names, the member whose size they take, and their initial weights."""

from __future__ import annotations

import pytest
import torch
from given_predictions import empty_workspace
from student_runs import config

from utils.core.errors import UserError
from utils.distillation import students
from utils.predictions.catalog import Catalog, Member
from utils.predictions.store import Store


def member(name: str, size: str, img_size: int, architecture: str | None = None) -> Member:
    return Member(name, architecture or name, size, img_size, ("a", "b"), (), (), None, None, None, f"digest of {name}")


def store_of(tmp_path, *members: Member, seed: int = 1) -> Store:
    content = Catalog({}, ("a", "b"), {}, {each.name: each for each in members})
    return Store(config(f"seed={seed}"), empty_workspace(tmp_path), content)


def test_names_of_member_and_ensemble(tmp_path):
    student = students.resolve(store_of(tmp_path), "CustomMobileOne")
    assert (student.member, student.ensemble) == ("CustomMobileOne_distilled", "distilled_mobile")
    assert students.ensemble_name("CustomConvNeXt") == "distilled_convnext"
    assert students.ensemble_name("resnet10t") == "distilled_resnet10t"


def test_the_size_is_that_of_the_same_backbone_else_of_most_members(tmp_path):
    members = (
        member("CustomConvNeXt", "full", 224),
        member("CustomResNetMish", "tiny", 32),
        member("CustomViTHybrid", "tiny", 32),
    )
    store = store_of(tmp_path, *members)
    same_backbone, of_most = students.resolve(store, "CustomConvNeXt"), students.resolve(store, "CustomMobileOne")
    assert (same_backbone.size, same_backbone.img_size) == ("full", 224)
    assert (of_most.size, of_most.img_size, of_most.reference.name) == ("tiny", 32, "CustomResNetMish")
    assert same_backbone.identity() != of_most.identity()


def test_networks_of_timm_are_a_reference_only_without_others(tmp_path):
    timm = [member(f"timm{number}", "full", 96, f"timm:net{number}") for number in range(2)]
    assert students.resolve(store_of(tmp_path, *timm), "CustomMobileOne").img_size == 96
    store = store_of(tmp_path, *timm, member("CustomConvNeXt", "tiny", 32))
    assert students.resolve(store, "CustomMobileOne").img_size == 32


def test_a_name_that_base_back_does_not_have_is_timms(tmp_path):
    student = students.resolve(store_of(tmp_path, member("CustomConvNeXt", "tiny", 32)), "resnet10t")
    assert (student.architecture, student.size, student.img_size) == ("timm:resnet10t", "full", 32)
    students.require_architecture("CustomMobileOne")
    with pytest.raises(UserError, match="CustomMobileOne"):
        students.require_architecture("CustomMobilOne")


def test_initial_weights_follow_from_the_seed(tmp_path):
    networks = []
    for seed in (1, 1, 2):
        store = store_of(tmp_path, member("CustomConvNeXt", "tiny", 32), seed=seed)
        network = students.initial_network(store, students.resolve(store, "CustomConvNeXt"))
        networks.append(torch.cat([weight.flatten() for weight in network.parameters()]))
    assert torch.equal(networks[0], networks[1])
    assert not torch.equal(networks[0], networks[2])


def test_without_a_reference_nothing_is_recorded_of_training(tmp_path):
    store = store_of(tmp_path)
    assert students.training_facts(store, students.resolve(store, "CustomConvNeXt")) == {}
