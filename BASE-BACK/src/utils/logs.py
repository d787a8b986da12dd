"""The pipeline's logger: one line per message on stderr and in a file of the workspace."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from config.settings import DEBUG_LOG_DIR
from utils.files import write_json

FORMAT = logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt="%H:%M:%S")
DEDUPE_SECONDS = 5.0


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        if (bars := sys.modules.get("tqdm")) is None:
            super().emit(record)
            return
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextmanager
def progress_bar(total: int, description: str) -> Iterator[Callable[[int, str], object]]:
    """A progress bar of `total` units on a terminal, and nothing elsewhere; it is removed at the end.

    The context value is a function that counts units as done and sets the text after the bar, such as the time left.
    """
    if not sys.stderr.isatty():
        yield lambda count, text: None
        return
    from tqdm import tqdm

    form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    look: dict[str, Any] = {"leave": False, "dynamic_ncols": True, "mininterval": 0, "bar_format": form}
    with tqdm(total=total, desc=description, file=sys.stderr, **look) as bar:

        def advance(count: int, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(count)

        yield advance


class _LogFile(logging.FileHandler):
    """A log file that the first record creates, with its folder; several processes may append to it."""

    def __init__(self, path: Path, level: int) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setLevel(level)
        self.setFormatter(FORMAT)

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _for_terminal(record: logging.LogRecord) -> bool:
    return not getattr(record, "file_only", False)


def add_handlers(name: str) -> None:
    """Attach stream and file handlers to the logger `name`, unless it has handlers already."""
    target = logging.getLogger(name)
    target.setLevel(logging.INFO)
    target.propagate = False
    if target.handlers:
        return
    stream = TerminalHandler(sys.stderr)  # stdout is reserved for results
    stream.setFormatter(FORMAT)
    stream.addFilter(_for_terminal)
    target.addHandler(stream)
    target.addHandler(_LogFile(DEBUG_LOG_DIR / "training.log", logging.INFO))
    target.addHandler(_LogFile(DEBUG_LOG_DIR / "training_errors.log", logging.ERROR))


class DedupLogger:
    """Logger wrapper; with `dedupe=True`, the same text is logged at most once in five seconds."""

    def __init__(self, name: str = "disease_pipeline") -> None:
        self.logger = logging.getLogger(name)
        self._last: dict[str, float] = {}
        self._system_info_given = False

    def _emit(self, level: int, message: str, arguments: tuple[Any, ...], dedupe: bool, file_only: bool) -> None:
        if dedupe:
            now = time.monotonic()
            if now - self._last.get(message, -DEDUPE_SECONDS) < DEDUPE_SECONDS:
                return
            self._last[message] = now
        self.logger.log(level, message, *arguments, extra={"file_only": file_only})

    def debug(self, message: str, *arguments: Any, dedupe: bool = False) -> None:
        """Log at level DEBUG."""
        self._emit(logging.DEBUG, message, arguments, dedupe, False)

    def info(self, message: str, *arguments: Any, dedupe: bool = False, file_only: bool = False) -> None:
        """Log at level INFO; `file_only` keeps the line off the terminal."""
        self._emit(logging.INFO, message, arguments, dedupe, file_only)

    def warning(self, message: str, *arguments: Any, dedupe: bool = False) -> None:
        """Log at level WARNING."""
        self._emit(logging.WARNING, message, arguments, dedupe, False)

    def error(self, message: str, *arguments: Any, dedupe: bool = False) -> None:
        """Log at level ERROR."""
        self._emit(logging.ERROR, message, arguments, dedupe, False)

    def exception(self, message: str, *arguments: Any) -> None:
        """Log at level ERROR with the traceback of the exception being handled."""
        self.logger.exception(message, *arguments)

    def log_system_info_once(self) -> None:
        """Log device and platform on the first call."""
        if not self._system_info_given:
            from utils.devices import get_device_info

            self._system_info_given = True
            self.info("system: %s", ", ".join(f"{key} {value}" for key, value in get_device_info().items()))


class SmokeCheckLogger:
    """Collects checks and their outcomes; any status other than `PASS` counts as failed."""

    def __init__(self) -> None:
        self.checks: list[dict[str, str]] = []
        self._log_file: Path | None = None

    def log_check(self, check_name: str, status: str, details: str = "") -> None:
        """Record one check and append a line to `debug_logs/smoke_check_<stamp>.log`."""
        stamp = datetime.now().astimezone()
        self.checks.append(
            {"timestamp": stamp.isoformat(), "check_name": check_name, "status": status, "details": details}
        )
        if self._log_file is None:
            self._log_file = DEBUG_LOG_DIR / f"smoke_check_{stamp:%Y%m%d_%H%M%S}.log"
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("a", encoding="utf-8") as file:
            file.write(f"{stamp:%H:%M:%S} | {status} | {check_name} | {details}\n")

    def save_summary(self) -> dict[str, Any]:
        """Write `debug_logs/smoke_check_summary.json` and return its contents."""
        passed = sum(check["status"] == "PASS" for check in self.checks)
        summary = {
            "total_checks": len(self.checks),
            "passed": passed,
            "failed": len(self.checks) - passed,
            "checks": self.checks,
        }
        write_json(DEBUG_LOG_DIR / "smoke_check_summary.json", summary)
        return summary
