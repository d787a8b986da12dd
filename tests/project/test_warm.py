"""Programs that are forks of a server: what a test sees of them is what it would see of a new interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import warm
from conftest import PROJECT, run_python

from utils.core import subprocesses

SAY = PROJECT / "tests" / "support" / "warm_program.py"


def popen(*arguments: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(SAY), *arguments], **(pipes | options))


def test_streams_arguments_folder_environment_and_exit_code_are_its_own(tmp_path):
    process = popen("tell", "a b", cwd=tmp_path, env={"PATH": os.environ["PATH"], "MINE": "1"})
    assert process._process is not None, "it is a fork"
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == [f"{SAY} tell a b", str(tmp_path), "MINE PATH", "__main__ torch: True utils: False"]
    assert (err, process.returncode) == ("to stderr\n", 5)


def test_a_script_that_the_product_starts_is_a_fork():
    command = subprocesses.script_command(sys.executable, str(SAY), "tell")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process._process is not None
    out, err = process.communicate(timeout=60)
    assert out.splitlines()[3] == "__main__ torch: True utils: False"
    assert (err, process.returncode) == ("to stderr\n", 5)


def test_an_error_ends_with_its_traceback_and_a_message_with_one():
    process = popen("fail")
    _, err = process.communicate(timeout=60)
    assert err.rstrip().endswith("ValueError: on purpose")
    assert process.returncode == 1
    done = subprocess.run([sys.executable, str(SAY), "message"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "a message\n")


def test_it_dies_with_its_session_by_kill_nine():
    process = popen("sleep", start_new_session=True)
    assert os.getpgid(process.pid) == process.pid
    assert process.poll() is None
    assert process.stdout.readline() == "asleep\n"
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.communicate()


def test_a_signal_is_heard_and_time_runs_out():
    process = popen("sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.05)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.communicate()
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, str(SAY), "sleep"], capture_output=True, timeout=0.5, check=False)
    assert time.monotonic() - start < 30


def test_what_must_be_a_new_interpreter_is_one():
    assert popen_is_real("-c", "pass")
    assert popen_is_real("-m", "this")
    assert popen_is_real("-u", str(SAY))
    done = run_python(str(SAY), "tell", afresh=True)
    assert "torch: False" in done.stdout
    child = os.fork()
    if child == 0:  # a fork of this process has no server of its own
        os._exit(0 if popen_is_real(str(SAY)) else 9)
    assert os.waitpid(child, 0)[1] == 0


def popen_is_real(*arguments: str) -> bool:
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], **pipes)
    process.wait()
    return isinstance(process, warm.Popen) and process._process is None
