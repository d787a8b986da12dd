"""What every benchmark prints."""

from __future__ import annotations

import json

import pytest

from reporting import clean_environment, interval, report, row

KEYS = {"what", "figure", "unit", "goal", "holds", "peer"}


def test_the_last_line_is_the_report(capsys):
    rows = [
        row("time", 1.05, "of the other", "at most 1.1", True, "3 s"),
        row("memory", None, "MB", "at most 1.1", None, None),
    ]
    report("some", rows, quick=True, packages=("numpy",), source="photographs")
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert (found["benchmark"], found["quick"], found["source"]) == ("some", True, "photographs")
    assert found["machine"]["cores"] >= 1
    assert found["versions"].keys() == {"python", "numpy"}
    assert [entry.keys() == KEYS for entry in found["rows"]] == [True, True]
    assert any("1.050 of the other" in line for line in lines)
    assert any("goal: at most 1.1; beside it: 3 s  holds" in line for line in lines)


def test_a_card_is_a_fact_of_the_machine(capsys):
    report("some", [], quick=False, packages=(), card="Some Card, 80 GiB")
    first, last = capsys.readouterr().out.splitlines()
    assert "cores; Some Card, 80 GiB; python" in first
    assert json.loads(last)["machine"]["card"] == "Some Card, 80 GiB"


def test_the_interval_is_student_s():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0]) is None


def test_programs_run_without_the_settings_of_whoever_measures(monkeypatch):
    for name in ("DBT_SEED", "BASE_BACK_DIR", "PYTHONDONTWRITEBYTECODE", "SOME_OTHER"):
        monkeypatch.setenv(name, "1")
    kept = clean_environment()
    assert kept["SOME_OTHER"] == "1"
    assert not {"DBT_SEED", "BASE_BACK_DIR", "PYTHONDONTWRITEBYTECODE"} & kept.keys()
