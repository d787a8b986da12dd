"""Programs in processes of their own: their result, their messages, and their end with the caller."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT

from utils.core import subprocesses, worker_processes

SECONDS_LEFT = 5.0  # that a process may outlive the killed one that started it
START = 30.0  # seconds within which a busy machine starts Python and imports what the programs below need


def run(code: str, **variables: str) -> tuple[int, str, list[str]]:
    return subprocesses.run_program([sys.executable, "-c", code], os.environ | variables)


def test_the_exit_code_the_output_and_the_last_messages_are_returned():
    code = "import sys; print('result'); [print(f'line {n}', file=sys.stderr) for n in range(9)]; sys.exit(3)"
    assert run(code) == (3, "result\n", ["line 6", "line 7", "line 8"])


def test_the_environment_is_the_given_one():
    assert run("import os; print(os.environ['NAME'])", NAME="value")[:2] == (0, "value\n")


def test_messages_keep_their_level_and_other_lines_are_for_debugging(caplog):
    logger = logging.getLogger("disease_pipeline")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.DEBUG, logger="disease_pipeline"):
            lines = "12:00:00 | WARNING | careful", "12:00:00 | NONSENSE | odd", "no message"
            run(f"import sys; print(*{lines!r}, sep='\\n', file=sys.stderr)")
    finally:
        logger.removeHandler(caplog.handler)
    levels = {record.getMessage().strip(): record.levelno for record in caplog.records}
    assert levels == {"careful": logging.WARNING, "odd": logging.INFO, "no message": logging.DEBUG}


def test_the_program_ends_when_its_caller_is_interrupted(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    code = f"import os, pathlib, sys, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); " + (
        "print('ready', file=sys.stderr, flush=True); time.sleep(600)"
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocesses.logger, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(code)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


# after SIGKILL --------------------------------------------------------------------------------------------------------
def killed_with_its_processes(tmp_path, program: str) -> list[int]:
    """Run `program`, whose processes write files named by their ids; kill it alone, and return the ids that remain.

    The program runs in a new interpreter: a fork would share the parent of its processes.
    """
    code = f"""
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
from utils.core import engines, subprocesses
folder = {str(tmp_path)!r}
{program}"""
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = [int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert started
    assert all(map(is_running, started)), "before the kill"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + SECONDS_LEFT
    while any(map(is_running, started)) and time.monotonic() < end:
        time.sleep(0.05)
    remaining = [pid for pid in started if is_running(pid)]
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
    return remaining


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
STARTS = f"""
subprocess.Popen(command, env=subprocesses.watching_environment(environment), cwd=folder)
end = time.monotonic() + {START}
while not [path for path in Path(folder).iterdir() if path.name.isdecimal()] and time.monotonic() < end:
    time.sleep(0.05)
print("ready")
time.sleep(600)
"""
WAITS = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(600)"


@needs_proc
@pytest.mark.parametrize("method", [worker_processes.FORK, worker_processes.SPAWN])
def test_workers_of_a_killed_command_end_in_the_middle_of_a_job(tmp_path, method):
    program = f"""
sys.path.insert(0, folder)
from jobs_of_workers import marked
from utils.core import worker_processes
worker_processes.start_method = lambda: {method!r}
list(engines.Local().map(marked, range(2), shared=(folder, os.getpid()), n_processes=2, are_long=True))
"""
    jobs = """
import os, time
from pathlib import Path

def marked(folder, command, item):
    if os.getpid() != command:
        Path(folder, str(os.getpid())).touch()
    while not [path for path in Path(folder).iterdir() if path.name.isdecimal()]:
        time.sleep(0.02)
    if os.getpid() == command:
        print("ready")
    time.sleep(600)
"""
    (tmp_path / "jobs_of_workers.py").write_text(jobs)
    assert killed_with_its_processes(tmp_path, program) == []


@needs_proc
def test_a_script_of_a_killed_command_ends(tmp_path):
    (tmp_path / "waits.py").write_text(WAITS)
    program = f"""
command = subprocesses.script_command(sys.executable, folder + "/waits.py", folder)
environment = dict(os.environ)
{STARTS}
"""
    assert killed_with_its_processes(tmp_path, program) == []


@needs_proc
def test_the_orchestrator_that_another_program_started_ends_with_it(tmp_path):
    waits = f"import argparse, os, pathlib, time\nmark = pathlib.Path({str(tmp_path)!r}, str(os.getpid()))\n"
    waits += "argparse.ArgumentParser.parse_args = lambda *_: mark.touch() or time.sleep(600)\n"
    (tmp_path / "sitecustomize.py").write_text(waits)
    program = f"""
command = [sys.executable, {str(PROJECT / "ensemble_orchestrator.py")!r}, "debug"]
environment = os.environ | {{"PYTHONPATH": folder}}
{STARTS}
"""
    assert killed_with_its_processes(tmp_path, program) == []


PROGRAM = """
import atexit, gc, runpy, sys
atexit.register(lambda: print(gc.get_threshold(), gc.get_freeze_count() > 1000))
sys.argv = [{path!r}, *{arguments!r}]
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("path", "arguments", "exit_code"),
    [("ensemble_orchestrator.py", ["discover"], 1), ("BASE-BACK/src/main.py", ["--stages", "export"], 1)],
)
def test_programs_do_not_collect_garbage_at_exit(tmp_path, path, arguments, exit_code):
    code = PROGRAM.format(path=str(PROJECT / path), arguments=[*arguments, "--workspace", str(tmp_path)])
    found, output, _ = subprocesses.run_program([sys.executable, "-c", code], os.environ)
    assert (found, output.splitlines()[-1:]) == (exit_code, ["(10000, 10, 10) True"])


def test_scripts_do_not_collect_garbage_at_exit(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(sys.argv[1], gc.get_threshold(), gc.get_freeze_count() > 1000))\n"
    )
    command = subprocesses.script_command(sys.executable, str(script), "argument")
    assert subprocesses.run_program(command, os.environ)[:2] == (0, "argument (10000, 10, 10) True\n")
