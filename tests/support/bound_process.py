"""Runs a command line in a process that is bound to one workspace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

DEMO = ("--config", "configs/votes.yaml")
PROGRAM = str(PROJECT / "ensemble_orchestrator.py")
BOUND_PROGRAM = str(Path(__file__).with_name("bound_program.py"))


def run_bound(*options: str, workspace: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line where permissions hold, also where the tests run as root."""
    if os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("permissions do not bind root, and there are no capabilities to give up")
    command = [sys.executable, BOUND_PROGRAM, *options, *DEMO, "--workspace", str(workspace)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DBT_") and key != "BASE_BACK_DIR"}
    return subprocess.run(command, cwd=PROJECT, env=clean, capture_output=True, text=True, timeout=300, check=False)
