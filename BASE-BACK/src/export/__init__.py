"""Export of trained networks: files, records, and a parity check of each file's logits against the network's."""

from export.export_engine import ExportConfig, ExportEngine, export_model, export_to_format
from export.packaging import export_and_package_model
from export.smoke_tests import run_export_smoke_tests

__all__ = [
    "ExportConfig",
    "ExportEngine",
    "export_and_package_model",
    "export_model",
    "export_to_format",
    "run_export_smoke_tests",
]
