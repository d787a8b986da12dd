"""Handlers of the logger `disease_pipeline`, which the base pipeline and this project use."""

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
    """Escapes control characters, which names of files and classes may contain and a terminal would execute."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to the given stream, or to the current value of sys.stderr."""

    def __init__(self, stream: TextIO | None) -> None:
        self._given = stream
        self._warned: set[str] = set()
        super().__init__(stream)
        self.addFilter(self._is_new)

    def _is_new(self, record: logging.LogRecord) -> bool:
        """Whether a warning has not been shown by this run yet; several stages may emit the same warning."""
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
        """Ignore the base class's assignment of sys.stderr, which is looked up for every message instead."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, above the progress bar if there is one."""
        if (bars := sys.modules.get("tqdm")) is None:
            super().emit(record)
            return
        with bars.tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Drop a message that cannot be written (stream closed, disk full); report other errors as usual."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogFile(RotatingFileHandler):
    """A log file of at most 5 MB and three older ones, created with its folder by the first message."""

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
        """Report once that the file cannot be written, and continue without it."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger = logging.getLogger(LOGGER_NAME)
        logger.removeHandler(self)
        logger.warning("log file %s cannot be written (%s); messages go to the terminal only", self.baseFilename, error)


def shows_progress() -> bool:
    """Whether a terminal handler shows messages of level INFO."""
    handlers = logging.getLogger(LOGGER_NAME).handlers
    return any(isinstance(handler, _Terminal) and handler.level <= logging.INFO for handler in handlers)


def set_up_logging(
    *, level: int | str = logging.INFO, log_file: Path | None = None, stream: TextIO | None = None
) -> logging.Logger:
    """Attach a terminal handler (`stream`, by default stderr) and optionally a log file to `disease_pipeline`.

    `level` is that of the terminal; the file also receives messages below it. A further call replaces the handlers of
    the previous one; other handlers are kept.
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
