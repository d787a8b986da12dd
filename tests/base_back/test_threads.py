"""The number of threads: by the table or the user, never by the machine; OpenMP's threads wait passively."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, run_python

from training import stages
from utils import threads

TINY, STUDENT, FULL = (100_000, 32), (1_530_000, 224), (17_620_000, 224)


@pytest.fixture
def unset(monkeypatch):
    """Nothing is asked for by the user."""
    for name in ("OMP_NUM_THREADS", threads.REQUESTED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("work", sorted(threads.TABLE))
@pytest.mark.parametrize("cores", [1, 2, 64])
def test_the_network_decides_and_not_the_machine(unset, monkeypatch, work, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    large = 1 if work == "base training" else 2
    assert [threads.number_of_threads(work, *network) for network in (TINY, STUDENT, FULL)] == [1, large, large]


def test_parameters_and_image_size_count(unset):
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(1000, 50_000)
    assert [threads.threads_of_network("student", network, 32, "cpu") for network in (small, large)] == [1, 2]
    assert threads.threads_of_network("student", small, 32 * 1000, "cpu") == 2
    assert threads.threads_of_network("student", large, 32, "cuda:0") is None


@pytest.mark.parametrize(
    ("openmp", "requested", "expected"),
    [("3", None, 3), ("4,2", None, 4), (None, "3", 3), ("1", "3", 3), ("8", "0", None), ("many", None, None)],
)
def test_the_users_number_wins(unset, monkeypatch, openmp, requested, expected):
    for name, value in (("OMP_NUM_THREADS", openmp), (threads.REQUESTED, requested)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert threads.requested_threads() == expected
    assert threads.number_of_threads("student", *TINY) == (expected or 1)


def test_the_number_is_set_inside_the_block_alone():
    before = torch.get_num_threads()
    with threads.intra_op_threads(3):
        assert torch.get_num_threads() == 3
        with threads.intra_op_threads(None):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), threads.intra_op_threads(3):
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("openmp", "cores", "expected"), [(None, 4, (4, 1)), ("2", 4, (2, 2)), ("8", 4, (1, 8))])
def test_processes_times_threads_are_no_more_than_the_cores(unset, monkeypatch, openmp, cores, expected):
    monkeypatch.setattr(stages, "usable_cores", lambda: cores)
    if openmp:
        monkeypatch.setenv("OMP_NUM_THREADS", openmp)
    assert stages._processes(None) == expected
    assert stages._processes(3) == (3, expected[1])


# what OpenMP reads ----------------------------------------------------------------------------------------------------
LIBRARY = next(Path(torch.__file__).parent.glob("lib/libgomp*"), None)
FIRST_IMPORT = f"""
import ctypes, os, sys

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            ctypes.CDLL({str(LIBRARY)!r})
            os._exit(0)

sys.meta_path.insert(0, Torch())
"""
"""For `sitecustomize`: a program ends where it would import torch, with torch's OpenMP alone, which takes a second less
and reads the same variables at the same moment."""


def openmp_settings(folder: Path, *command: str, **variables: str) -> dict[str, str]:
    """What libgomp says of itself when the program imports torch."""
    environment = {"OMP_NUM_THREADS": "", "OMP_DISPLAY_ENV": "VERBOSE"} | variables
    if LIBRARY is not None:
        (folder / "sitecustomize.py").write_text(FIRST_IMPORT)
        environment["PYTHONPATH"] = str(folder)
    done = run_python(*command, environment=environment, afresh=True)
    found = dict(re.findall(r"(G?OMP_\w+) = '(.*)'", done.stderr))
    if not found:
        pytest.skip("this OpenMP does not display its settings")
    return {name: found[name] for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}


PROGRAMS = {
    "base pipeline": (str(PROJECT / "BASE-BACK" / "src" / "main.py"), "--stages", "split"),
    "ensemble system": (str(PROJECT / "ensemble_orchestrator.py"), "discover"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_threads_wait_passively_unless_the_user_says_otherwise(synthetic, tmp_path, program):
    users = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    for name, given, spins, number in (("ours", {}, False, "1"), ("users", users, True, "3")):
        workspace = shutil.copytree(synthetic, tmp_path / name)  # one that is known is discovered without torch
        settings = openmp_settings(tmp_path, *PROGRAMS[program], "--workspace", str(workspace), **given)
        assert (settings["GOMP_SPINCOUNT"] != "0", settings["OMP_NUM_THREADS"]) == (spins, number)


FAULTS = """
import resource, sys
import torch
from utils.threads import intra_op_threads

images, faults = torch.ones(16, 64, 112, 112), []
for _ in range(4):
    with intra_op_threads(1):
        for _ in range(4):
            images * 2  # 51 MB, allocated and freed
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_tensors_stay_in_the_process_for_the_next_ones(tmp_path):
    source = Path(threads.__file__).parents[1]
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    child = run_python(str(script), environment={"PYTHONPATH": str(source)})
    assert child.returncode == 0, child.stderr
    pages_of_one_tensor = 16 * 64 * 112 * 112 * 4 // 4096
    assert int(child.stdout) < pages_of_one_tensor
