"""Mutation score: `python tests/mutants/run.py [--count 200] [--seed 0]`; `make mutate N=200 SEED=0`.

Draws generated mutants of `modules`, the same number of each module as far as it has them, patches each into a copy of
the project and runs the module's tests there until one fails. Caught is also what takes longer than five times the
tests without a change, and a minute. Survivors that `survivors` knows change nothing that anybody can see; the others
are printed. Ends with 1 where fewer than 90 % of the mutants that could be caught are caught.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve()
PROJECT = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "support")]
os.environ["OMP_NUM_THREADS"] = "1"

from generate import Mutant, mutants  # noqa: E402
from modules import MODULES  # noqa: E402
from mutations import LEFT_OUT  # noqa: E402
from survivors import EQUIVALENT  # noqa: E402

GOAL = 0.9
MINUTE, TIMES = 60.0, 5.0
GIGABYTES, FILE_GIGABYTES = 16, 2
PASSED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Try the mutants; the exit code."""
    parser = argparse.ArgumentParser(prog="mutate", description="How many small changes of the code a test notices.")
    parser.add_argument("--count", type=int, default=200, help="mutants (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--modules", nargs="+", choices=tuple(MODULES), default=tuple(MODULES), help="some of them")
    parser.add_argument("--minutes", type=float, default=600.0, help="draw no more after so long")
    options = parser.parse_args(argv)
    chosen = drawn(options.count, options.seed, options.modules)
    load_packages()
    end = time.monotonic() + 60 * options.minutes
    caught, equivalent, survived = [], [], []
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        copy = Path(shutil.copytree(PROJECT, Path(name, "project"), ignore=shutil.ignore_patterns(*LEFT_OUT)))
        limits: dict[str, float] = {}
        for number, mutant in enumerate(chosen, start=1):
            if time.monotonic() > end:
                break
            if mutant.key in EQUIVALENT:
                equivalent.append(mutant)
                continue
            if mutant.module not in limits:
                limits[mutant.module] = limit_of(copy, mutant.module)
            found = caught if is_caught(copy, mutant, limits[mutant.module]) else survived
            found.append(mutant)
            print(f"{number:4} {'caught  ' if found is caught else 'SURVIVED'} {mutant.text}", flush=True)
    tried = len(caught) + len(survived)
    score = len(caught) / max(1, tried)
    for mutant in survived:
        print(f"survived: {mutant.text}\n    key: {mutant.key!r}")
    print(
        f"mutate: {len(caught)} of {tried} caught ({100 * score:.1f} %), seed {options.seed}; "
        f"{len(equivalent)} more change nothing (tests/mutants/survivors.py)"
    )
    return 0 if score >= GOAL else 1


def drawn(count: int, seed: int, modules: Sequence[str]) -> list[Mutant]:
    """Mutants in turn of each module, each module's in random order."""
    queues = []
    for module in modules:
        found = mutants(module, (PROJECT / module).read_bytes())
        random.Random(f"{seed} {module}").shuffle(found)
        queues.append(found)
    turns = max(map(len, queues))
    return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:count]


def load_packages() -> None:
    """Import what tests need, so that forks need not; nothing of the project, which differs from fork to fork."""
    for name in ("pytest", "torch", "scipy.stats", "sklearn.metrics", "PIL.Image", "pydantic", "hypothesis", "timm"):
        __import__(name)


def limit_of(copy: Path, module: str) -> float:
    """Seconds that the tests of a mutant may take. Raises RuntimeError where they fail without one."""
    start = time.monotonic()
    code = run_tests(copy, module, 20 * MINUTE)
    if code != PASSED:
        raise RuntimeError(f"tests/{MODULES[module]}: ended with {code} without any change")
    return MINUTE + TIMES * (time.monotonic() - start)


def is_caught(copy: Path, mutant: Mutant, limit: float) -> bool:
    """Whether the tests fail, or do not end, with the mutant."""
    path = copy / mutant.module
    source = path.read_bytes()
    path.write_bytes(mutant.applied(source))
    try:
        code = run_tests(copy, mutant.module, limit)
    finally:
        path.write_bytes(source)
    return code != PASSED


def run_tests(copy: Path, module: str, limit: float) -> int:
    """Run the tests of a module in a fork of this process; their exit code, or that of the kill after `limit`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)
            code = _test(copy, MODULES[module])
        finally:
            os._exit(code)
    start = time.monotonic()
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() - start > limit:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # also what tests have left
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _test(copy: Path, tests: Sequence[str]) -> int:
    import pytest

    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    for name in [name for name in os.environ if name.startswith("DBT_")]:
        del os.environ[name]
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_GIGABYTES << 30,) * 2)  # a loop that writes would fill the disk
    os.chdir(copy)
    environment = sys.prefix  # often a folder of the project, whose packages stay
    sys.path = [folder for folder in sys.path if str(PROJECT) not in folder or folder.startswith(environment)]
    sys.dont_write_bytecode = True  # two changes within a second would share one compiled file
    options = (
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--basetemp",
        str(copy.parent / "pytest"),
    )
    return int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


if __name__ == "__main__":
    sys.exit(main())
