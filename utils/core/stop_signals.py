"""Raises SIGTERM as an exception in the running command, and resends signals whose exception was lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command terminated by SIGTERM."""
PAUSE = 0.05  # seconds for the callback that ignored the exception to return
SIGNALS: dict[type[BaseException], int] = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}


@contextmanager
def raised() -> Iterator[None]:
    """Raise SystemExit(143) in the main thread on SIGTERM, so that the command ends and cleans up.

    Python ignores exceptions in callbacks of weak references and in `__del__`. A signal that arrives there, including
    SIGINT, would have no effect, so it is sent again.
    """
    previous, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook

    def send_again(ignored: UnraisableHookArgs) -> None:
        sent = SIGNALS.get(ignored.exc_type)
        if sent is None:
            hook(ignored)
            return
        timer = threading.Timer(PAUSE, os.kill, (os.getpid(), sent))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(TERMINATED)
