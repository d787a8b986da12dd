"""Files of predictions, one record per image, in CSV or JSON Lines: written block by block and continued later.

Paths are UTF-8 text. Bytes that are not UTF-8 are written unchanged in CSV, and as lone surrogates (`\\udcff`) in JSON,
which `os.fsencode` converts back to the file's name.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import re
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from utils.core.artifacts import replacing
from utils.core.errors import UserError, cannot_write
from utils.core.regular_files import require_regular

FORMATS = ("csv", "jsonl")
COLUMNS = ("path", "class", "probability", "set", "abstain", "disagreement", "model", "error")
JSON_PREFIX = '{"path": '
COPY_BYTES = 2**20
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # file systems without locks
MAX_RECORD_BYTES = 2**24
"""Longest record; a path has at most a few thousand bytes."""
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # first characters of spreadsheet formulas
PROBABILITY_PREFIX = "p:"
"""Prefix of the CSV column of a class."""
_QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
_CELL = re.compile(rf'({_QUOTED}|[^",\r\n]*+)(?:,|\r?\n)')
_FINISHED = re.compile(rf'(?:(?:{_QUOTED}|[^",\r\n]*+),)*+')
_WHOLE = re.compile(rf'{_FINISHED.pattern}(?:{_QUOTED}|[^",\r\n]*+)\r?\n')
"""A CSV record. Python's reader accepts a quote in the middle of a cell, and then reads another record."""
_TORN = re.compile(rf'{_FINISHED.pattern}(?:"[^"]*+(?:""[^"]*+)*+"?|[^",\r\n]*+\r?)')
"""The beginning of a CSV record, truncated anywhere."""
REMEDY = "Repair or remove the record and try again, name another file with --to, or replace this one with --force"


@dataclass(frozen=True)
class RecordFormat:
    """Format of the records of a file."""

    format: str
    """csv or jsonl"""
    classes: tuple[str, ...] | None
    """Classes whose probabilities are in every record; None: only the highest probability."""
    spreadsheet_safe: bool = False
    """Whether text that a spreadsheet would run as a formula begins with an apostrophe; CSV only."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names in the CSV header."""
        return COLUMNS + tuple(f"{PROBABILITY_PREFIX}{name}" for name in self.classes or ())

    @property
    def header(self) -> str:
        """Text before the first record."""
        return _csv_line(self.columns) if self.format == "csv" else ""

    def format_record(self, record: Mapping[str, Any]) -> str:
        """One record with its line end.

        If the format has classes, `record` has `probabilities` (C,), or None for an image without a prediction.
        """
        if self.format == "jsonl":
            return json.dumps(self.as_document(record), allow_nan=False) + "\n"
        cells = [self._safe(record[name], _cell(record[name])) for name in COLUMNS]
        if self.classes is not None:
            cells += map(_cell, record["probabilities"] or [None] * len(self.classes))
        return _csv_line(cells)

    def _safe(self, value: Any, cell: str) -> str:
        return f"'{cell}" if self.spreadsheet_safe and isinstance(value, str) and cell[:1] in FORMULAS else cell

    def as_document(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record for JSON, with probabilities by class name."""
        values = record.get("probabilities")
        if self.classes is None or values is None:
            return dict(record)
        return {**record, "probabilities": dict(zip(self.classes, values, strict=True))}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    # Python before 3.13 leaves a carriage return unquoted and then refuses to read it.
    has_return = any("\r" in cell for cell in cells)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL
    csv.writer(line, lineterminator="\n", quoting=quoting).writerow(cells)
    return line.getvalue()


@dataclass(frozen=True)
class _RecordText:
    """The text of one record in a file."""

    text: str
    line: int
    """Number of its first line in the file, from 1."""
    end: int
    """Offset of its end in the file, in bytes."""
    is_whole: bool
    """Whether it ends with a line end outside quotes; only the last record may not."""


class PredictionFile:
    """A file that records are appended to; records are on disk when `add` returns."""

    def __init__(
        self,
        path: Path,
        form: RecordFormat,
        model: str,
        *,
        append: bool,
        replace: bool,
        requested: AbstractSet[str] = frozenset(),
    ) -> None:
        """Create the file or, with `append`, continue it: `done` are the `requested` paths with a prediction in it.

        Continuing removes an incomplete last record of a killed process, and records with an error for a requested
        path; all other records stay unchanged. Raises UserError, before anything is changed, for a file with other
        contents. The file is read once, record by record, so memory grows only with the requested paths and removed
        records.
        """
        self.path, self.form = path, form
        self.done: set[str] = set()
        self.failed = array("Q")
        """Alternating start and end offsets of the records to remove."""
        self._lock: Callable[[], object] | None = None
        """Releases the lock on the file."""
        try:
            if path.exists():
                require_regular(path)
            size = path.stat().st_size if path.exists() else 0
            if size and not (append or replace):
                raise UserError(
                    f"{path}: exists. --append continues it, --force replaces it, or name another file with --to"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            self._hold(path)
            if append:
                size = path.stat().st_size  # another command may have written meanwhile
            if size and append:
                end = self._read(model, requested)
                with path.open("r+b") as file:
                    file.truncate(end)
                self._remove_failed(end)
                if end == 0:
                    self._write(form.header, "wb")
            else:
                self._write(form.header, "wb")
        except OSError as error:
            self.close()
            raise cannot_write(path, error) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file for other processes; nothing may be added afterwards."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def add(self, lines: Sequence[str]) -> None:
        """Append complete records. Raises UserError if they cannot be written."""
        try:
            self._write("".join(lines), "ab")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _hold(self, path: Path) -> None:
        """Lock the file for exclusive writing until this object is deleted or locks another file.

        Raises UserError if another process holds the lock. On file systems without locks there is none.
        """
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_current = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
            except BlockingIOError as error:
                os.close(descriptor)
                raise UserError(
                    f"{self.path}: another predict writes to it; expected one writer. Wait until it ends, or name "
                    "another file with --to"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(descriptor)
                    raise
                is_current = True
            if not is_current:  # replaced between opening and locking
                os.close(descriptor)
                continue
            earlier, self._lock = self._lock, weakref.finalize(self, os.close, descriptor)
            if earlier is not None:
                earlier()
            return

    def _write(self, text: str, mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, model: str, requested: AbstractSet[str]) -> int:
        """Check all records and collect the requested paths in `done` and `failed`; returns the end of the last record.

        Raises UserError for anything but complete records, optionally followed by the beginning of one.
        """
        end = 0
        with self.path.open("rb") as file:
            for record in self._records(file, model):
                if not record.is_whole:
                    self._require_torn(record)
                elif self.form.format == "csv" and record.line == 1:
                    self._require_equal("columns", self._cells(record), list(self.form.columns))
                else:
                    path, source, error = self._fields(record)
                    self._require_equal("predictions of the model", source, model)
                    if path in requested and error:
                        self.failed.extend((end, record.end))
                    elif path in requested:
                        self.done.add(path)
                end = record.end if record.is_whole else end
        return end

    def _records(self, file: BinaryIO, model: str) -> Iterator[_RecordText]:
        """The records of a file; each line is read once.

        A line end between quotes belongs to a CSV cell. An open quote at the end of a line that ends like a record of
        `model` is an error: everything after it would be one cell of a truncated record.
        """
        quoted = self.form.format == "csv"
        values = rf"(?:,[^,\s]+){{{len(self.form.classes or ())}}}"
        name = re.escape(model.replace('"', ""))
        record_end = re.compile(rf",{name},{values}\r?\n\Z".encode("utf-8", "surrogateescape"))
        lines: list[bytes] = []
        first, number, size, end, is_open = 1, 0, 0, 0, False
        while line := file.readline(MAX_RECORD_BYTES + 1):
            lines.append(line)
            number, size, end = number + 1, size + len(line), end + len(line)
            is_open ^= quoted and line.count(b'"') % 2 == 1
            if size > MAX_RECORD_BYTES:
                raise self._damaged(first, f"longer than {MAX_RECORD_BYTES:,} bytes")
            if not line.endswith(b"\n"):
                break
            if not is_open:
                yield _RecordText(_text(lines), first, end, is_whole=True)
                lines, first, size = [], number + 1, 0
            elif record_end.search(line.replace(b'"', b"")):
                raise self._damaged(first, "a quote that is never closed" if first == number else "unpaired quotes")
        if lines:
            yield _RecordText(_text(lines), first, end, is_whole=False)

    def _require_torn(self, record: _RecordText) -> None:
        """Raise UserError unless this is the beginning of a record, truncated by a killed process."""
        is_first, text = record.line == 1, record.text
        if not is_first:
            text = text.rstrip("\0")  # a file system may leave NUL bytes after a power failure
        if self.form.format == "csv":
            is_torn = self.form.header.startswith(text) if is_first else _is_torn(text, len(self.form.columns))
        else:
            is_torn = JSON_PREFIX.startswith(text) or (text.startswith(JSON_PREFIX) and not _has_more(text))
        if not is_torn and is_first:
            raise UserError(f"{self.path}: is not a file of predictions. Name another file with --to")
        if not is_torn:
            raise self._damaged(record.line, "neither a record nor the beginning of one")

    def _remove_failed(self, end: int) -> None:
        """Remove the records with an error from a file of `end` bytes; the file is replaced atomically."""
        if not self.failed:
            return
        self.failed.extend((end, end))
        with replacing(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as new:
            position = 0
            for start, stop in zip(self.failed[::2], self.failed[1::2], strict=True):
                while position < start:
                    part = old.read(min(start - position, COPY_BYTES))
                    position += len(part)
                    new.write(part)
                position = old.seek(stop)
            new.flush()
            self._hold(temporary)  # the lock stays with the file when it is renamed

    def _cells(self, record: _RecordText) -> list[str]:
        """Cells of a CSV record."""
        if not _WHOLE.fullmatch(record.text):
            raise self._damaged(record.line, "a quote that neither begins nor ends a cell")
        return _parsed(record.text)

    def _fields(self, record: _RecordText) -> tuple[str, str, str | None]:
        """Path, model and error of a record. Raises UserError for a damaged record."""
        if self.form.format == "csv":
            cells = self._cells(record)
            if len(cells) != len(self.form.columns):
                raise self._damaged(record.line, f"{len(cells)} cells; expected {len(self.form.columns)}")
            return cells[0], cells[COLUMNS.index("model")], cells[COLUMNS.index("error")]
        try:
            document = json.loads(record.text)
            path, model, error = (document[name] for name in ("path", "model", "error"))
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise self._damaged(record.line, f"no valid JSON record, {type(problem).__name__}: {problem}") from problem
        if not (isinstance(path, str) and isinstance(model, str) and isinstance(error, str | None)):
            raise self._damaged(record.line, "a path, model or error that is not text")
        if ("probabilities" in document) != (self.form.classes is not None):
            raise UserError(
                f"{self.path}: line {record.line} has other columns than expected. Name another file with --to"
            )
        return path, model, error

    def _require_equal(self, what: str, actual: Any, expected: Any) -> None:
        if actual != expected:
            texts = [", ".join(value) if isinstance(value, list) else value for value in (actual, expected)]
            raise UserError(
                f"{self.path}: holds the {what} {texts[0]}; expected {texts[1]}. Name another file with --to, or "
                "replace this one with --force"
            )

    def _damaged(self, line: int, content: str) -> UserError:
        return UserError(
            f"{self.path}: the record that begins in line {line} holds {content}; the file is unchanged. {REMEDY}"
        )


def _text(lines: Sequence[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "surrogateescape")


def _has_more(text: str) -> bool:
    """Whether text follows a complete JSON document."""
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def _is_torn(text: str, columns: int) -> bool:
    """Whether this is the beginning of a CSV record with this number of columns."""
    finished = _FINISHED.match(text)
    return finished is not None and bool(_TORN.fullmatch(text)) and len(_parsed(finished[0])) < columns


def _parsed(text: str) -> list[str]:
    """Cells that end in a comma or a line end, of any length; Python's CSV reader limits the length per process."""
    return [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in _CELL.findall(text)]
