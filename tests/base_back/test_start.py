"""How the base pipeline starts: what an import of its networks loads, and where its workers come from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, run_python
from image_folders import write_class_folders

SOURCE = PROJECT / "BASE-BACK" / "src"
STOP_SECONDS = 5.0

NETWORKS = f"""
import sys; sys.path.insert(0, {str(SOURCE)!r})
import models, torch
assert "torch._dynamo" not in sys.modules
models.create_custom_backbone("CustomConvNeXt", 3, size="tiny", img_size=32)(torch.zeros(1, 3, 32, 32))
from torchvision.ops import RoIAlign
assert "torch._dynamo" not in sys.modules
RoIAlign(2, 1.0, 2)(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0.0, 3.0, 3.0]])])
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
assert sys.modules["torch._dynamo"].disable is torch._dynamo.disable
assert "site-packages" in torch._dynamo.utils.__file__
"""


def test_networks_are_imported_without_the_compiler_which_is_there_when_needed():
    done = run_python("-c", NETWORKS, afresh=True)
    assert done.returncode == 0, done.stderr


def test_what_the_stand_in_does_not_have_comes_from_the_compiler():
    program = f"""
import sys; sys.path.insert(0, {str(SOURCE / "models")!r})
from deferred_dynamo import deferred_dynamo
with deferred_dynamo():
    import torch
    found = torch._dynamo.utils.counters
    import torchvision
assert found is torch._dynamo.utils.counters
assert torch._dynamo.utils.__file__
"""
    done = run_python("-c", program, afresh=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are spawned")
def test_the_server_and_its_workers_end_with_a_killed_training(tmp_path):
    write_class_folders(tmp_path / "Data", ("a", "b"), 30)
    command = [
        *(sys.executable, "-Xutf8", str(SOURCE / "main.py"), "--workspace", str(tmp_path)),  # no fork, by the option
        *("--data", str(tmp_path / "Data"), "--size", "tiny", "--stages", "split", "train"),
        *("--backbones", "CustomConvNeXt", "CustomSwinTransformer", "--epochs-finetune", "200", "--jobs", "2"),
    ]
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        try:
            wait_for(lambda: any(tmp_path.glob("checkpoints/.progress/*.pth")), 120)
            parents = dict(processes(run.pid))
            workers = [pid for pid, parent in parents.items() if parents.get(parent) == run.pid]
            assert len(workers) == 2  # children of the server, which is a child of the training
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            wait_for(lambda: not processes(run.pid), STOP_SECONDS)
        finally:
            if left := processes(run.pid):
                os.killpg(run.pid, signal.SIGKILL)
            assert not left


def processes(session: int) -> list[tuple[int, int]]:
    """Process and parent of each running process of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append((int(path.parent.name), int(fields[1])))
    return found


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
