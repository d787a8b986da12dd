"""What a busy machine costs: the demo quiet and beside two busy programs, and the student's epoch by number of threads.

    python benchmarks/loaded.py            `make demo QUICK=1 DATA=digits` twice, in temporary folders; ten minutes
    python benchmarks/loaded.py --quick    the same on 160 of the digits, three epochs of the student: the proxy
    python benchmarks/loaded.py --epochs   the student's epochs alone, a minute

The busy programs are niced to 10, as guests on a shared machine are; `--busy N` starts another number of them. Quiet is
whatever else the machine does, so the load average goes into the report. An epoch is that of the demo's student,
CustomMobileOne on 1,280 images of 32 px in batches of 32, with the number of threads of `utils/threads.py`, with two
that wait passively, with two by OpenMP's default (they spin for a while, then sleep) and with two that spin. Each takes
one epoch in turn. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reporting import clean_environment, report, row

PROJECT = Path(__file__).resolve().parents[1]
GOAL = 2.5
DIGITS, FEW_DIGITS = 1797, 160
BUSY = "import os\nparent = os.getppid()\nos.nice(10)\nwhile os.getppid() == parent:\n    sum(range(100_000))"
MOST_SECONDS = 60  # of one epoch that is given up
LEFT_OUT = 4  # exit code of a demo that left something out, which it names
VARIANTS = {
    "one thread, as the table has it": (1, "PASSIVE"),
    "two threads that sleep": (2, "PASSIVE"),
    "two threads, OpenMP's default": (2, None),
    "two threads that spin": (2, "ACTIVE"),
}
"""Name -> number of threads and how they wait."""
EPOCH = """
import sys, time
sys.path.insert(0, sys.argv[1] + "/BASE-BACK/src")
import torch
from models import create_custom_backbone
torch.manual_seed(0)
model = create_custom_backbone("CustomMobileOne", 10, size="tiny", img_size=32).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
def steps(count):
    for _ in range(count):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
steps(3)
print("ready")
for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    steps(40)
    print(time.perf_counter() - start, time.process_time() - cpu)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows; returns 0, also where the goal is missed."""
    parser = argparse.ArgumentParser(prog="loaded.py", description="What a busy machine costs.")
    parser.add_argument("--quick", action="store_true", help="the demo on 160 digits; not the one to report")
    parser.add_argument("--epochs", action="store_true", help="the student's epochs alone")
    parser.add_argument("--busy", metavar="N", type=int, default=2, help="busy programs (default: 2)")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    rows = [] if options.epochs else demo_rows(options.busy, FEW_DIGITS if options.quick else DIGITS)
    rows += epoch_rows(options.busy, 3 if options.quick or options.epochs else 10)
    report("loaded", rows, quick=options.quick, packages=("torch",), busy=options.busy, load_at_start=round(load, 1))
    return 0


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside the block `count` niced programs use a core each; they also end with this process."""
    programs = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def demo_rows(n_busy: int, n_digits: int) -> list[dict]:
    """The demo quiet and beside busy programs."""
    quiet, quiet_cpu = demo_seconds(n_digits)
    with busy(n_busy):
        loaded, loaded_cpu = demo_seconds(n_digits)
    what = "make demo QUICK=1 DATA=digits" if n_digits == DIGITS else f"its proxy on {n_digits} digits"
    beside = f"{loaded:.0f} s / {quiet:.0f} s; CPU {loaded_cpu:.0f} s / {quiet_cpu:.0f} s"
    ratio = loaded / quiet
    return [
        row(f"{what} beside {n_busy} busy programs / quiet", ratio, "times", f"{GOAL}", ratio <= GOAL, beside),
        row("its CPU time beside them / quiet, without trainings", loaded_cpu / quiet_cpu, "times", None, None, None),
    ]


def demo_seconds(n_digits: int) -> tuple[float, float]:
    """Wall and CPU seconds of a demo from nothing to a report. Raises CalledProcessError where a step fails.

    The system does not count the workers of the base pipeline, which are children of a server that nothing waits for.
    """
    sys.path.insert(0, str(PROJECT))
    from utils.operations.demo import workspace_of, write_digits

    with tempfile.TemporaryDirectory(prefix="loaded-") as folder:
        data = Path(folder, "digits")
        write_digits(data)
        for path in sorted(data.glob("*/*"), key=lambda path: path.name)[n_digits:]:
            path.unlink()
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, str(PROJECT / "ensemble_orchestrator.py"), "demo", "--quick", "--data", str(data)]
        done = subprocess.run(command, env=clean_environment(), stdout=subprocess.DEVNULL, check=False)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        shutil.rmtree(workspace_of(data), ignore_errors=True)
    if done.returncode not in (0, LEFT_OUT):
        raise subprocess.CalledProcessError(done.returncode, command)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def epoch_rows(n_busy: int, n_epochs: int) -> list[dict]:
    """The student's epochs beside busy programs, the numbers of threads in turns."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="loaded-"))
        students = {name: stack.enter_context(student(*facts, folder)) for name, facts in VARIANTS.items()}
        stack.enter_context(busy(n_busy))
        seconds: dict[str, list[list[float]]] = {name: [] for name in students}
        for _ in range(n_epochs):
            for name, process in students.items():
                if (figure := epoch(process)) is not None:
                    seconds[name].append(figure)
    rows = []
    for name, epochs in seconds.items():
        figures, cpu = [wall for wall, _ in epochs], statistics.median(cpu for _, cpu in epochs) if epochs else 0
        beside = "given up"
        if figures:
            beside = f"{min(figures):.1f} to {max(figures):.1f} s, {len(figures)} epochs; CPU {cpu:.1f} s"
        what = f"student's epoch beside {n_busy} busy programs, {name}"
        rows.append(row(what, statistics.median(figures) if figures else None, "s", None, None, beside))
    return rows


@contextmanager
def student(threads: int, policy: str | None, folder: str) -> Iterator[subprocess.Popen[str]]:
    """A process that trains one epoch for each line that it is sent, and answers with the seconds."""
    environment = {"DBT_BASE_DIR": folder, "OMP_NUM_THREADS": str(threads)}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    command = [sys.executable, "-u", "-c", EPOCH, str(PROJECT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, env=clean_environment() | environment, **pipes) as process:
        process.stdout.readline()  # it is ready
        try:
            yield process
        finally:
            process.kill()


def epoch(process: subprocess.Popen[str]) -> list[float] | None:
    """Wall and CPU seconds of one more epoch; None where it takes too long, which ends the process."""
    if process.poll() is not None:
        return None
    process.stdin.write("\n")
    if not select.select([process.stdout], [], [], MOST_SECONDS)[0]:
        process.kill()
        process.wait()
        return None
    return [float(figure) for figure in process.stdout.readline().split()]


if __name__ == "__main__":
    sys.exit(main())
