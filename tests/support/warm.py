"""Python programs of the project, in processes of their own that need not import torch again.

A server imports the large packages once per worker, and every run is a fork of it with an environment, a folder,
streams, a session and an exit code of its own, which can be killed like any other. Nothing of the project is imported
before. Processes that such a program spawns by multiprocessing are forks of it. Random states are seeded anew, so that
what depends on them still differs from run to run; the order of sets does not, which is why tests of determinism start
Python itself (`python -u`).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import own_folders

LARGE = (
    *("numpy", "torch", "torch._dynamo", "timm", "torchvision.transforms", "scipy.optimize", "sklearn.linear_model"),
    *("onnxruntime", "safetensors.torch", "PIL.Image", "yaml", "pydantic", "jinja2"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)
HERE = Path(__file__).resolve().parents[2]
RUNS_A_PATH = "import gc, runpy, sys; gc.set_threshold("
"""How `utils.core.subprocesses.script_command` starts a script."""


def suits(command: Any) -> bool:
    """Whether a program may run so: a script by this interpreter, without options."""
    if sys.platform != "linux" or os.getpid() != _owner or not isinstance(command, (list, tuple)) or len(command) < 2:
        return False
    program, first = (os.fspath(part) for part in command[:2])
    if program != sys.executable:
        return False
    if first == "-c":
        return command[2].startswith(RUNS_A_PATH)
    return first.endswith(".py")


class Popen(subprocess.Popen):
    """`subprocess.Popen`, whose programs are forks of the server where that suits."""

    _process: Any = None

    def _execute_child(
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
    ):
        given, streams, session = rest[0], (rest[3], rest[5]), rest[-2]
        plain = not (executable or preexec_fn or pass_fds or shell) and given in (-1, getattr(self, "_devnull", -1))
        if not plain or -1 in streams or not suits(args):
            super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *rest
            )
            return
        ready, ready_writer = os.pipe()
        try:
            command, environment = [os.fspath(part) for part in args], dict(os.environ if env is None else env)
            handles = [_Handle(number) for number in (*streams, ready_writer)]
            place = os.getcwd() if cwd is None else str(cwd)
            given_to_run = (command, environment, place, own_folders.watched(), session, *handles)
            self._process = _server().Process(target=_run, args=given_to_run)
            self._process.start()
        finally:
            os.close(ready_writer)
        self.pid = self._process.pid
        self._child_created = True
        os.read(ready, 1)  # from here on it has streams and a session of its own
        os.close(ready)
        self._close_pipe_fds(*rest[:6])

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._process is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._process is None:
            return super()._wait(timeout)
        self._process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


class _Handle:
    """A stream of this process; in the child the number that it has there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _detached, (reduction.DupFd(self.number),)


def _detached(handle: Any) -> int:
    return handle.detach()


_owner = os.getpid()


@cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LARGE))
    return context


_get_context = multiprocessing.get_context


def _forks_for_spawn(method: str | None = None) -> Any:
    return _get_context("fork" if method == "spawn" else method)


def _keep_operators() -> None:
    """Do not unregister 188 libraries of operators, one after the other, when this process ends (10 ms)."""
    for finalizer in list(weakref.finalize._registry):
        if (alive := finalizer.peek()) and alive[1].__module__ == "torch.library":
            finalizer.atexit = False


def _run(
    command: Sequence[str],
    environment: Mapping[str, str],
    place: str,
    watched: Sequence[str],
    session: bool,
    out: int,
    err: int,
    ready_writer: int,
) -> None:
    gc.freeze()  # what the server has imported stays, so that no collection needs to look at it
    _keep_operators()
    if session:
        os.setsid()
    for number, stream in ((1, out), (2, err)):
        os.dup2(stream, number)
        os.close(stream)
    # New ones, since the server's know whether their files can be sought in.
    sys.stdout = os.fdopen(1, "w", encoding=environment.get("PYTHONIOENCODING", "utf-8"), closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    if "DBT_PARENT" in environment:
        os.environ["DBT_PARENT"] = str(os.getppid())  # the server, which ends with the caller
    os.chdir(place)
    for folder in watched:
        own_folders.watch(Path(folder))
    os.write(ready_writer, b"1")
    os.close(ready_writer)
    given = environment.get("PYTHONPATH")
    installed = [path for path in sys.path if "site-packages" in path or not Path(path).is_relative_to(HERE)]
    code = command[2] if command[1] == "-c" else None
    first = "" if code else str(Path(command[1]).parent)
    sys.path[:] = [first, *(given.split(os.pathsep) if given else ()), *installed]
    sys.argv = ["-c", *command[3:]] if code else list(command[1:])
    multiprocessing.get_context = _forks_for_spawn  # type: ignore[assignment]
    random.seed()
    sys.modules["numpy"].random.seed()
    if environment.get("PYTHONWARNINGS") == "ignore":
        warnings.simplefilter("ignore")
    elif "ResourceWarning" in environment.get("PYTHONWARNINGS", ""):
        warnings.simplefilter("error", ResourceWarning)
    try:
        if code:
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_path(command[1], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        threading._shutdown()  # ends pools of processes, which would be waited for in vain
        atexit._run_exitfuncs()
