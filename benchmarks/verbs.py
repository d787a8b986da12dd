"""How long a newcomer waits: `--help`, the answer to a typing mistake, both demos, `make test`, after installation.

    python benchmarks/verbs.py            all of them, one after the other: about half an hour
    python benchmarks/verbs.py --quick    `--help` and typing mistakes alone

Demos and tests run in fresh clones of what is committed here, on the environment that is installed (`.venv`); the
clones are removed. `--help` takes turns with an interpreter that does nothing. The typing mistakes are those of
`tests/support/typing_mistakes.py`, in a workspace that is built for them; each answer has to name what was meant in its
first line. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]
from typing_mistakes import MISTAKES, first_line  # noqa: E402

HELP_SECONDS, MISTAKE_SECONDS = 0.3, 0.5
TURNS = 11
MISTAKE_TURNS = 3  # of each mistake
LEFT_OUT = 4  # a demo that finished without some requested part
KEPT_LINES = 5
OF_MAKE = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "QUICK", "DATA", "DEMO_DATA", "ARGS")
"""What `make bench` hands down, and would make another demo of this one."""


@dataclass(frozen=True)
class Verb:
    """A verb of the Makefile, and how long it may take."""

    arguments: tuple[str, ...]
    seconds: int
    fine: tuple[int, ...] = (0,)
    """Exit codes with which it did what it promises."""

    @property
    def what(self) -> str:
        """As a person types it."""
        return " ".join(("make", *self.arguments))


VERBS = (
    Verb(("demo", "QUICK=1"), 240, (0, LEFT_OUT)),
    Verb(("demo",), 720, (0, LEFT_OUT)),
    Verb(("test",), 360),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where a goal is missed."""
    parser = argparse.ArgumentParser(prog="verbs.py", description="Seconds of --help, mistakes, demos, tests.")
    parser.add_argument("--quick", action="store_true", help="--help and typing mistakes alone")
    options = parser.parse_args(argv)
    rows = [help_row(), *mistakes_rows()]
    for verb in VERBS:
        rows.append(not_measured(verb) if options.quick else measured(verb))
    report("verbs", rows, quick=options.quick, packages=("torch", "numpy", "pytest"))
    return 0


def help_row() -> dict[str, Any]:
    """Median seconds of `--help` beside those of an interpreter that does nothing, in turns."""
    ours, bare = [], []
    for _ in range(TURNS):
        ours.append(timed([sys.executable, "ensemble_orchestrator.py", "--help"])[0])
        bare.append(timed([sys.executable, "-c", "pass"])[0])
    median = statistics.median(ours)
    spread = f"{min(ours):.2f} to {max(ours):.2f} s; python alone: {statistics.median(bare):.2f} s"
    return row("--help", median, "s", f"under {HELP_SECONDS}", median < HELP_SECONDS, spread)


def mistakes_rows() -> list[dict[str, Any]]:
    """How many typing mistakes are answered by what was meant, and the median seconds of the slowest answer."""
    medians, wrong = {}, []
    with tempfile.TemporaryDirectory(prefix="mistakes-") as name:
        folder = Path(name).resolve()
        make_workspace(folder)
        for mistake in MISTAKES:
            command = [sys.executable, "ensemble_orchestrator.py", *mistake.words(folder)]
            runs = [timed(command, code=mistake.code) for _ in range(MISTAKE_TURNS)]
            medians[mistake.typed] = statistics.median(seconds for seconds, _ in runs)
            if any(mistake.meant not in first_line(stderr) for _, stderr in runs):
                wrong.append(mistake.typed)
    slowest = max(medians, key=lambda typed: medians[typed])
    beside = f"{slowest}; median of all {statistics.median(medians.values()):.2f} s"
    return [
        row(
            "typing mistakes answered by what was meant, in the first line",
            len(MISTAKES) - len(wrong),
            "",
            f"all {len(MISTAKES)}",
            not wrong,
            "; ".join(wrong) or None,
        ),
        row(
            f"slowest of {len(MISTAKES)} typing mistakes",
            medians[slowest],
            "s",
            f"under {MISTAKE_SECONDS}",
            medians[slowest] < MISTAKE_SECONDS,
            beside,
        ),
    ]


def make_workspace(folder: Path) -> None:
    """`work` with votes of three imported members, and `photos` beside it."""
    import given_predictions
    from PIL import Image

    given_predictions.write(folder / "given")
    (folder / "photos" / "1").mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "photos" / "1" / "0001.png")
    (folder / "work").mkdir()
    for words in (
        ("import-predictions", "--from", str(folder / "given")),
        ("build-ensemble", "--config", "configs/votes.yaml", "--set", "exports.enable=true"),
    ):
        timed([sys.executable, "ensemble_orchestrator.py", *words, "--workspace", str(folder / "work")])


def timed(command: Sequence[str], *, code: int = 0) -> tuple[float, str]:
    """Wall time of a command in the project's folder and what it says on standard error.

    Raises RuntimeError where it ends with another exit code.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode != code:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return seconds, done.stderr


def measured(verb: Verb) -> dict[str, Any]:
    """Wall time of a verb in a clone of its own; one that fails holds no goal."""
    with tempfile.TemporaryDirectory(prefix="verbs-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(clone)], check=True)
        (clone / ".venv").symlink_to(PROJECT / ".venv")
        start = time.perf_counter()
        done = subprocess.run(
            ["make", *verb.arguments],
            cwd=clone,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
    last = done.stdout.strip().splitlines()[-KEPT_LINES:]
    print("\n".join((f"{verb.what}: {seconds:.0f} s", *last)), file=sys.stderr, flush=True)
    return judged(verb, seconds, done.returncode, last[-1] if last else "")


def environment() -> dict[str, str]:
    """This process's, as a newcomer has it."""
    return {name: value for name, value in clean_environment().items() if name not in OF_MAKE}


def judged(verb: Verb, seconds: float, code: int, description: str) -> dict[str, Any]:
    """The row of a verb that ended so."""
    well = code in verb.fine
    beside = description if well else f"ended with {code}: {description}"
    return row(verb.what, seconds, "s", f"at most {verb.seconds}", well and seconds <= verb.seconds, beside)


def not_measured(verb: Verb) -> dict[str, Any]:
    """The row of a verb that takes longer than this form may."""
    return row(verb.what, None, "s", f"at most {verb.seconds}", None, "not with --quick")


if __name__ == "__main__":
    sys.exit(main())
