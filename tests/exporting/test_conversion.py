"""Files that are written and checked, or moved to `failed/`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from utils.core import engines
from utils.exporting import conversion, export_formats
from utils.exporting.conversion import ConversionJob, ParityChecks
from utils.exporting.exported_network import ExportSignature, ExportSource
from utils.exporting.parity_check import FileRunError, ReferenceBatches
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


def checked_after_writing(job: ConversionJob, status: dict) -> list[tuple[str, dict]]:
    """The results of checks, none of which starts before all files are written."""
    with ParityChecks(job, list(status)) as checks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_start", lambda **_: None)
        for name, entry in status.items():
            checks.add(name, entry)
        patch.undo()
        return list(checks.results())


def test_a_file_that_agrees_gets_its_parity(job):
    ((_, entry),) = checked_after_writing(job, {"torchscript": written_entry(job)})
    assert (entry["status"], entry["source_digest"]) == ("ok", "source")
    assert entry["parity"]["max_abs_diff"] < 1e-6
    assert entry["parity"]["rows"] == 8
    assert {"python", "torch"} <= entry["versions"].keys()


def test_a_file_that_differs_is_moved_to_failed(job):
    job.sample.expected.probabilities[3] = [1, 0, 0]
    ((_, entry),) = checked_after_writing(job, {"torchscript": written_entry(job)})
    assert (entry["status"], entry["path"], entry["files"]) == ("failed", None, {})
    assert "it.pt" in entry["reason"]
    assert (job.staged / "failed" / "torchscript" / "it.pt").is_file()
    assert not (job.staged / "torchscript").exists()


def test_a_file_that_was_not_written_is_not_run(job):
    skipped = export_formats.format_entry("skipped", reason="no tools")
    assert checked_after_writing(job, {"tflite": skipped}) == [("tflite", skipped)]
    assert not job.scratch.exists()


class Process:
    """Instead of a runtime: counts those that run at a time, and fails where told."""

    running: ClassVar[list[str]] = []
    most: ClassVar[list[int]] = []
    error: ClassVar[Exception | None] = None
    has_ended: ClassVar[bool] = False

    def __init__(self, format_name, *_, **__):
        self.name = format_name
        self.running.append(format_name)
        self.most.append(len(self.running))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.name in self.running:
            self.running.remove(self.name)

    def outputs(self):
        if self.error is not None:
            raise self.error
        self.running.remove(self.name)
        raise FileRunError(f"{self.name} was not run")


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.setattr(conversion, "RuntimeProcess", Process)
    monkeypatch.setattr(Process, "running", [])
    monkeypatch.setattr(Process, "most", [])
    return Process


def entries(job, *formats, size_mb=1.0):
    return {name: written_entry(job) | {"size_mb": size_mb} for name in formats}


@pytest.mark.parametrize(("cores", "size_mb", "most"), [(1, 1.0, 1), (2, 1.0, 2), (8, 1.0, 3), (8, 501.0, 1)])
def test_formats_are_checked_side_by_side_where_cores_and_memory_allow(
    job, processes, monkeypatch, cores, size_mb, most
):
    monkeypatch.setattr(engines, "cores", lambda: cores)
    formats = ("state_dict", "torchscript", "onnx")
    status = entries(job, *formats, size_mb=size_mb)
    status["tflite"] = export_formats.format_entry("skipped", reason="no tools")
    checked = dict(checked_after_writing(job, status))
    assert list(checked) == list(status)
    assert [checked[name]["reason"] for name in formats] == [f"{name} was not run" for name in formats]
    assert checked["tflite"] == status["tflite"]
    assert max(processes.most) == most
    assert processes.running == []


def test_formats_of_weights_share_a_process_and_are_run_alone_where_it_fails(job, processes, monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 1)
    status = entries(job, "state_dict", "onnx", "checkpoint")
    for name, entry in status.items():
        entry["files"] = {f"{name}/it.bin": "digest"}
    started = []

    class Runtime(processes):
        def __init__(self, format_name, files, *_, **__):
            super().__init__(format_name)
            self.files = files
            started.append([path.parent.name for path in files])

        def outputs(self):
            self.running.remove(self.name)
            if len(self.files) > 1:
                raise FileRunError("one of them was not run")
            raise FileRunError(f"{self.files[0].parent.name} was not run")

    monkeypatch.setattr(conversion, "RuntimeProcess", Runtime)
    checked = dict(checked_after_writing(job, status))
    assert {name: entry["reason"] for name, entry in checked.items()} == {
        name: f"{name} was not run" for name in status
    }
    assert started == [["state_dict", "checkpoint"], ["state_dict"], ["onnx"], ["checkpoint"]]
    assert max(processes.most) == 1


def test_processes_end_with_the_check(job, processes, monkeypatch):
    monkeypatch.setattr(engines, "cores", lambda: 2)
    monkeypatch.setattr(processes, "error", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        checked_after_writing(job, entries(job, "state_dict", "torchscript", "onnx"))
    assert processes.most == [1, 2]
    assert processes.running == []


WRITTEN_IN_TURN = ("state_dict", "checkpoint", "torchscript", "onnx")


@pytest.mark.parametrize(
    ("cores", "size_mb", "end_at_once", "started"),
    [
        pytest.param(1, 1.0, False, [[], [], [], []], id="no core is free while files are written"),
        pytest.param(2, 1.0, False, [[], ["state_dict"], ["state_dict"], ["state_dict"]], id="one core is free"),
        pytest.param(
            *(2, 1.0, True, [[], ["state_dict"], ["state_dict", "torchscript"], ["state_dict", "torchscript", "onnx"]]),
            id="one core, and each check ends before the next format is written",
        ),
        pytest.param(
            *(3, 1.0, False, [[], ["state_dict"], ["state_dict", "torchscript"], ["state_dict", "torchscript"]]),
            id="two cores are free",
        ),
        pytest.param(8, 501.0, False, [[], [], [], []], id="large files, beside the network in memory"),
    ],
)
def test_a_check_starts_while_the_next_format_is_written(
    job, processes, monkeypatch, cores, size_mb, end_at_once, started
):
    monkeypatch.setattr(engines, "cores", lambda: cores)
    monkeypatch.setattr(processes, "has_ended", end_at_once)
    status, found = entries(job, *WRITTEN_IN_TURN, size_mb=size_mb), []
    with ParityChecks(job, WRITTEN_IN_TURN) as checks:
        for name, entry in status.items():
            checks.add(name, entry)
            found.append(list(processes.running))
        assert found == started
        assert [name for name, _ in checks.results()] == list(WRITTEN_IN_TURN)
    assert processes.running == []


def test_a_combiner_without_networks_has_no_reduced_precision(job, tmp_path):
    status = conversion.write_reduced_files(job, tmp_path / "it.onnx", ["onnx", "onnx_fp16", "custom"])
    assert status.keys() == {"onnx_fp16"}
    assert status["onnx_fp16"]["status"] == "skipped"
