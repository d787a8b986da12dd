"""The orchestrator's command line as a program of its own with empty figures, for tests that look at none of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from in_process import empty_figures

import ensemble_orchestrator

PROGRAM = str(Path(__file__).resolve())


def main() -> int:
    """The exit code of the command line."""
    with empty_figures():
        return ensemble_orchestrator.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
