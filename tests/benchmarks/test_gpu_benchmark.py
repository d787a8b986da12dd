"""The GPU benchmark: a short run on the CPU, its clocks, and what it says where there is no CUDA device."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PROJECT, run_python
from torch.autograd import DeviceType

import gpu
import gpu_runs
from gpu_workspace import QUICK, Bench
from utils.predictions import streaming

PROGRAM = str(PROJECT / "benchmarks" / "gpu.py")
ON_CUDA = Bench(PROJECT, QUICK, "cuda:0")


def test_the_same_code_runs_on_the_cpu():
    done = run_python(PROGRAM, "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["benchmark"], found["quick"], found["device"], found["failed"]) == ("gpu", True, "cpu", [])
    assert "card" not in found["machine"]
    rows = {row["what"]: row for row in found["rows"]}
    measured = [row for row in rows.values() if row["figure"] is not None]
    assert len(measured) == 8
    silent = [row for row in rows.values() if row["figure"] is None]
    assert [row["peer"].split(":")[0] for row in silent] == ["not measured"] * 6
    assert {row["holds"] for row in rows.values()} == {None}  # the goals are those of a GPU
    assert rows["half precision against float32, 2 members: largest difference"]["figure"] == 0


ON_FAKE_DEVICE = """
import sys
sys.path[:0] = sys.argv[1:]
import pytest
from fake_cuda import fake_cuda
import gpu
with pytest.MonkeyPatch.context() as patch, fake_cuda(patch):
    sys.exit(gpu.main(["--quick"]))
"""


def test_all_code_for_cuda_runs_on_a_fake_device(tmp_path):
    script = tmp_path / "on_fake_device.py"
    script.write_text(ON_FAKE_DEVICE)
    done = run_python(str(script), *(str(PROJECT / name) for name in ("tests/support", "benchmarks", "")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["failed"], found["device"], found["machine"]["card"].split(",")[0]) == ([], "cuda:0", "fake")
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["largest batch that streaming reaches"]["figure"] == 64  # doubled twice on 128 images, from 16 on
    assert {row["holds"] is None for row in rows.values() if row["goal"]} == {False}
    silent = [what for what, row in rows.items() if row["figure"] is None]
    assert len(silent) == 4  # the profiler sees no kernels, and onnxruntime has no TensorRT


def test_without_a_device_it_says_what_to_do():
    done = run_python(PROGRAM, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "python benchmarks/gpu.py --device cpu --quick" in line


def test_a_torch_without_cuda_is_told_from_a_machine_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in gpu.missing_device()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no CUDA device" in gpu.missing_device()


def test_a_part_that_fails_is_a_row_and_the_others_are_measured(monkeypatch, capsys):
    def broken(bench):
        raise RuntimeError("no such kernel\nand more")

    parts = {"broken": broken, "whole": lambda bench: [gpu.row("whole", 1.0, "", None, None, None)]}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "prepared", lambda form, device: nullcontext())
    assert gpu.main(["--device", "cpu"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["failed"] == ["broken"]
    assert [(row["what"], row["peer"]) for row in found["rows"]] == [
        ("broken", "failed: no such kernel"),
        ("whole", None),
    ]


def test_only_rows_with_a_margin_count_as_changed():
    reference = np.array([[0.6, 0.4], [0.505, 0.495], [0.3, 0.7]])
    difference, changed, decided = gpu.compared(np.array([[0.4, 0.6], [0.495, 0.505], [0.31, 0.69]]), reference)
    assert difference == pytest.approx(0.2)
    assert (changed, decided) == (1, 2)


def test_cuda_events_give_the_seconds_of_forward_passes(monkeypatch):
    class Event:
        recorded = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.recorded += 1
            self.milliseconds = 10 * Event.recorded**2

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    clock = gpu_runs.Clock(ON_CUDA)
    for _ in range(2):
        with clock.timing():
            assert not waits  # nothing waits while the device is measured
    assert clock.seconds() == pytest.approx((30 + 70) / 1000)
    assert waits == [1]


def test_a_device_is_busy_while_any_of_its_kernels_runs():
    def event(start, end, device=DeviceType.CUDA, is_user_annotation=False):
        span = SimpleNamespace(start=1e6 * start, end=1e6 * end)
        return SimpleNamespace(time_range=span, device_type=device, is_user_annotation=is_user_annotation)

    kernels = [event(5, 6), event(0, 2), event(1, 3), event(1, 2)]
    others = [event(0, 9, device=DeviceType.CPU), event(0, 9, is_user_annotation=True)]
    assert gpu_runs.device_seconds(kernels + others) == pytest.approx(4)


def test_memory_and_the_largest_batch_are_those_of_the_members():
    def streamed(batch_size, peak):
        return gpu_runs.Streamed(2.0, 0.5, 1.0, batch_size, peak)

    memory, batch = gpu._memory_rows({"one": streamed(512, 3e9), "two": streamed(256, 4e9)})
    assert (memory["figure"], memory["peer"].split(",")[0]) == (4.0, "two")
    assert (batch["figure"], batch["peer"]) == (512, "one 512, two 256")


def test_an_exported_vote_is_measured_beside_eager_networks(tmp_path, monkeypatch):
    """By the CPU's provider in the place of TensorRT's, with networks that are not trained."""
    bench = Bench(tmp_path, QUICK, "cpu")
    monkeypatch.setattr(streaming, "open_network", lambda spec: bench.new_network(spec.architecture).eval())
    times, difference = gpu.tensorrt_rows(bench, provider="CPUExecutionProvider")
    assert times["figure"] > 0
    assert difference["figure"] == 0
    (missing,) = gpu.tensorrt_rows(bench, provider="Other")
    assert missing["figure"] is None
    assert missing["peer"].startswith("not measured: onnxruntime ")
