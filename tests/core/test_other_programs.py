"""What other programs use of the processor."""

from __future__ import annotations

import pytest

from utils.core import other_programs
from utils.core.other_programs import OtherPrograms


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that sets seconds of the clock, of this program, and of work of the whole machine."""
    path = tmp_path / "stat"
    monkeypatch.setattr(other_programs, "COUNTERS", path)
    monkeypatch.setattr(other_programs.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(other_programs.os, "cpu_count", lambda: 2)

    def at(seconds: float, own: float, total: float) -> None:
        monkeypatch.setattr(other_programs.time, "monotonic", lambda: seconds)
        monkeypatch.setattr(other_programs, "_own_seconds", lambda: own)
        path.write_text(f"cpu  {round(100 * total)} 0 0 7777 5 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")

    return at


def test_what_this_program_does_itself_does_not_count(machine):
    machine(10.0, 4.0, 50.0)
    others = OtherPrograms()
    machine(20.0, 13.0, 62.0)
    assert others.cores() == pytest.approx(0.3)
    assert others.in_the_way(threads=1) is None
    assert others.in_the_way(threads=2) == 0.3


def test_waiting_for_disks_is_no_work(machine):
    machine(0.0, 0.0, 0.0)
    others = OtherPrograms()
    machine(10.0, 1.0, 0.5)
    assert others.cores() == 0


def test_a_system_without_counters_does_not_tell(machine):
    machine(0.0, 0.0, 0.0)
    others = OtherPrograms()
    machine(10.0, 1.0, 9.0)
    other_programs.COUNTERS.write_text("none")
    assert others.cores() is None
    assert others.in_the_way(threads=8) is None
