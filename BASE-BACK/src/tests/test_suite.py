"""The check that runs before anything is trained: every architecture, built small, answers with logits."""

from __future__ import annotations

import torch

from models import BACKBONE_MAP, create_custom_backbone
from utils import logger

NUM_CLASSES = 5
IMG_SIZE = 32


def run_all_unit_tests() -> tuple[int, int]:
    """(passed, failed) over the architectures in size `tiny`, two images each; the log names what failed."""
    passed = failed = 0
    for name in BACKBONE_MAP:
        try:
            check_backbone(name)
        except Exception as error:  # one broken architecture is a result, and the others are still to be seen
            failed += 1
            logger.error(f"unit test of {name} failed: {type(error).__name__}: {error}")
        else:
            passed += 1
    logger.info(f"unit tests: {passed} passed, {failed} failed")
    return passed, failed


def check_backbone(name: str) -> None:
    """Two images through one tiny network; raises ValueError unless it answers with finite logits (2, 5)."""
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
