"""Weights of small timm networks as files, and the base pipeline's options to train on them at 32 px."""

from __future__ import annotations

from pathlib import Path

import torch

ARCHITECTURE = "test_resnet"


def write_weights(path: Path, *, architecture: str = ARCHITECTURE, classes: int = 10, seed: int = 0) -> Path:
    """Random weights of a timm network, as a bare state dict."""
    import timm

    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(architecture, num_classes=classes)
    torch.save(model.state_dict(), path)
    return path


def frozen_options(weights: Path, name: str = "small", **more: str) -> list[str]:
    """Options of `main.py` for a frozen network at 32 px with two folds."""
    options = {"--backbones": f"{name}=timm:{ARCHITECTURE}", "--weights": str(weights), "--mode": "frozen"}
    options |= {"--img-size": "32", "--folds": "2"} | {
        f"--{key.replace('_', '-')}": value for key, value in more.items()
    }
    return [word for pair in options.items() for word in pair]
