"""Device, seed and worker count."""

from __future__ import annotations

import platform
import random
from typing import Any

import numpy as np
import torch
from joblib import cpu_count

from config.settings import NUM_WORKERS


def get_device() -> torch.device:
    """CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_seed(seed: int = 42) -> None:
    """Seed Python, NumPy and torch; with CUDA, also make cuDNN deterministic."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def get_optimal_workers() -> int:
    """Number of loader processes for a large data set: `DBT_NUM_WORKERS`, else 0.8 of the usable cores, at most 12."""
    if NUM_WORKERS >= 0:
        return NUM_WORKERS
    return min(12, int(0.8 * usable_cores()))


def usable_cores() -> int:
    """Number of cores available to this process by CPU affinity and container quota, at least 1."""
    return int(cpu_count())


def get_device_info() -> dict[str, Any]:
    """Device, platform, CUDA and cuDNN versions and worker count, for a log or a record."""
    cuda = torch.cuda.is_available()
    return {
        "device": str(DEVICE),
        "platform": platform.platform(),
        "cuda_available": cuda,
        "cuda_version": torch.version.cuda if cuda else None,
        "cudnn_version": torch.backends.cudnn.version() if cuda else None,
        "optimal_workers": OPTIMAL_WORKERS,
    }


DEVICE = get_device()
OPTIMAL_WORKERS = get_optimal_workers()
