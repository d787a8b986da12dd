"""CSV manifests of image sets: `file_name,label[,split][,group]`, the names of Hugging Face's `metadata.csv`.

Every error names the file, the line, the value, the expected value and the remedy; nothing is written.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from .samples import SUFFIXES

REQUIRED = ("file_name", "label")
OPTIONAL = ("split", "group")
ALIASES = {
    "file_name": ("filename", "file", "path", "image", "image_path", "filepath", "file_path", "image_id", "name", "id"),
    "label": ("labels", "class", "class_name", "category", "target", "y"),
    "split": ("splits",),
    "group": ("groups", "group_id"),
}
"""Common other names of the columns; they are suggested in errors, never accepted."""
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
LABELS = "labels.txt"
NAME_BYTES = 255  # of a file or folder name on the usual file systems


class ManifestError(ValueError):
    """A manifest, or the class list beside it, cannot be used."""


@dataclass(frozen=True)
class ManifestRow:
    """One image of a manifest."""

    line: int
    file_name: str
    """Normalised path relative to the manifest's folder, with `/`."""
    label: str
    split: str | None
    """train, val or test; None if the manifest has no split column."""
    group: str | None


@dataclass(frozen=True)
class Manifest:
    """A validated manifest with its ordered classes."""

    path: Path
    rows: tuple[ManifestRow, ...]
    """Rows in the order of the file."""
    classes: tuple[str, ...]
    """Class names in the order of `labels.txt`, else sorted."""
    ignored: tuple[str, ...]
    """Names of other columns, which are ignored."""


def read_manifest_file(path: Path, *, fewest_classes: int = 2) -> Manifest:
    """Read a manifest and the `labels.txt` beside it, if any. Raises ManifestError if either is invalid."""
    records = _records(path)
    header_line, header = next(records, (1, []))
    columns = _columns(path, header_line, header)
    rows: list[ManifestRow] = []
    for line, values in records:
        if len(values) != len(header):
            raise _problem(
                *(path, line, f"{len(values)} field(s); the header has {len(header)}"),
                "quote values that contain a comma or a quotation mark",
            )
        rows.append(_row(path, line, {name: values[column] for name, column in columns.items()}))
    if not rows:
        raise ManifestError(f"{path}: no row; expected one row per image below the header {','.join(header)}")
    _require_files(path, rows)
    _require_once(path, rows)
    _require_whole_groups(path, rows)
    classes = _classes(path, rows, fewest_classes)
    return Manifest(path, tuple(rows), classes, tuple(name for name in header if name not in columns))


def _problem(path: Path, line: int, problem: str, remedy: str) -> ManifestError:
    return ManifestError(f"{path}, line {line}: {problem}; {remedy}")


def _shown(values: Sequence[str], most: int = 10) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(value) for value in values[:most]) + more


# text ----------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{path}: encoded in UTF-16; expected UTF-8. Save it as CSV in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise _problem(path, line, problem, "save the file as CSV in UTF-8") from error


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, values) of every record that is not blank, the header first."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = 'expected fields separated by commas; a quoted field ends with " and doubles each " inside it'
            raise _problem(path, line, f"not valid CSV ({error})", remedy) from error
        if any(value.strip() for value in values):
            yield line, values


def _columns(path: Path, line: int, header: Sequence[str]) -> dict[str, int]:
    """{name: column index} of the known columns in the header; other columns are ignored."""
    expected = f"expected {','.join(REQUIRED)}, optionally {' and '.join(OPTIONAL)}"
    if not header:
        raise ManifestError(f"{path}: empty; {expected} and one row per image")
    if len(header) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")):
            if separator in header[0]:
                raise _problem(path, line, f"fields separated by {name}", "expected commas; save the file with commas")
    twice = [name for name in header if name in (*REQUIRED, *OPTIONAL) and header.count(name) > 1]
    if twice:
        raise _problem(path, line, f"column {twice[0]!r} occurs {header.count(twice[0])} times", "keep one of them")
    for name in (*REQUIRED, *OPTIONAL):
        if name in header:
            continue
        near = _near(name, header)
        if name in REQUIRED:
            hint = f"did you mean {near!r}? Rename it to {name!r}" if near else f"{expected}; add the column"
            raise _problem(path, line, f"no column {name!r} among {_shown(header)}", hint)
        if near is not None:
            # Otherwise a misspelt column, and with it the user's split or groups, would be ignored silently.
            remedy = f"did you mean {name!r}? Rename it, or remove the column"
            raise _problem(path, line, f"column {near!r} is not one of a manifest", remedy)
    return {name: header.index(name) for name in (*REQUIRED, *OPTIONAL) if name in header}


def _near(name: str, header: Sequence[str]) -> str | None:
    """The column that was most likely meant as `name`, or None."""
    free = [column for column in header if column not in (*REQUIRED, *OPTIONAL)]
    for column in free:
        if column.strip().lower().replace(" ", "_").replace("-", "_") == name:
            return column
    for alias in ALIASES[name]:
        for column in free:
            if column.strip().lower() == alias:
                return column
    close = get_close_matches(name, free, n=1, cutoff=0.8)
    return close[0] if close else None


# one row -------------------------------------------------------------------------------------------------------------


def _row(path: Path, line: int, values: dict[str, str]) -> ManifestRow:
    file_name, label = values["file_name"], values["label"].strip()
    if reason := _path_problem(file_name):
        raise _problem(path, line, f"file_name {file_name!r}: {reason}", "expected a path below the manifest's folder")
    if not file_name.lower().endswith(SUFFIXES):
        suffix = PurePosixPath(file_name).suffix or "no suffix"
        raise _problem(
            *(path, line, f"file_name {file_name!r}: {suffix}; expected {', '.join(SUFFIXES)}"),
            "convert the image, or remove the row",
        )
    if reason := _label_problem(label):
        raise _problem(
            path, line, f"label {label!r}: {reason}", "expected a name that a folder can have; rename the class"
        )
    split = None
    if "split" in values:
        requested = values["split"].strip()
        split = SPLIT_NAMES.get(requested.lower())
        if split is None:
            near = get_close_matches(requested.lower(), SPLIT_NAMES, n=1)
            hint = f"did you mean {near[0]!r}? Expected" if near else "expected"
            remedy = f"{hint} one of {', '.join(SPLIT_NAMES)} in every row, or no column 'split'"
            raise _problem(path, line, f"split {requested!r}", remedy)
    return ManifestRow(line, posixpath.normpath(file_name), label, split, values.get("group", "").strip() or None)


def _path_problem(file_name: str) -> str | None:
    if not file_name.strip():
        return "empty"
    if "\0" in file_name:
        return "a NUL character"
    if file_name.startswith(("/", "\\", "~")) or re.match(r"[A-Za-z]:[\\/]", file_name):
        return "an absolute path"
    if "://" in file_name:
        return "an address; images are read from disk"
    if posixpath.normpath(file_name).split("/")[0] == "..":
        return "a path that leaves the manifest's folder"
    return None


def _label_problem(label: str) -> str | None:
    if not label:
        return "empty"
    if label.startswith("."):
        return "begins with a dot, and hidden folders are skipped"
    if "/" in label or "\\" in label:
        return "contains a slash"
    if any(unicodedata.category(character) == "Cc" for character in label):
        return "contains a control character"
    if len(label.encode()) > NAME_BYTES:
        return f"longer than {NAME_BYTES} bytes"
    return None


# all rows ------------------------------------------------------------------------------------------------------------


def _require_files(path: Path, rows: Sequence[ManifestRow]) -> None:
    missing = [row for row in rows if not (path.parent / row.file_name).is_file()]
    if not missing:
        return
    first = missing[0]
    for candidate in (first.file_name.replace("\\", "/"), first.file_name.strip()):
        if candidate != first.file_name and (path.parent / candidate).is_file():
            raise _problem(
                path, first.line, f"file_name {first.file_name!r}: no such file", f"did you mean {candidate!r}?"
            )
    raise _problem(
        *(path, first.line, f"file_name {first.file_name!r}: no such file in {path.parent}"),
        f"{len(missing)} of {len(rows)} rows name missing files. Paths are relative to the manifest: put the images "
        "there, correct the paths, or remove the rows",
    )


def _require_once(path: Path, rows: Sequence[ManifestRow]) -> None:
    first: dict[str, ManifestRow] = {}
    for row in rows:
        other = first.setdefault(row.file_name, row)
        if other is row:
            continue
        labels = "" if other.label == row.label else f" with the label {other.label!r} there and {row.label!r} here"
        raise _problem(
            *(path, row.line, f"file_name {row.file_name!r} occurs in line {other.line} already{labels}"),
            "expected each file once; remove one of the rows",
        )


def _require_whole_groups(path: Path, rows: Sequence[ManifestRow]) -> None:
    first: dict[str, ManifestRow] = {}
    for row in rows:
        if row.group is None or row.split is None:
            continue
        other = first.setdefault(row.group, row)
        if other.split != row.split:
            raise _problem(
                *(path, row.line, f"group {row.group!r} is in {row.split} and, in line {other.line}, in {other.split}"),
                "expected each group in one split. Correct the rows, or remove the column 'split' to have the images "
                "split by groups",
            )


def _classes(path: Path, rows: Sequence[ManifestRow], fewest_classes: int) -> tuple[str, ...]:
    first: dict[str, ManifestRow] = {}
    for row in rows:
        first.setdefault(row.label, row)
    listed = _listed_classes(path.parent / LABELS)
    if listed is not None:
        for label, row in first.items():
            if label not in listed:
                near = _similar(label, listed)
                hint = f"did you mean {near!r}? Correct" if near else "correct"
                remedy = f"{hint} the label, or add it to {LABELS}"
                raise _problem(
                    path, row.line, f"label {label!r} is not in {LABELS}, which lists {_shown(listed)}", remedy
                )
        if unused := [label for label in listed if label not in first]:
            raise ManifestError(
                f"{path.parent / LABELS}: no row of {path.name} has the label {unused[0]!r} ({len(unused)} such "
                "class(es)); add images of it, or remove the line"
            )
    by_key: dict[str, ManifestRow] = {}
    for label, row in first.items():
        other = by_key.setdefault(_folded(label), row)
        if other is not row:
            problem = f"label {label!r} differs from {other.label!r} in line {other.line} in case or encoding only"
            raise _problem(path, row.line, problem, "use one spelling for one class")
    if len(first) < fewest_classes:
        raise ManifestError(f"{path}: one class only ({rows[0].label!r}); expected at least two classes")
    return tuple(listed or sorted(first))


def _similar(label: str, names: Sequence[str]) -> str | None:
    near = [name for name in names if _folded(name) == _folded(label)] or get_close_matches(label, names, n=1)
    return near[0] if near else None


def _folded(label: str) -> str:
    return unicodedata.normalize("NFC", label).casefold()


def _listed_classes(path: Path) -> list[str] | None:
    """The classes of a `labels.txt`, one per line, in order; None without the file."""
    if not path.is_file():
        return None
    line_of: dict[str, int] = {}
    for line, text in enumerate(_text(path).splitlines(), start=1):
        if not (label := text.strip()):
            continue
        if label in line_of:
            raise _problem(path, line, f"class {label!r} stands in line {line_of[label]} already", "expected it once")
        line_of[label] = line
    if not line_of:
        raise ManifestError(f"{path}: empty; expected one class name per line, or no such file")
    return list(line_of)
