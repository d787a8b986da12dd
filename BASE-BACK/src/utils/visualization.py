"""Plots of a training. This version draws none; the module exists as part of the pipeline's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import logger


def generate_all_visualizations(
    model: Any,
    backbone_name: str,
    history: Mapping[str, Sequence[Any]],
    val_loader: Any,
    class_names: Sequence[str],
    criterion: Any,
    device: Any,
) -> dict[str, Path]:
    """Return {plot: path}; in this version log a message and return an empty dictionary."""
    logger.info(f"{backbone_name}: plots come with a later version; the figures are in metrics_output/", dedupe=True)
    return {}
