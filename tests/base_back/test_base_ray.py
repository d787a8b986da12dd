"""Base trainings on a Ray cluster: the bytes of processes of this machine, also when a worker is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, needs_ray, run_python, write_digits
from killing import digests

MAIN = str(PROJECT / "BASE-BACK" / "src" / "main.py")
TRAINING = (
    *("--backbones", "CustomResNetMish", "--stages", "split", "kfold", "train", "--size", "tiny", "--folds", "2"),
    *("--epochs-head", "1", "--epochs-finetune", "6", "--jobs", "2"),
)


def test_an_address_belongs_to_ray(tmp_path):
    done = run_python(MAIN, "--workspace", str(tmp_path), "--address", "auto")
    assert done.returncode == 2
    assert "--address requires --engine ray" in done.stderr


def test_a_missing_ray_is_named_with_its_remedy(tmp_path):
    write_digits(tmp_path / "Data", per_class=12)
    code = f"import sys; sys.modules['ray'] = None; sys.path.insert(0, {str(PROJECT / 'BASE-BACK' / 'src')!r})"
    script = tmp_path / "without_ray.py"
    script.write_text(f"{code}; import main; sys.exit(main.main(sys.argv[1:]))")
    done = run_python(str(script), "--workspace", str(tmp_path), *TRAINING, "--engine", "ray")
    assert done.returncode == 1
    assert "ray cannot be imported" in done.stderr
    assert "pip install 'ray>=2.40,<3'" in done.stderr
    assert not list(tmp_path.glob("checkpoints/*.pth"))


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_changes_no_byte(tmp_path, base_main):
    here, there = tmp_path / "here", tmp_path / "there"
    for workspace in (here, there):
        write_digits(workspace / "Data", per_class=30)
    done = base_main(*TRAINING, workspace=here)
    assert done.returncode == 0, done.stderr
    variables = {key: value for key, value in os.environ.items() if not key.startswith("DBT_")}
    variables |= {"DBT_AUGMENT": "no_flip", "DBT_BATCH_SIZE": "32", "DBT_PROGRESS_SECONDS": "0"}
    command = [sys.executable, MAIN, "--workspace", str(there), *TRAINING, "--engine", "ray"]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    victim = _training_worker(process, there)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert digests(there) == digests(here)


def _training_worker(process: subprocess.Popen, workspace: Path) -> int:
    """A worker below `process` that is in a training which has saved an epoch."""
    limit = time.monotonic() + 400
    while time.monotonic() < limit and process.poll() is None:
        time.sleep(0.02)
        if list(workspace.glob("checkpoints/.progress/[!.]*.pth")):
            found = [pid for pid, name in _names(process.pid).items() if name.startswith("ray::_work")]
            if found:
                return found[0]
    process.kill()
    raise AssertionError(f"no worker was seen training: {process.communicate()[0]}")


def _names(ancestor: int) -> dict[int, str]:
    """{process: command line} of everything below `ancestor`."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    below, found = {ancestor}, {}
    for _ in range(6):
        below |= {pid for pid, parent in parents.items() if parent in below}
    return {pid: names.get(pid, "") for pid in below - {ancestor}} | found
