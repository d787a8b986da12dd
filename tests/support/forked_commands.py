"""Commands in forks of this process, which has imported the large packages: started, killed, and what they printed."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from in_process import run

KILLED = -signal.SIGKILL
SLOW = 240.0  # seconds after which a command says where it is


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    line: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def text(self) -> str:
        """The command as typed."""
        return " ".join(self.line)


class Running:
    """A command of the project in a process group of its own."""

    def __init__(self, line: tuple[str, ...], workspace: Path) -> None:
        """Start it in a fork. Its output goes to files, so that a killed one leaves what it had printed."""
        self.line, self.start = line, time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="soak-output-")
        places = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                code = _perform(line, workspace, *places)
            finally:
                os._exit(code)
        with contextlib.suppress(OSError):  # whichever of the two is first
            os.setpgid(self.pid, self.pid)
        self._places = places

    def kill(self, sent: int) -> None:
        """Send a signal: SIGKILL to all its processes, another to the command, as a terminal's user would."""
        with contextlib.suppress(ProcessLookupError):
            if sent == signal.SIGKILL:
                os.killpg(self.pid, sent)
            else:
                os.kill(self.pid, sent)

    def is_running(self) -> bool:
        """Whether it has not ended; leaves it to `wait` to say how."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, limit: float) -> Ended:
        """How it ended. Raises TimeoutError, and kills it, where it has not after `limit` seconds."""
        while self.is_running():
            if time.monotonic() - self.start > limit:
                self.kill(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                output = self._places[1].read_text(errors="replace")[-3000:]
                raise TimeoutError(f"{' '.join(self.line)}: not done after {limit:.0f} s: {output}")
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        output = [place.read_text(errors="replace") if place.exists() else "" for place in self._places]
        self._folder.cleanup()
        return Ended(self.line, code, *output, time.monotonic() - self.start)


def _perform(line: tuple[str, ...], workspace: Path, stdout: Path, stderr: Path) -> int:
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL)
    with stdout.open("w") as out, stderr.open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        faulthandler.dump_traceback_later(SLOW, file=err)
        done = run(*line, workspace=workspace)
        out.write(done.stdout)
        err.write(done.stderr)
    return done.code
