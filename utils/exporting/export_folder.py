"""The folder of an export: written under a temporary name, swapped in as a whole, and verified by checksums."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path, PurePath
from typing import Any

from utils.core.artifacts import read_json, read_record, write_json
from utils.core.caches import Item, list_children
from utils.core.errors import UserError, cannot_write
from utils.core.links import require_unlinked
from utils.core.record_forms import Each, Form, problem_of

STATUS, CHECKSUMS, METADATA, CLASSES = "export_status.json", "checksums.json", "metadata.json", "class_mapping.json"
EXPORT_AGAIN = "Export it again with --force"
NUMBER_OR_NULL = (float, type(None))
STATUS_FORM = Each(
    {
        "status": str,
        "files?": Each(str),
        "size_mb?": float,
        "latency_ms?": float,
        "threads?": int,
        "source_digest?": str,
        "parity?": {"max_abs_diff": NUMBER_OR_NULL, "tolerance?": float, "rows?": int},
        "test_accuracy?": Each(NUMBER_OR_NULL),
    }
)
WRITTEN_FORM: Form = {
    "size_mb": float,
    "parity?": {"max_abs_diff": float, "tolerance": float},
    "test_accuracy?": Each(float),
}
"""Form of an entry whose status is ok, beyond that of any entry."""
STAGED_NAME = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.partial")
PREVIOUS_NAME = re.compile(r"\.(?P<name>.+)\.previous")


@contextmanager
def replacing_folder(final: Path) -> Iterator[Path]:
    """An empty folder that replaces `final` when the block succeeds, and is removed when it fails.

    `recover_interrupted` first cleans up after killed exports. Raises UserError if the folder cannot be created.
    """
    require_unlinked(final)
    recover_interrupted(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise cannot_write(final, error) from error
    try:
        staged = root / final.name
        staged.mkdir()
        yield staged
        previous = _previous(final)
        if final.exists():
            final.rename(previous)
        staged.rename(final)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def recover_interrupted(final: Path) -> None:
    """Restore the folder that an interrupted swap moved away, and remove the unfinished folders of killed exports."""
    previous = _previous(final)
    if previous.is_dir() and not final.exists():
        previous.rename(final)
    shutil.rmtree(previous, ignore_errors=True)
    for stale in final.parent.glob(f".{final.name}.*.partial") if final.parent.is_dir() else ():
        shutil.rmtree(stale, ignore_errors=True)


def unfinished_folders(exports: Path) -> list[Item]:
    """Unfinished and replaced folders directly in `exports` that killed exports left behind.

    The result is valid only while no export runs; the base pipeline writes no folders with these names.
    """
    return [item for item in list_children(exports) if item.paths[0].is_dir() and _is_leftover(item.paths[0])]


def _is_leftover(folder: Path) -> bool:
    if staged := STAGED_NAME.fullmatch(folder.name):
        return {entry.name for entry in folder.iterdir()} <= {staged["name"], "scratch"}
    previous = PREVIOUS_NAME.fullmatch(folder.name)
    return previous is not None and (folder.parent / previous["name"]).is_dir()


def _previous(final: Path) -> Path:
    return final.with_name(f".{final.name}.previous")


def is_replaceable(final: Path) -> bool:
    """Whether an export may replace `final`: it is absent, or an export of an ensemble or member.

    The base pipeline's export of a backbone has the same path and is not replaceable.
    """
    if not final.exists():
        return True
    metadata = read_json(final / METADATA, remedy=EXPORT_AGAIN) if final.is_dir() else None
    training = metadata.get("training") if isinstance(metadata, dict) else None
    return isinstance(training, dict) and "ensemble" in training


def read_status(folder: Path) -> dict[str, Any] | None:
    """`export_status.json`: {format: its entry}; None if there is none. Raises UserError if it is damaged."""
    path = folder / STATUS
    status = read_record(path, remedy=EXPORT_AGAIN, form=STATUS_FORM)
    for name, entry in (status or {}).items():
        if entry["status"] == "ok" and (problem := problem_of(entry, WRITTEN_FORM, repr(name))) is not None:
            raise UserError(f"{path}: damaged, {problem}. {EXPORT_AGAIN}")
    return status


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def reusable_formats(final: Path, source_digest: str) -> dict[str, dict[str, Any]]:
    """{format: entry} of an earlier export for entries that are `ok`, have this source digest and intact files."""
    status = read_status(final) or {}
    return {
        name: entry
        for name, entry in status.items()
        if entry["status"] == "ok" and entry.get("source_digest") == source_digest and not changed_files(final, entry)
    }


def changed_files(folder: Path, entry: Mapping[str, Any]) -> list[str]:
    """Names of an entry's files that are missing or differ from their recorded digest."""
    return [
        name
        for name in entry_files(folder, entry)
        if not (folder / name).is_file() or file_sha256(folder / name) != entry["files"][name]
    ]


def entry_files(folder: Path, entry: Mapping[str, Any]) -> list[str]:
    """Names of an entry's files, relative to `folder`. Raises UserError for a file outside it."""
    files = entry.get("files") or {}
    if not isinstance(files, Mapping):
        raise UserError(
            f"{folder / STATUS}: damaged, 'files' is not a dict; expected {{file: SHA-256}}. {EXPORT_AGAIN}"
        )
    for name in files:
        if _is_outside(folder, name):
            raise UserError(
                f"{folder / STATUS}: names the file {name!r}; expected files in this folder. {EXPORT_AGAIN}"
            )
    return list(files)


def _is_outside(folder: Path, name: str) -> bool:
    """Whether a name is absolute, contains `..` or NUL, or passes through a symbolic link."""
    path = PurePath(name)
    steps = (folder.joinpath(*path.parts[:count]) for count in range(1, len(path.parts) + 1))
    return path.is_absolute() or ".." in path.parts or "\0" in name or any(step.is_symlink() for step in steps)


def link_files(final: Path, staged: Path, entry: Mapping[str, Any]) -> None:
    """Hard-link an entry's files from an earlier export into the new one; copy them if links are not possible."""
    for name in entry_files(final, entry):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(final / name, staged / name)
        except OSError:
            shutil.copyfile(final / name, staged / name)


def move_to_failed(staged: Path, name: str) -> None:
    """Move the files of a format that failed its parity check to `failed/`."""
    if (staged / name).is_dir() and any((staged / name).iterdir()):
        (staged / "failed").mkdir(exist_ok=True)
        (staged / name).rename(staged / "failed" / name)
    shutil.rmtree(staged / name, ignore_errors=True)


def write_records(
    staged: Path, metadata: Mapping[str, Any], classes: tuple[str, ...], status: Mapping[str, Any]
) -> dict[str, str]:
    """Write the four records; returns {relative path: SHA-256} of all files except `checksums.json`."""
    write_json(staged / CLASSES, {str(number): name for number, name in enumerate(classes)})
    write_json(staged / METADATA, dict(metadata))
    write_json(staged / STATUS, dict(status))
    checksums = compute_checksums(staged)
    write_json(staged / CHECKSUMS, checksums)
    return checksums


def compute_checksums(folder: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file except `checksums.json`, symbolic links and files in `failed/`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: file_sha256(path) for name, path in names.items() if name != CHECKSUMS and not name.startswith("failed/")
    }


def checksum_mismatches(folder: Path) -> list[str]:
    """One line for each difference from `checksums.json`. Raises UserError if there is no export."""
    expected = read_record(folder / CHECKSUMS, remedy=EXPORT_AGAIN, form=Each(str))
    if expected is None:
        raise UserError(f"{folder}: no {CHECKSUMS}, so it is not an export. Give the folder that export wrote")
    links = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()}
    actual = compute_checksums(folder)
    lines = [f"{name}: a symbolic link" for name in sorted(links)]
    lines += [f"{name}: missing" for name in sorted(expected.keys() - actual.keys() - links)]
    lines += [f"{name}: not part of the export" for name in sorted(actual.keys() - expected.keys())]
    return lines + [
        f"{name}: changed" for name in sorted(expected) if name in actual and actual[name] != expected[name]
    ]


def require_free_space(final: Path, needed: int) -> None:
    """Raise UserError if the disk has less free space than `needed` bytes."""
    existing = final.parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{final}: needs about {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free. Free some space (python "
            "ensemble_orchestrator.py clean lists what can be removed), request fewer --formats, or write elsewhere "
            "with --output DIR"
        )
