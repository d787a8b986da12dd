"""Progress bars appear on a terminal, disappear at the end, and are nowhere else."""

from __future__ import annotations

import logging
import os
import pty
import select
import sys
import termios

import pytest

from utils.core import messages
from utils.core.progress_bar import progress_bar


@pytest.fixture
def terminal():
    """A terminal to write to, and what was written there."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 80))

    def written() -> str:
        parts = []
        while select.select([reading], [], [], 0.2 if parts else 5)[0]:  # one read gives a part of it
            parts.append(os.read(reading, 100_000))
        return b"".join(parts).decode()

    with os.fdopen(writing, "w", buffering=1) as stream:
        yield stream, written
    os.close(reading)


@pytest.fixture
def logger():
    logger = logging.getLogger(messages.LOGGER_NAME)
    before = list(logger.handlers), logger.level, logger.propagate
    yield logger
    logger.handlers, logger.level, logger.propagate = before


def test_a_terminal_shows_the_part_done_with_messages_above_and_nothing_at_the_end(terminal, logger, monkeypatch):
    stream, written = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    messages.set_up_logging(stream=stream)
    with progress_bar(10, "CustomConvNeXt") as advance:
        advance(10)
        logger.info("half")
    shown = written()
    assert "CustomConvNeXt" in shown
    assert "0/10" in shown
    assert "| INFO | half" in shown
    last = shown.replace("\r\n", "\n").split("\n")[-1]
    assert last.split("\r")[-1].strip() == ""


def test_a_terminal_that_shows_warnings_alone_gets_no_bar(terminal, logger, monkeypatch):
    stream, written = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    messages.set_up_logging(level=logging.WARNING, stream=stream)
    with progress_bar(10, "x") as advance:
        advance(5)
    print("end", file=stream)
    assert written().strip() == "end"


def test_elsewhere_there_is_none(logger, capsys):
    messages.set_up_logging(stream=sys.stderr)
    with progress_bar(10, "x") as advance:
        advance(5)
    assert capsys.readouterr().err == ""
