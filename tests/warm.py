"""A program of the project in a process of its own that need not import torch again.

A server imports the large packages once per worker, and every run is a fork of it with an environment, a folder,
streams and an exit code of its own. Nothing of the project is imported before. Random states are seeded anew, so that
what depends on them still differs from run to run; the order of sets does not, which is why tests of determinism start
Python itself.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

LARGE = ("numpy", "torch", "torch._dynamo", "timm", "torchvision.transforms", "scipy.optimize", "sklearn.linear_model")
HERE = Path(__file__).resolve().parents[1]


def run(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS`: what it printed and its exit code; after `timeout` seconds it is killed."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _server().Process(target=_run, args=(list(command), dict(environment), str(cwd), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        printed = [path.read_text(encoding="utf-8") if path.is_file() else "" for path in streams]
        return subprocess.CompletedProcess(list(command), process.exitcode, *printed)


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LARGE))
    return context


def _run(command: list[str], environment: dict[str, str], cwd: str, streams: Sequence[Path]) -> None:
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    given = environment.get("PYTHONPATH")
    installed = [place for place in sys.path if "site-packages" in place or not Path(place).is_relative_to(HERE)]
    sys.path[:] = [str(Path(command[0]).parent), *(given.split(os.pathsep) if given else ()), *installed]
    sys.argv = command
    random.seed()
    sys.modules["numpy"].random.seed()
    warnings.simplefilter("error", ResourceWarning)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        threading._shutdown()  # ends pools of processes, which would be waited for in vain
        atexit._run_exitfuncs()
