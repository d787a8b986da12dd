"""Tests run without pytest-xdist as well: `-p no:xdist`, as in tests/mutants/run.py."""

from __future__ import annotations

import subprocess
import sys

from conftest import PROJECT


def test_tests_run_in_one_process_where_xdist_is_switched_off():
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    call = [sys.executable, "-m", "pytest", *options, "tests/numeric/test_means.py"]
    ended = subprocess.run(call, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
