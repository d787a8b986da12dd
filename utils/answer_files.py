"""Files of answers, one record for each image: CSV or JSON Lines, written as they come and continued after a stop.

A path is text where it is UTF-8. In CSV other bytes stand as they are; in JSON they are lone surrogates (`\\udcff`),
which Python's `os.fsencode` turns back into the file's name.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.artifacts import replacing
from utils.errors import UserError, cannot_write

FORMATS = ("csv", "jsonl")
COLUMNS = ("path", "class", "probability", "set", "abstain", "disagreement", "model", "error")
FIRST_OF_JSON = b'{"path": '
PART = 2**20  # bytes that are copied at a time
PROBABILITY = "p:"  # begins the CSV column of a class


@dataclass(frozen=True)
class Form:
    """How records are written."""

    format: str
    """csv or jsonl"""
    classes: tuple[str, ...] | None
    """Whose probabilities every record holds; None: none but the highest."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the CSV header."""
        return COLUMNS + tuple(f"{PROBABILITY}{name}" for name in self.classes or ())

    @property
    def head(self) -> str:
        """What stands before the first record."""
        return _csv_line(self.columns) if self.format == "csv" else ""

    def line(self, record: Mapping[str, Any]) -> str:
        """One record, with its line end; `probabilities` (C,) in it where the form has classes, None for no answer."""
        if self.format == "jsonl":
            return json.dumps(self.document(record), allow_nan=False) + "\n"
        cells = [_cell(record[name]) for name in COLUMNS]
        if self.classes is not None:
            cells += map(_cell, record["probabilities"] or [None] * len(self.classes))
        return _csv_line(cells)

    def document(self, record: Mapping[str, Any]) -> dict[str, Any]:
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


class AnswerFile:
    """A file that records are added to; what `add` returned from is on disk, whatever ends the process."""

    def __init__(self, path: Path, form: Form, model: str, *, append: bool, replace: bool) -> None:
        """Begin the file, or go on with it: `done` are the paths that it answers. UserError where that is unsafe.

        A record that was cut off by a killed process is removed, and so are those that hold an error in place of an
        answer.
        """
        self.path, self.form = path, form
        self.done: set[str] = set()
        self.failed: list[tuple[int, int]] = []
        try:
            there = path.stat().st_size if path.exists() else 0
            if there and not (append or replace):
                raise UserError(
                    f"{path}: is there already. --append goes on with it, --force replaces it, or name another --to"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            if there and append:
                end = self._read(model)
                with path.open("r+b") as file:
                    file.truncate(end)
                self._remove_failed(end)
                if end == 0:
                    self._write(form.head, "wb")
            else:
                self._write(form.head, "wb")
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

    def _read(self, model: str) -> int:
        """Take in the paths of all whole records; returns where the last of them ends."""
        end = 0
        with self.path.open("rb") as file:
            for number, (text, stop) in enumerate(_whole_records(file, quoted=self.form.format == "csv")):
                if self.form.format == "csv" and number == 0:
                    self._compare("columns", _parsed(text), list(self.form.columns))
                else:
                    path, own, error = self._record(text, number + 1)
                    self._compare("answers of the model", own, model)
                    if error:
                        self.failed.append((end, stop))
                    else:
                        self.done.add(path)
                end = stop
        if end == 0:
            self._require_beginning()
        return end

    def _remove_failed(self, end: int) -> None:
        """Take the records with an error out of a file of `end` bytes; the old file or the new one is there."""
        if not self.failed:
            return
        with replacing(self.path) as temporary, self.path.open("rb") as old, temporary.open("wb") as new:
            place = 0
            for start, stop in [*self.failed, (end, end)]:
                while place < start:
                    part = old.read(min(start - place, PART))
                    place += len(part)
                    new.write(part)
                place = old.seek(stop)

    def _require_beginning(self) -> None:
        """A file without a whole record is cut to nothing, so it must be the beginning of one of ours."""
        text = self.path.read_bytes()
        ours = self.form.head.encode("utf-8", "surrogateescape") or FIRST_OF_JSON
        if not (ours.startswith(text) or (self.form.format == "jsonl" and text.startswith(ours))):
            raise UserError(f"{self.path}: holds none of our answers. Name another file with --to")

    def _record(self, text: str, number: int) -> tuple[str, str, str | None]:
        """Path, model and error of a record."""
        try:
            if self.form.format == "csv":
                cells = dict(zip(self.form.columns, _parsed(text), strict=True))
                return cells["path"], cells["model"], cells["error"]
            record = json.loads(text)
            if ("probabilities" in record) != (self.form.classes is not None):
                raise UserError(f"{self.path}: record {number} has other columns. Name another file with --to")
            return record["path"], record["model"], record["error"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: record {number} is none of ours ({error}). Name another file with --to"
            ) from error

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            shown = [", ".join(value) if isinstance(value, list) else value for value in (found, expected)]
            raise UserError(
                f"{self.path}: holds the {what} {shown[0]}; expected {shown[1]}. Name another file with --to, or "
                "begin anew with --force"
            )


def _parsed(text: str) -> list[str]:
    return next(csv.reader(io.StringIO(text, newline="")))


def _whole_records(file: BinaryIO, *, quoted: bool) -> Iterator[tuple[str, int]]:
    """(record, where it ends) of each record that ends in a line end; in CSV one between quotes does not count."""
    parts: list[bytes] = []
    stop = 0
    for line in file:
        parts.append(line)
        stop += len(line)
        record = b"".join(parts)
        if line.endswith(b"\n") and not (quoted and record.count(b'"') % 2):
            yield record.decode("utf-8", "surrogateescape"), stop
            parts = []
