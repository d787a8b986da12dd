"""Run programs of the project in processes of their own and log their messages as they arrive."""

from __future__ import annotations

import logging
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

logger = logging.getLogger("disease_pipeline")

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \| (?P<level>[A-Z]+) \| (?P<text>.*)")
"""A message as this project's logger and the base pipeline's write it."""
LAST_LINES = 3  # of the messages of a failed program


def run_program(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str, list[str]]:
    """Run a program and return (exit code, stdout, last lines of its messages). It is terminated with the caller."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        options: dict[str, Any] = {"text": True, "encoding": "utf-8", "errors": "replace", "env": dict(environment)}
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
