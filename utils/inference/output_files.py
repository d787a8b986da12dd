"""Files of answers, one record for each image: CSV or JSON Lines, written as they come and continued after a stop.

A path is text where it is UTF-8. In CSV other bytes stand as they are; in JSON they are lone surrogates (`\\udcff`),
which Python's `os.fsencode` turns back into the file's name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.core.artifacts import replacing
from utils.core.errors import UserError, cannot_write

FORMATS = ("csv", "jsonl")
COLUMNS = ("path", "class", "probability", "set", "abstain", "disagreement", "model", "error")
JSON_PREFIX = '{"path": '
COPY_BYTES = 2**20  # bytes that are copied at a time
MAX_RECORD_BYTES = 2**24  # bytes of a record; a path has at most a few thousand
PROBABILITY_PREFIX = "p:"  # begins the CSV column of a class
_QUOTED = r'"[^"]*+(?:""[^"]*+)*+"'
_CELL = re.compile(rf'({_QUOTED}|[^",\r\n]*+)(?:,|\r?\n)')
_FINISHED = re.compile(rf'(?:(?:{_QUOTED}|[^",\r\n]*+),)*+')
_WHOLE = re.compile(rf'{_FINISHED.pattern}(?:{_QUOTED}|[^",\r\n]*+)\r?\n')
"""A CSV record. Python's reader takes a quote in the middle of a cell for text, and the record for another one."""
_TORN = re.compile(rf'{_FINISHED.pattern}(?:"[^"]*+(?:""[^"]*+)*+"?|[^",\r\n]*+\r?)')
"""What a cut anywhere leaves of one."""
REMEDY = (
    "Restore or remove what is wrong and try again. Name another file with --to to leave this one as it is, or begin "
    "anew with --force"
)


@dataclass(frozen=True)
class RecordFormat:
    """How records are written."""

    format: str
    """csv or jsonl"""
    classes: tuple[str, ...] | None
    """Whose probabilities every record holds; None: none but the highest."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the CSV header."""
        return COLUMNS + tuple(f"{PROBABILITY_PREFIX}{name}" for name in self.classes or ())

    @property
    def header(self) -> str:
        """What stands before the first record."""
        return _csv_line(self.columns) if self.format == "csv" else ""

    def format_record(self, record: Mapping[str, Any]) -> str:
        """One record, with its line end; `probabilities` (C,) in it where the form has classes, None for no answer."""
        if self.format == "jsonl":
            return json.dumps(self.as_document(record), allow_nan=False) + "\n"
        cells = [_cell(record[name]) for name in COLUMNS]
        if self.classes is not None:
            cells += map(_cell, record["probabilities"] or [None] * len(self.classes))
        return _csv_line(cells)

    def as_document(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record as JSON has it: probabilities by class name."""
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
    quoting = csv.QUOTE_ALL if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    csv.writer(line, lineterminator="\n", quoting=quoting).writerow(cells)
    return line.getvalue()


@dataclass(frozen=True)
class _Record:
    """A piece of a file of answers."""

    text: str
    line: int
    """Of the file where it begins, from 1 on."""
    end: int
    """Bytes of the file up to its end."""
    is_whole: bool
    """Whether it ends in a line end that is not part of a quoted cell; only the last piece may not."""


class PredictionFile:
    """A file that records are added to; what `add` returned from is on disk, whatever ends the process."""

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
        """Begin the file, or go on with it: `done` are those of the `requested` paths that it answers.

        A last record that was cut off by a killed process is removed, and so are those that hold an error for a
        requested path, in place of an answer. Every other record stays as it is. Raises UserError, before anything is
        changed, for a file that holds something else. The file is read once, record by record: what is remembered of
        it grows with the requested paths and the removed records alone.
        """
        self.path, self.form = path, form
        self.done: set[str] = set()
        self.failed = array("Q")
        """First and last place of each record to remove, one after the other."""
        try:
            there = path.stat().st_size if path.exists() else 0
            if there and not (append or replace):
                raise UserError(
                    f"{path}: is there already. --append goes on with it, --force replaces it, or name another --to"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            if there and append:
                end = self._read(model, requested)
                with path.open("r+b") as file:
                    file.truncate(end)
                self._remove_failed(end)
                if end == 0:
                    self._write(form.header, "wb")
            else:
                self._write(form.header, "wb")
        except OSError as error:
            raise cannot_write(path, error) from error

    def add(self, lines: Sequence[str]) -> None:
        """Write records, whole and at once. Raises UserError where the disk takes no more."""
        try:
            self._write("".join(lines), "ab")
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _write(self, text: str, mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, model: str, requested: AbstractSet[str]) -> int:
        """Check all records and take in which of the requested paths have one; returns where the last whole one ends.

        Raises UserError for anything but whole records of ours and a torn one behind them.
        """
        end = 0
        with self.path.open("rb") as file:
            for record in self._records(file, model):
                if not record.is_whole:
                    self._require_torn(record)
                elif self.form.format == "csv" and record.line == 1:
                    self._compare("columns", self._cells(record), list(self.form.columns))
                else:
                    path, source, error = self._fields(record)
                    self._compare("answers of the model", source, model)
                    if path in requested and error:
                        self.failed.extend((end, record.end))
                    elif path in requested:
                        self.done.add(path)
                end = record.end if record.is_whole else end
        return end

    def _records(self, file: BinaryIO, model: str) -> Iterator[_Record]:
        """The pieces that a file falls into; each line is looked at once.

        A line end between quotes belongs to a CSV cell. Quotes that are still open where a line ends as an answer of
        `model` does are an error: what follows would pass for one cell, and for a torn record at the end of the file.
        """
        quoted = self.form.format == "csv"
        values = rf"(?:,[^,\s]+){{{len(self.form.classes or ())}}}"
        name = re.escape(model.replace('"', ""))
        answer_end = re.compile(rf",{name},{values}\r?\n\Z".encode("utf-8", "surrogateescape"))
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
                yield _Record(_text(lines), first, end, is_whole=True)
                lines, first, size = [], number + 1, 0
            elif answer_end.search(line.replace(b'"', b"")):
                raise self._damaged(first, "quotes that are never closed" if first == number else "unpaired quotes")
        if lines:
            yield _Record(_text(lines), first, end, is_whole=False)

    def _require_torn(self, record: _Record) -> None:
        """Raise UserError unless this is the beginning of a record, which a killed process did not finish."""
        is_first, text = record.line == 1, record.text
        if not is_first:
            text = text.rstrip("\0")  # which a file system may leave when the power fails
        if self.form.format == "csv":
            is_torn = self.form.header.startswith(text) if is_first else _is_torn(text, len(self.form.columns))
        else:
            is_torn = JSON_PREFIX.startswith(text) or (text.startswith(JSON_PREFIX) and not _has_more(text))
        if not is_torn and is_first:
            raise UserError(f"{self.path}: holds none of our answers. Name another file with --to")
        if not is_torn:
            raise self._damaged(record.line, "neither an answer nor the beginning of one")

    def _remove_failed(self, end: int) -> None:
        """Take the records with an error out of a file of `end` bytes; the old file or the new one is there."""
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

    def _cells(self, record: _Record) -> list[str]:
        """Of a CSV record."""
        if not _WHOLE.fullmatch(record.text):
            raise self._damaged(record.line, "a quote that neither begins nor ends a cell")
        return _parsed(record.text)

    def _fields(self, record: _Record) -> tuple[str, str, str | None]:
        """Path, model and error of a record."""
        if self.form.format == "csv":
            cells = self._cells(record)
            if len(cells) != len(self.form.columns):
                raise self._damaged(record.line, f"{len(cells)} cells; expected {len(self.form.columns)}")
            return cells[0], cells[COLUMNS.index("model")], cells[COLUMNS.index("error")]
        try:
            document = json.loads(record.text)
            path, model, error = (document[name] for name in ("path", "model", "error"))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(record.line, f"no answer in JSON, {type(error).__name__}: {error}") from error
        if not (isinstance(path, str) and isinstance(model, str) and isinstance(error, str | None)):
            raise self._damaged(record.line, "path, model or error that is no text")
        if ("probabilities" in document) != (self.form.classes is not None):
            raise UserError(f"{self.path}: line {record.line} has other columns. Name another file with --to")
        return path, model, error

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            shown = [", ".join(value) if isinstance(value, list) else value for value in (found, expected)]
            raise UserError(
                f"{self.path}: holds the {what} {shown[0]}; expected {shown[1]}. Name another file with --to, or "
                "begin anew with --force"
            )

    def _damaged(self, line: int, content: str) -> UserError:
        return UserError(
            f"{self.path}: the record that begins in line {line} holds {content}; nothing was changed. {REMEDY}"
        )


def _text(lines: Sequence[bytes]) -> str:
    return b"".join(lines).decode("utf-8", "surrogateescape")


def _has_more(text: str) -> bool:
    """Whether something follows a whole JSON document."""
    try:
        return json.JSONDecoder().raw_decode(text)[1] < len(text)
    except (ValueError, RecursionError):
        return False


def _is_torn(text: str, columns: int) -> bool:
    """Whether a CSV record of so many columns may begin so."""
    finished = _FINISHED.match(text)
    return finished is not None and bool(_TORN.fullmatch(text)) and len(_parsed(finished[0])) < columns


def _parsed(text: str) -> list[str]:
    """Cells that end in a comma or a line end, of any length: Python's reader has a limit for all of a process."""
    return [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in _CELL.findall(text)]
