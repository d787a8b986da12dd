"""Logger, smoke checks, device, seed and file hashes of the base pipeline.

Modules of this package import these names from `utils` and nothing else of it, so that they also work where the
package is mounted below another one of the same name.
"""

from __future__ import annotations

from utils.devices import (
    DEVICE,
    OPTIMAL_WORKERS,
    get_device,
    get_device_info,
    get_optimal_workers,
    set_seed,
)
from utils.files import compute_file_sha256
from utils.logs import DedupLogger, SmokeCheckLogger, add_handlers

__all__ = [
    "DEVICE",
    "OPTIMAL_WORKERS",
    "DedupLogger",
    "SmokeCheckLogger",
    "compute_file_sha256",
    "get_device",
    "get_device_info",
    "get_optimal_workers",
    "logger",
    "set_seed",
    "smoke_checker",
]

add_handlers("disease_pipeline")
logger = DedupLogger("disease_pipeline")
smoke_checker = SmokeCheckLogger()
