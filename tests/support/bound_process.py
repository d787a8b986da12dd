"""Runs a command line in a process that is bound to one workspace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

DEMO = ("--config", "configs/votes.yaml")


PROGRAM = str(PROJECT / "ensemble_orchestrator.py")


def bound_by_permissions() -> list[str]:
    """What to put before a command so that permissions hold for it, also where the tests run as root."""
    if os.geteuid() != 0:
        return []
    without = ["--inh-caps=-dac_override", "--bounding-set=-dac_override"]
    if shutil.which("setpriv") is None:
        pytest.skip("permissions do not bind root, and there is no setpriv to give up its privilege")
    return ["setpriv", *without]


def run_bound(*options: str, workspace: Path) -> subprocess.CompletedProcess[str]:
    command = [*bound_by_permissions(), sys.executable, PROGRAM, *options, *DEMO, "--workspace", str(workspace)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DBT_") and key != "BASE_BACK_DIR"}
    return subprocess.run(command, cwd=PROJECT, env=clean, capture_output=True, text=True, timeout=300, check=False)
