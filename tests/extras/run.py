"""Tests of optional packages, each in an environment that has them: `make test-extras`.

    python tests/extras/run.py [NAME ...] [--due]

Elsewhere these tests are skipped, so a defect would stay unseen. With `--due`, as CI calls it, those that have passed
this week with the same sources are not repeated. `passed.json` records what has passed; commit it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

PROJECT = Path(__file__).resolve().parents[2]
PASSED = Path(__file__).with_name("passed.json")
ENVIRONMENT = "scripts/environment.py"


@dataclass(frozen=True)
class Extra:
    """The tests of one optional package."""

    environment: tuple[str, ...]
    """Arguments of `scripts/environment.py`."""
    interpreter: str
    """That runs the tests."""
    tests: tuple[str, ...]
    """Arguments of pytest."""
    sources: tuple[str, ...]
    """Patterns of the files that the tests depend on most."""
    extra: str | None = None
    """Extra of `pyproject.toml` that the interpreter needs as well."""


EXTRAS = {
    "ray": Extra(
        environment=("--environment", ".venv-ray"),
        interpreter=".venv-ray/bin/python",
        tests=(
            *("tests/core/test_engines.py", "tests/base_back/test_base_ray.py"),
            *("tests/benchmarks/test_cluster_benchmark.py", "-k", "ray or Ray"),
        ),
        sources=(
            *("utils/core/engines.py", "utils/numeric/setting_paths.py", "utils/numeric/setting_search.py"),
            *("utils/predictions/extraction.py", "BASE-BACK/src/training/ray_pool.py", "benchmarks/cluster.py"),
            *("tests/core/test_engines.py", "tests/base_back/test_base_ray.py", "pyproject.toml"),
            "tests/benchmarks/test_cluster_benchmark.py",
        ),
        extra="ray",
    ),
    "tflite": Extra(
        environment=("--environment", ".venv-tflite", "--requirements", "scripts/requirements-tflite.txt"),
        interpreter=".venv/bin/python",
        tests=("tests/exporting/test_export.py", "-k", "tflite_is_converted and float-nchw"),
        sources=("utils/exporting/tflite*.py", "scripts/requirements-tflite.txt", "tests/exporting/test_export.py"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests that are named, or all, or those that are due; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make test-extras", description="Tests of optional packages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXTRAS)} (default: all)")
    parser.add_argument("--due", action="store_true", help="leave out what passed this week with the same sources")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.names if name not in EXTRAS]:
        parser.error(f"no extra called {', '.join(unknown)}; there are {', '.join(EXTRAS)}")
    passed = json.loads(PASSED.read_text(encoding="utf-8")) if PASSED.is_file() else {}
    failed = []
    for name in options.names or EXTRAS:
        now = state(EXTRAS[name])
        if options.due and passed.get(name) == now:
            print(f"extra {name}: passed in {now['week']} with these sources", flush=True)
        elif passes(EXTRAS[name]):
            passed[name] = now
            PASSED.write_text(json.dumps(passed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        else:
            failed.append(name)
    if failed:
        print(f"extras that failed: {', '.join(failed)}. Repeat: make test-extras ARGS={failed[0]}", file=sys.stderr)
    return 1 if failed else 0


def state(extra: Extra, project: Path = PROJECT, today: date | None = None) -> dict[str, str]:
    """Return what makes the tests due where it changes: `{sources, week}`. Raises SystemExit for a missing source."""
    digest = hashlib.sha256()
    for pattern in extra.sources:
        files = sorted(project.glob(pattern))
        if not files:
            raise SystemExit(f"tests/extras/run.py: no file {pattern}; correct the sources of the extra")
        for path in files:
            digest.update(path.relative_to(project).as_posix().encode() + b"\0" + path.read_bytes())
    year, week, _ = (today or date.today()).isocalendar()
    return {"sources": digest.hexdigest(), "week": f"{year}-W{week:02d}"}


def passes(extra: Extra) -> bool:
    """Make the environment and run the tests there; a test that is skipped has not passed."""
    commands = [[sys.executable, ENVIRONMENT, *extra.environment]]
    if extra.extra is not None:
        commands.append([extra.interpreter, "-m", "pip", "install", "-q", *requirements(extra.extra)])
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        pytest = ["-m", "pytest", "-q", "-rs", "-p", "no:xdist", "-m", "not gpu and not browser"]
        commands.append([extra.interpreter, *pytest, f"--junitxml={results}", *extra.tests])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for command in commands:
            if subprocess.run(command, cwd=PROJECT, env=environment, check=False).returncode != 0:
                return False
        return none_skipped(results)


def requirements(extra: str) -> list[str]:
    """Return the requirements of an extra of `pyproject.toml`."""
    content = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = content["project"]["optional-dependencies"][extra]
    return found


def none_skipped(results: Path) -> bool:
    """Return whether no test of a JUnit file was skipped; pytest itself fails where there are no tests."""
    n_skipped = sum(int(suite.get("skipped", 0)) for suite in ElementTree.parse(results).getroot().iter("testsuite"))
    if n_skipped:
        print(f"{n_skipped} tests were skipped, which must run in this environment")
    return not n_skipped


if __name__ == "__main__":
    sys.exit(main())
