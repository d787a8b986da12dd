"""The bar of a training: on a terminal with the time left, nowhere else, and messages stand above it."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

from training.stages import _Progress
from utils import logs


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_is_done_and_the_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with logs.progress_bar(4, "training") as advance:
        advance(3, "about 20 s left")
    shown = terminal.getvalue()
    assert "training 0/4" in shown
    assert "training 3/4" in shown
    assert "about 20 s left" in shown
    assert shown.split("\r")[-1].strip() == ""


def test_messages_stand_on_lines_of_their_own_above_the_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logs.TerminalHandler(terminal)
    with logs.progress_bar(4, "training") as advance:
        advance(1, "")
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "one fold", None, None))
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert "one fold" in lines


def test_elsewhere_nothing_is_shown(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with logs.progress_bar(4, "training") as advance:
        advance(4, "about 0 s left")
    assert stream.getvalue() == ""


def test_each_unit_that_ends_moves_it_and_a_failed_one_says_so():
    moved = []
    unit = SimpleNamespace(name="a fold 0", kind="fold", recipe=SimpleNamespace(is_frozen=False))
    progress = _Progress([unit, unit], lambda count, text: moved.append((count, text)))
    progress.drop(unit)
    assert moved == [(1, "a fold 0 failed")]
