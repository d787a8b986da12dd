"""Every benchmark, one after the other, and one table of goals, figures and whether they hold.

    make bench                      all of them, nearly two hours; no figure counts taken beside other work
    make bench QUICK=1              their smaller forms, not the ones to report
    make bench ARGS="pipeline"      some of them by name

Each program's own output goes to stderr and its last line, one JSON object, is read. The last line of the output is one
JSON object that holds all of them. Ends with 1 where a program failed; a goal that is missed is no failure.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
WIDTH = 78


def main(argv: Sequence[str] | None = None) -> int:
    """Run those that are named, or all; returns the exit code."""
    known = programs()
    parser = argparse.ArgumentParser(prog="make bench", description="All benchmarks and one table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the smaller forms, not the ones to report")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are {', '.join(known)}")
    reports, failed = [], []
    for name in options.names or known:
        start = time.monotonic()
        found = run(FOLDER / f"{name}.py", quick=options.quick)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if found is None:
            failed.append(name)
        else:
            reports.append(found)
    print("\n".join(table(reports, failed)))
    print(json.dumps({"benchmark": "all", "quick": options.quick, "failed": failed, "reports": reports}))
    return 1 if failed else 0


def programs() -> list[str]:
    """Names of the programs beside this one that end with a report."""
    return sorted(
        path.stem
        for path in FOLDER.glob("*.py")
        if path.stem not in ("all", "reporting") and _calls_report(ast.parse(path.read_text(encoding="utf-8")))
    )


def _calls_report(tree: ast.Module) -> bool:
    imported = any(
        isinstance(node, ast.ImportFrom)
        and node.module == "reporting"
        and any(alias.name == "report" for alias in node.names)
        for node in ast.walk(tree)
    )
    has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    return imported and has_main


def run(program: Path, *, quick: bool) -> dict[str, Any] | None:
    """The report of one program; None where it failed."""
    command = [sys.executable, str(program), *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    try:
        found = json.loads(lines[-1])
    except ValueError:
        return None
    return found if isinstance(found, dict) and "rows" in found else None


def table(reports: Sequence[dict[str, Any]], failed: Sequence[str]) -> list[str]:
    """Rows that have a goal: what, figure, goal, pass or short; then what has none to be held against."""
    lines = [f"{'':{WIDTH}} {'figure':>10}  {'':6} goal"]
    for found in reports:
        lines.append(f"{found['benchmark']}{' (quick)' if found.get('quick') else ''}")
        for entry in found["rows"]:
            if entry["goal"] is None:
                continue
            figure = "-" if entry["figure"] is None else f"{entry['figure']:.3f}"
            verdict = {True: "pass", False: "SHORT", None: "-"}[entry["holds"]]
            lines.append(f"  {entry['what'][: WIDTH - 2]:{WIDTH - 2}} {figure:>10}  {verdict:6} {entry['goal']}")
    verdicts = [entry["holds"] for found in reports for entry in found["rows"] if entry["goal"] is not None]
    missing = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    lines.append(
        f"{verdicts.count(True)} pass, {verdicts.count(False)} short, {verdicts.count(None)} not measured{missing}"
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
