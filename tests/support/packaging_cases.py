"""A small network packaged by the base pipeline's exporter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from export import (
    export_and_package_model,
)

BUILT = ["state_dict", "checkpoint", "torchscript", "onnx"]


CLASSES = ["black spot", "canker", "healthy"]


FILES = {
    "state_dict": ["state_dict/leaf_state_dict_cpu.pth", "state_dict/leaf_state_dict_cpu.safetensors"],
    "checkpoint": ["checkpoint/leaf_checkpoint_full.pth"],
    "torchscript": ["torchscript/leaf_trace.pt"],
    "onnx": ["onnx/leaf.onnx"],
}


SAMPLE = torch.zeros(1, 3, 8, 8)


class Leaf(nn.Sequential):
    """A small network with BatchNorm, dropout and integer buffers."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8, len(CLASSES)),
        )
        self.train()
        self(torch.randn(16, 3, 8, 8))


def package(root: Path, model: nn.Module, wanted: list[str] | None = None, **options: object) -> dict:
    given = {"sample_input": SAMPLE, "export_formats": wanted or BUILT, "class_names": CLASSES} | options
    return export_and_package_model(model, "leaf", deploy_root=root, **given)


def written(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*")}
