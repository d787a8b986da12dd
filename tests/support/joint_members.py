"""Shared by tests of joint training: two untrained members and the head over their embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from digit_splits import split_of
from preprocessings import BASE_32

from utils import base_back
from utils.combiners.fusion_heads import ConcatHead, MappedEmbeddings
from utils.networks.construction import NetworkSpec
from utils.training.batch_schedule import NEVER, BatchSchedule
from utils.training.image_source import ImageSource
from utils.training.joint_networks import FusionHeads, JointMember, JointTrainingSettings, TrainableMember

NAMES = ("CustomConvNeXt", "CustomViTHybrid")
EMPTY = np.zeros((0, 0), dtype=np.float32)


def joint_members(folder: Path) -> list[JointMember]:
    """Two untrained networks with outputs in another order than the classes; 16 train and 8 val images of noise."""
    images = split_of(folder / "images", count=24)
    members = []
    for name in NAMES:
        torch.manual_seed(len(name))
        model = base_back.load("models").create_custom_backbone(name, 3, size="tiny", img_size=32)
        path = folder / f"{name}.pth"
        torch.save({"model_state_dict": model.state_dict(), "extra": {}}, path)
        classes = images.classes
        spec = NetworkSpec(name, path, "tiny", BASE_32, (classes[2], classes[0], classes[1]))
        train, val = (
            ImageSource(images.take(rows), spec.preprocessing, "none", image_cache=folder / "cache")
            for rows in (np.arange(16), np.arange(16, 24))
        )
        schedule = BatchSchedule(train, 8, 1, np.full(16, NEVER))
        member = JointMember(name, name, spec, [1, 2, 0], schedule, val, (torch.empty(0), torch.empty(0)))
        network = TrainableMember(member, None, JointTrainingSettings(1, 1e-3, 0.0, 1), "cpu")
        embeddings = network.embed(train), network.embed(val)
        members.append(JointMember(name, name, spec, [1, 2, 0], schedule, val, embeddings))
    return members


def head_of(members: list[JointMember]) -> FusionHeads:
    widths = [member.embeddings[0].shape[1] for member in members]
    maps = MappedEmbeddings(
        [np.zeros(width) for width in widths], [np.ones(1)] * len(widths), [EMPTY] * len(widths), summed=False
    )
    torch.manual_seed(5)
    return FusionHeads(maps, [ConcatHead(widths, (8,), 3, 0.1, 0)])
