"""Runs programs of the project in child processes, logs their messages, and ends them with their caller.

A process killed by SIGKILL cannot end its children, so each of them watches its parent.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger("disease_pipeline")

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \| (?P<level>[A-Z]+) \| (?P<text>.*)")
"""Format of a message by the loggers of this project and of the base pipeline."""
LAST_LINES = 3  # number of last messages of a failed program
PARENT = "DBT_PARENT"
"""Environment variable with the id of the process that a program exits with; the base pipeline reads it too."""
PARENT_CHECK_SECONDS = 1.0
GC_THRESHOLDS = (10_000, 10, 10)
"""Thresholds of the garbage collector. With Python's (700, 10, 10), it scans the half million objects that imports of
torch and timm create six times, a fifth of the time of these imports."""


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, list[str]]:
    """Run a program; returns (exit code, stdout, last lines of its messages). It is terminated with the caller.

    A program that calls `end_with_caller`, like those of this project, also exits if the caller is killed.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        options: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace"}
        options["env"] = watching_environment(environment)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, **options)
        assert process.stderr is not None
        try:
            for line in process.stderr:
                match = LOG_LINE.fullmatch(line.rstrip("\n"))
                level = logging.getLevelName(match["level"]) if match else logging.DEBUG
                logger.log(level if isinstance(level, int) else logging.INFO, "%s", match["text"] if match else line)
                last.append(match["text"] if match else line.strip())
            code = process.wait()
        finally:
            process.terminate()  # no effect if it has exited
            process.wait()
            process.stderr.close()
        output.seek(0)
        return code, output.read(), list(last)


def watching_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the variable that makes a program exit with this process."""
    return {**environment, PARENT: str(os.getpid())}


def script_command(python: str, script: str, *arguments: str) -> list[str]:
    """The command that runs a script of this project with the interpreter `python`, which may lack this project.

    The script exits with the process named by `watching_environment`. `run_path` does not put the script's folder first
    on the search path, where a module beside it could shadow a package. Objects are frozen at the end, because
    collections at exit would take a second.
    """
    code = (
        f"import gc, runpy, sys; gc.set_threshold{GC_THRESHOLDS}; sys.argv = sys.argv[1:]; "
        f"runpy.run_path({__file__!r})['end_with_caller'](); runpy.run_path({script!r}, run_name='__main__'); "
        "gc.freeze()"
    )
    return [python, "-c", code, os.path.basename(script), *arguments]


def end_with_caller() -> None:
    """Exit this process soon after the one named by `watching_environment`, if there is one."""
    parent = os.environ.pop(PARENT, "")  # removed, since children of this process exit with this process
    if parent.isdecimal() and int(parent):
        end_with(int(parent))


def end_with(parent: int) -> None:
    """Exit this process soon after its parent process `parent`, since nothing would receive its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
