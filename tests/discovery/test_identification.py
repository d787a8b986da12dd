"""Identification: what a checkpoint records of its network, and which problems its classes have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from listed_images import scan_of

from utils.core.errors import UserError
from utils.discovery.identification import MemberCandidate, identify

NAME = "CustomConvNeXt"


@pytest.fixture
def scan(tmp_path):
    return scan_of(tmp_path / "w")


def candidate(scan, *, outputs=3, **extra):
    path = scan.workspace.checkpoints / f"{NAME}_final.pth"
    weights = {
        "stem.weight": torch.zeros(7, 7),
        "head.weight": torch.zeros(outputs, 4),
        "aux.weight": torch.zeros(9, 4),
    }
    torch.save({"model_state_dict": weights, "extra": extra}, path)
    return MemberCandidate(NAME, path, "final", NAME)


def test_a_checkpoint_is_believed_on_architecture_size_classes_and_accuracy(scan):
    extra = {"backbone_name": "Other", "model_size": "tiny", "img_size": 48, "classes": ["bee", "ant", "cat"]}
    member, problems = identify(scan, candidate(scan, **extra, final_accuracy=np.float64(0.75)))
    assert (member.architecture, member.size, member.img_size) == ("Other", "tiny", 48)
    assert member.classes == ("bee", "ant", "cat")
    assert (member.recorded_accuracy, member.usable, member.oof) == (0.75, True, None)
    assert {"architecture", "class_order", "no_oof"} <= {problem.code for problem in problems}


@pytest.mark.parametrize(
    ("outputs", "extra", "code", "usable"),
    [
        (3, {}, None, True),
        (5, {}, "surplus_logits", True),
        (2, {}, "classes", False),
        (3, {"classes": ["ant", "bee", "dog"]}, "classes", False),
    ],
)
def test_classes_are_compared_with_the_folders_and_the_width_of_the_classifier(scan, outputs, extra, code, usable):
    member, problems = identify(scan, candidate(scan, outputs=outputs, **extra))
    assert member.usable == usable
    assert {problem.code for problem in problems} & {"classes", "surplus_logits"} == ({code} if code else set())


@pytest.mark.parametrize(
    "extra", [{"img_size": 5}, {"img_size": "32"}, {"classes": "ant"}, {"final_accuracy": "good"}, {"stage": 3}]
)
def test_values_of_another_type_or_out_of_bounds_are_refused(scan, extra):
    with pytest.raises(UserError, match=f"extra.{next(iter(extra))}"):
        identify(scan, candidate(scan, **extra))


def test_a_checkpoint_that_is_gone_is_refused(scan):
    with pytest.raises(UserError, match="gone"):
        identify(scan, MemberCandidate(NAME, scan.workspace.checkpoints / "none.pth", "final", NAME))


def test_a_timm_network_that_records_its_image_size_alone_gets_timms_record_at_that_size(scan):
    member, _ = identify(scan, candidate(scan, backbone_name="timm:test_resnet", img_size=64))
    assert (member.img_size, member.preprocessing["source"], member.preprocessing["mean"]) == (64, "timm", [0.5] * 3)
