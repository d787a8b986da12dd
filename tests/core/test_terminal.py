"""What is written to standard output and error: styles stay, other control characters do not."""

from __future__ import annotations

import pytest

from utils.core import terminal
from utils.core.errors import UserError
from utils.evaluation import leaderboard


def test_styles_of_tables_stay_and_commands_to_the_terminal_are_written_out(capsys):
    styled = f"{leaderboard.BOLD}best{leaderboard.PLAIN} {leaderboard.FAINT}other{leaderboard.PLAIN}"
    terminal.write_output(f"{styled}\n\tna\u00efve \x1b[2J\x1b[31m\x9b1m\x07\u202e\udcff")
    assert capsys.readouterr().out == f"{styled}\n\tna\u00efve \\x1b[2J\\x1b[31m\\x9b1m\\x07\\u202e\\xff\n"
    terminal.write_error("left out: \x1b[1mx\r")
    assert capsys.readouterr().err == "left out: \\x1b[1mx\\r\n"


def test_a_full_disk_is_an_error_and_no_later_flush_fails(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(UserError, match="standard output: cannot be written \\(No space left on device\\)"):
            terminal.write_output("x" * 100_000)
        terminal.flush_output()
