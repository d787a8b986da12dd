"""Where messages go: handlers of the logger `disease_pipeline`, to which the base pipeline and all of ours write."""

from __future__ import annotations

import errno
import logging
import os
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from utils.core.display_text import printable_lines
from utils.core.errors import UserError
from utils.core.links import require_unlinked

LOGGER_NAME = "disease_pipeline"


class _Formatter(logging.Formatter):
    """Writes control characters out, which names of files and classes may hold: a terminal would obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to the stream given, or to whatever sys.stderr is when the message comes."""

    def __init__(self, stream: TextIO | None) -> None:
        self._given = stream
        self._warned: set[str] = set()
        super().__init__(stream)
        self.addFilter(self._is_new)

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Whether a warning has not been shown by this run yet; stages that share a cause warn of it each."""
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        is_new = text not in self._warned
        self._warned.add(text)
        return is_new

    @property
    def stream(self) -> TextIO:
        return self._given or sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """The base class assigns sys.stderr here; it is looked up anew for every message instead."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, above a progress bar where there is one."""
        if (bars := sys.modules.get("tqdm")) is None:
            super().emit(record)
            return
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Leave a message out that cannot be written (closed, full); anything else is shown as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogFile(RotatingFileHandler):
    """A log file of at most 5 MB and three older ones, opened (and its folder made) with the first message."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=5_000_000, backupCount=3, encoding="utf-8", delay=True)

    def _open(self) -> Any:
        try:
            require_unlinked(Path(self.baseFilename))
        except UserError as error:
            raise OSError(errno.ELOOP, "a symbolic link leads to it", self.baseFilename) from error
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say once that the file cannot be written, and go on without it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger = logging.getLogger(LOGGER_NAME)
        logger.removeHandler(self)
        logger.warning("log file %s cannot be written (%s); messages go to the terminal only", self.baseFilename, error)


def shows_progress() -> bool:
    """Whether a terminal handler shows messages of the level INFO."""
    handlers = logging.getLogger(LOGGER_NAME).handlers
    return any(isinstance(handler, _Terminal) and handler.level <= logging.INFO for handler in handlers)


def set_up_logging(
    *, level: int | str = logging.INFO, log_file: Path | None = None, stream: TextIO | None = None
) -> logging.Logger:
    """Give the logger `disease_pipeline` one terminal handler (stderr unless `stream`) and, if asked, a log file.

    `level` is the terminal's; the file also holds what is below it. Called again, it replaces the handlers it gave
    before; handlers of others stay.
    """
    logger = logging.getLogger(LOGGER_NAME)
    for old in [handler for handler in logger.handlers if isinstance(handler, (_Terminal, _LogFile))]:
        logger.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = [_Terminal(stream), *([_LogFile(log_file)] if log_file is not None else [])]
    formatter = _Formatter("%(asctime)s | %(levelname)s | %(message)s", datefmt="%H:%M:%S")
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    handlers[0].setLevel(level)
    logger.setLevel(logging.DEBUG if log_file is not None else level)
    logger.propagate = False
    return logger
