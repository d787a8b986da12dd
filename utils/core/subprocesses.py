"""Run programs of the project in processes of their own, log their messages, and end them with their caller.

A process that is killed by SIGKILL cannot end those that it has started, so each of them watches its parent.
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
"""A message as this project's logger and the base pipeline's write it."""
LAST_LINES = 3  # of the messages of a failed program
PARENT = "DBT_PARENT"
"""Variable by which a program is given the process that it ends with; the base pipeline reads it as well."""
PARENT_CHECK_SECONDS = 1.0


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, list[str]]:
    """Run a program and return (exit code, stdout, last lines of its messages). It is terminated with the caller.

    A program that calls `end_with_caller`, as those of this project do, also ends where the caller is killed.
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
            process.terminate()  # no effect if it has ended
            process.wait()
            process.stderr.close()
        output.seek(0)
        return code, output.read(), list(last)


def watching_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the variable by which a program finds that this process is the one to end with."""
    return {**environment, PARENT: str(os.getpid())}


def script_command(python: str, script: str, *arguments: str) -> list[str]:
    """The command that runs a script of this project by the interpreter `python`, which may lack this project.

    The script ends with the process that `watching_environment` named. `run_path` does not put the script's folder
    first on the search path, where a module beside it could hide another package's.
    """
    code = (
        f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({__file__!r})['end_with_caller'](); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    return [python, "-c", code, os.path.basename(script), *arguments]


def end_with_caller() -> None:
    """End this process soon after the one that `watching_environment` named; without such a one nothing happens."""
    parent = os.environ.pop(PARENT, "")  # popped: what this process starts ends with this process
    if parent.isdecimal() and int(parent):
        end_with(int(parent))


def end_with(parent: int) -> None:
    """End this process soon after its parent process `parent` has ended: nobody is left to take its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
