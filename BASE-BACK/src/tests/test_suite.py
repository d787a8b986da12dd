"""The check before training: every architecture, built in size `tiny`, returns finite logits."""

from __future__ import annotations

import torch

from models import BACKBONE_MAP, create_custom_backbone
from utils import logger

NUM_CLASSES = 5
IMG_SIZE = 32


def run_all_unit_tests() -> tuple[int, int]:
    """Check every architecture in size `tiny` on two images; returns (passed, failed) and logs each failure."""
    passed = failed = 0
    for name in BACKBONE_MAP:
        try:
            check_backbone(name)
        except Exception as error:  # counted as a failure; the other architectures are still checked
            failed += 1
            logger.error(f"unit test of {name} failed: {type(error).__name__}: {error}")
        else:
            passed += 1
    logger.info(f"unit tests: {passed} passed, {failed} failed")
    return passed, failed


def check_backbone(name: str) -> None:
    """Run two images through one tiny network; raises ValueError unless it returns finite logits (2, 5)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_custom_backbone(name, NUM_CLASSES, size="tiny", img_size=IMG_SIZE).eval()
        images = torch.randn(2, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        logits = network(images)
    if logits.shape != (2, NUM_CLASSES):
        raise ValueError(f"logits of shape {tuple(logits.shape)}; expected (2, {NUM_CLASSES})")
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
