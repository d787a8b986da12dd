"""Files that are written and checked, or moved to `failed/`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.exporting import conversion, export_formats
from utils.exporting.conversion import ConversionJob
from utils.exporting.exported_network import ExportSignature, ExportSource
from utils.exporting.parity_check import ReferenceBatches
from utils.exporting.parity_rows import ParitySample

ROWS = np.random.default_rng(0).normal(size=(8, 2, 3)).astype(np.float32)


class Mean(torch.nn.Module):
    """Mean probability of the members' logits (B, M, C)."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.softmax(logits, dim=2).mean(dim=1)


@pytest.fixture
def job(tmp_path):
    """A combiner of imported members, traced to a file."""
    workspace = SimpleNamespace(base=tmp_path, output=None)
    imported = SimpleNamespace(source="imported")
    source = ExportSource("it", "soft_voting", (imported,), ("a", "b", "c"), None, "full", "digest")
    with torch.inference_mode():
        expected = Mean()(torch.from_numpy(ROWS)).numpy().astype(np.float64)
    staged = tmp_path / "it"
    (staged / "torchscript").mkdir(parents=True)
    torch.jit.trace(Mean(), torch.from_numpy(ROWS[:1])).save(staged / "torchscript" / "it.pt")
    return ConversionJob(
        store=SimpleNamespace(workspace=workspace),
        source=source,
        signature=ExportSignature(),
        source_digest="source",
        onnx_exporter="tracing",
        description={"outputs": ["probabilities"]},
        sample=ParitySample([(row,) for row in ROWS], [], ReferenceBatches([], [], expected)),
        staged=staged,
        threads=1,
        scratch=tmp_path / "scratch",
    )


def written_entry(job: ConversionJob) -> dict:
    return export_formats.entry_of_files(job.staged, [job.staged / "torchscript" / "it.pt"], seconds=0.1)


def test_a_file_that_agrees_gets_its_parity(job):
    entry = conversion.check_parity(job, "torchscript", written_entry(job))
    assert (entry["status"], entry["source_digest"]) == ("ok", "source")
    assert entry["parity"]["max_abs_diff"] < 1e-6
    assert entry["parity"]["rows"] == 8
    assert {"python", "torch"} <= entry["versions"].keys()


def test_a_file_that_differs_is_moved_to_failed(job):
    job.sample.expected.probabilities[3] = [1, 0, 0]
    entry = conversion.check_parity(job, "torchscript", written_entry(job))
    assert (entry["status"], entry["path"], entry["files"]) == ("failed", None, {})
    assert "it.pt" in entry["reason"]
    assert (job.staged / "failed" / "torchscript" / "it.pt").is_file()
    assert not (job.staged / "torchscript").exists()


def test_a_file_that_was_not_written_is_not_run(job):
    skipped = export_formats.format_entry("skipped", reason="no tools")
    assert conversion.check_parity(job, "tflite", skipped) == skipped
    assert not job.scratch.exists()


def test_a_combiner_without_networks_has_no_reduced_precision(job, tmp_path):
    status = conversion.write_reduced_files(job, tmp_path / "it.onnx", ["onnx", "onnx_fp16", "custom"])
    assert status.keys() == {"onnx_fp16"}
    assert status["onnx_fp16"]["status"] == "skipped"
