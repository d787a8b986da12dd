"""Runs a command line in a process that is bound to one workspace."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import PROJECT, run_python

DEMO = ("--config", "configs/votes.yaml")
PROGRAM = str(PROJECT / "ensemble_orchestrator.py")
BOUND_PROGRAM = str(Path(__file__).with_name("bound_program.py"))


def run_bound(*options: str, workspace: Path) -> CompletedProcess[str]:
    """Run the command line where permissions hold, also where the tests run as root."""
    if os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("permissions do not bind root, and there are no capabilities to give up")
    return run_python(BOUND_PROGRAM, *options, *DEMO, "--workspace", str(workspace))
