"""Where messages go: the standard error of the moment, a log file that can or cannot be written."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.core import messages


@pytest.fixture
def bare_logger() -> Iterator[logging.Logger]:
    """The logger without handlers; afterwards as it was before."""
    logger = logging.getLogger(messages.LOGGER_NAME)
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers = []
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_logging_goes_to_the_standard_error_of_the_moment(
    bare_logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = logging.NullHandler()
    bare_logger.addHandler(other)
    messages.set_up_logging(level=logging.DEBUG)
    messages.set_up_logging(level=logging.INFO)
    later = io.StringIO()
    bare_logger.info("first %d", 1)
    bare_logger.debug("not shown")
    monkeypatch.setattr(sys, "stderr", later)
    bare_logger.warning("second")
    monkeypatch.undo()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d \| INFO \| first 1\n", printed.err)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \| WARNING \| second\n", later.getvalue())
    assert other in bare_logger.handlers
    assert sum(isinstance(handler, messages._Terminal) for handler in bare_logger.handlers) == 1
    assert bare_logger.propagate is False


def test_the_log_file_is_made_with_the_first_message(bare_logger: logging.Logger, tmp_path: Path) -> None:
    file, screen = tmp_path / "logs" / "run.log", io.StringIO()
    messages.set_up_logging(log_file=file, stream=screen)
    assert list(tmp_path.iterdir()) == []
    bare_logger.info("kept")
    assert file.read_text().endswith(" | INFO | kept\n")
    assert screen.getvalue() == file.read_text()
    messages.set_up_logging(stream=screen)
    bare_logger.info("on the screen only")
    assert file.read_text().count("\n") == 1


def test_a_log_file_that_cannot_be_written_is_named_once(bare_logger: logging.Logger, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    screen = io.StringIO()
    messages.set_up_logging(log_file=tmp_path / "file" / "run.log", stream=screen)
    for message in ("one", "two"):
        bare_logger.info(message)
    lines = [line.split(" | ", 1)[1] for line in screen.getvalue().splitlines()]
    assert [lines[0], lines[2]] == ["INFO | one", "INFO | two"]
    assert lines[1].startswith(f"WARNING | log file {tmp_path / 'file' / 'run.log'} cannot be written (")
    assert len(lines) == 3
