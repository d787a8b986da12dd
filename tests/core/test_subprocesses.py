"""Programs in processes of their own: their result, their messages, and their end with the caller."""

from __future__ import annotations

import logging
import os
import sys

import pytest

from utils.core import subprocesses


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
