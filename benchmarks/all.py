"""Every benchmark, one after the other, and one table of goals, figures and whether they hold.

    make bench                             all but gpu and cluster, over two hours; measure with nothing else running
    make bench QUICK=1                     their smaller forms, not the ones to report
    make bench ARGS="pipeline"             some of them by name
    make bench ARGS="--continue"           all but those whose report is kept already, which is shown with its commit

Each program's own output goes to stderr; its last line, one JSON object, is kept in `benchmarks/zoo/reports`
as soon as it is there. The table is Markdown; the last line of the output is one JSON object that holds all reports.
Ends with 1 where a program failed; a goal that is missed is no failure.
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
sys.path.insert(0, str(FOLDER.parent))

from utils.core.artifacts import write_text  # noqa: E402

# By `make gpu` or by name: most machines have no CUDA device, and most environments no Ray.
ELSEWHERE = ("gpu", "cluster")
HEADER = ("row", "figure", "goal", "")
VERDICTS = {True: "pass", False: "SHORT", None: "not measured"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run those that are named, or all that need no special machine; returns the exit code."""
    known = programs()
    parser = argparse.ArgumentParser(prog="make bench", description="All benchmarks and one table.")
    default = f"(default: all but {' and '.join(ELSEWHERE)})"
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} {default}")
    parser.add_argument("--quick", action="store_true", help="the smaller forms, not the ones to report")
    parser.add_argument("--continue", dest="kept", action="store_true", help="do not repeat those that are kept")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no benchmark called {', '.join(unknown)}; there are {', '.join(known)}")
    reports, failed = [], []
    for name in options.names or [name for name in known if name not in ELSEWHERE]:
        keep = FOLDER / "zoo" / "reports" / f"{name}{'-quick' if options.quick else ''}.json"
        if options.kept and keep.is_file():
            reports.append(json.loads(keep.read_text(encoding="utf-8")))
            continue
        start = time.monotonic()
        found = run(FOLDER / f"{name}.py", quick=options.quick)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if found is None:
            failed.append(name)
            continue
        reports.append(found | {"seconds": round(time.monotonic() - start), "commit": commit()})
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_text(keep, json.dumps(reports[-1]))
    print("\n".join(table(reports, failed)))
    print(json.dumps({"benchmark": "all", "quick": options.quick, "failed": failed, "reports": reports}))
    return 1 if failed else 0


def commit() -> str:
    """The short name of what is checked out, with a plus where files differ from it; "unknown" outside of git."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


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
    """Rows that have a goal, in Markdown: what, figure, goal, verdict; then how many hold."""
    cells = [HEADER]
    for found in reports:
        form = " (quick)" if found.get("quick") else ""
        spent = f"{found['seconds']} s, commit {found['commit']}" if "commit" in found else ""
        cells.append((f"**{found['benchmark']}**{form}", "", "", spent))
        for entry in found["rows"]:
            if entry["goal"] is not None:
                figure = "" if entry["figure"] is None else f"{entry['figure']:.3f} {entry['unit']}".rstrip()
                cells.append((entry["what"], figure, entry["goal"], VERDICTS[entry["holds"]]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    verdicts = [entry["holds"] for found in reports for entry in found["rows"] if entry["goal"] is not None]
    missing = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    counts = f"{verdicts.count(True)} pass, {verdicts.count(False)} short, {verdicts.count(None)} not measured"
    return [*lines, "", counts + missing]


if __name__ == "__main__":
    sys.exit(main())
