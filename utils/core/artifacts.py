"""The only module that writes files, atomically; reading raises errors that name damaged files.

Records are JSON with sorted keys, arrays `.npy` / `.npz` without pickled objects, parameters `.safetensors`.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from utils.core.array_archives import ArrayHeader, checked_entries, read_entry, read_header
from utils.core.errors import UserError, cannot_write
from utils.core.links import require_unlinked
from utils.core.record_forms import Form, problem_of
from utils.core.regular_files import open_regular, require_regular

NOT_OFFERED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # file systems without preallocation
BLOCK = 1 << 20
_DAMAGE = (OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, tokenize.TokenError, RecursionError)
"""Errors of reading a damaged array; the last four come from its header, which NumPy parses as a Python literal."""
_ARCHIVE_DAMAGE = (*_DAMAGE, zipfile.BadZipFile, zlib.error, RuntimeError)
_HEADERS = threading.Lock()
"""Serialises parsing of these literals: before Python 3.11.8, concurrent parsers may confuse depths (gh-106905)."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` that replaces it when the block succeeds, and is removed otherwise.

    Raises UserError, with path and remedy, if the disk is full, the folder is not writable, or it is behind a symbolic
    link.
    """
    require_unlinked(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    # The suffix stays last, since NumPy appends its own if it is missing.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:  # which removes the file, since a signal may arrive as soon as it exists
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # until now only its owner can read it
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path)):
            raise  # about another file, which was read inside the block
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporary_files(path: Path) -> None:
    """Remove temporary files of `path` left by killed processes; for callers that are the only writer of the file."""
    stem, suffix = glob.escape(path.stem), glob.escape(path.suffix)
    for unfinished in path.parent.glob(f".{stem}.????????.partial{suffix}"):
        unfinished.unlink(missing_ok=True)


def preallocate(path: Path, start: int) -> None:
    """Allocate the disk space of a sparse file from byte `start` on, which is a hole; OSError if the disk is full.

    Writing to a hole of a memory-mapped file on a full disk raises no exception, but the signal SIGBUS, which ends the
    process.
    """
    size = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), start, size - start)
                return
            except OSError as error:
                if error.errno not in NOT_OFFERED:
                    raise
        file.seek(start)
        while (n_missing := size - file.tell()) > 0:
            file.write(bytes(min(n_missing, BLOCK)))


def link_file(source: Path, path: Path) -> None:
    """Hard-link a file that is never modified in place to `path`; copy it on file systems without links."""
    with replacing(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    """Write a record with sorted keys, atomically. Raises ValueError for NaN or infinity."""
    write_text(path, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, remedy: str) -> Any:
    """Read the record in `path`; None if there is no such file. Raises UserError with `remedy` if it is damaged."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read().decode("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, {error}; expected a JSON record. {remedy}") from error


class _Record(dict[str, Any]):
    """A dictionary of a record of this project; a missing key means that its file is damaged."""

    source: tuple[Path, str]
    """Its file, and the remedy for a damaged file."""

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        """Pickle as a plain dictionary, since the class of each file exists in one process only."""
        return dict, (dict(self),)

    def __missing__(self, key: str) -> Any:
        raise _no_record(*self.source, f"it has no {key!r}")


def _no_record(path: Path, remedy: str, problem: str) -> UserError:
    return UserError(f"{path}: damaged, {problem}; expected a record of this project. {remedy}")


def read_record(path: Path, *, remedy: str, form: Form = MappingProxyType({})) -> dict[str, Any] | None:
    """Read a record of this project; None if there is no such file.

    `form` declares its values (`record_forms`). Raises UserError with `remedy` for a damaged file, another form, and on
    access to a missing key at any depth.
    """
    record = read_json(path, remedy=remedy)
    if record is None:
        if path.exists():
            raise _no_record(path, remedy, "it holds null")
        return None
    if not isinstance(record, dict):
        raise _no_record(path, remedy, f"it holds a {type(record).__name__}")
    if (problem := problem_of(record, form)) is not None:
        raise _no_record(path, remedy, problem)
    kind = type("Record", (_Record,), {"source": (path, remedy)})
    wrapped: dict[str, Any] = _wrapped(record, kind)
    return wrapped


def _wrapped(value: Any, kind: type) -> Any:
    if isinstance(value, dict):
        return kind({key: _wrapped(item, kind) for key, item in value.items()})
    return [_wrapped(item, kind) for item in value] if isinstance(value, list) else value


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one array as `.npy`, atomically."""
    with replacing(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


def open_array(path: Path, *, remedy: str) -> np.ndarray:
    """A memory map of a `.npy` file. Raises UserError with `remedy` if it is missing, damaged or pickled."""
    try:
        require_regular(path)
        with _HEADERS:
            return np.lib.format.open_memmap(path, mode="r")
    except _DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read, {error}; expected an array without pickled objects. {remedy}"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write several arrays as `.npz`, atomically; equal arrays give equal bytes."""
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays)})


def read_arrays(
    path: Path, *, remedy: str, check: Callable[[Mapping[str, ArrayHeader]], Collection[str]] | None = None
) -> dict[str, np.ndarray]:
    """All arrays of a `.npz` file. Raises UserError with `remedy` if it is missing, damaged or pickled.

    Before memory is allocated, the shape in each array's header is checked against its bytes in the archive, and these
    against the file and the machine's memory. `check` receives the headers before any array is read, raises ValueError
    for arrays that are too large, and returns the names of the arrays to read.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            entries = checked_entries(archive, path.stat().st_size)
            headers = {name: read_header(archive, entry) for name, entry in entries.items()}
            names = headers if check is None else check(headers)
            return {name: read_entry(archive, entries[name]) for name in headers if name in names}
    except _ARCHIVE_DAMAGE as error:
        raise UserError(
            f"{path}: cannot be read, {error}; expected arrays without pickled objects. {remedy}"
        ) from error


def array_headers(path: Path, *, remedy: str) -> dict[str, ArrayHeader]:
    """The headers of a `.npz` file's arrays; raises the errors of `read_arrays`."""
    headers: dict[str, ArrayHeader] = {}

    def keep(checked_headers: Mapping[str, ArrayHeader]) -> tuple[str, ...]:
        headers.update(checked_headers)
        return ()

    read_arrays(path, remedy=remedy, check=keep)
    return headers


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as `.safetensors`, atomically."""
    from safetensors.numpy import save

    ordered = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with replacing(path) as temporary:
        temporary.write_bytes(save(ordered))


def read_tensors(path: Path, *, remedy: str) -> dict[str, np.ndarray]:
    """All arrays of a `.safetensors` file. Raises UserError with `remedy` if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        with open_regular(path) as file:
            return load(file.read())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read, {error}; expected a safetensors file. {remedy}") from error


def write_checkpoint(path: Path, weights: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Write a checkpoint in the base pipeline's format, atomically; equal contents give equal bytes.

    `weights` is {name: tensor}; `extra` is its metadata, JSON-ready. Temporary files of killed writers are removed.
    """
    import torch

    # A pickle records which strings are identical objects; parsing JSON makes that reproducible.
    plain = json.loads(json.dumps(extra, sort_keys=True, allow_nan=False))
    remove_temporary_files(path)
    with replacing(path) as temporary, temporary.open("wb") as file:  # with a path, its name would be in the archive
        torch.save({"model_state_dict": dict(weights), "extra": plain}, file)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-ready value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()).hexdigest()


def _digest_or_none(value: Any) -> str | None:
    try:
        return digest_of(value)
    except ValueError:  # NaN or a lone surrogate, which this project never writes
        return None


class FileDigests:
    """SHA-256 of files, cached by size, modification time and inode, so that no file is read twice.

    Other facts about a file's content can be stored under its digest (`facts`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        form = {"files": dict, "facts": dict}
        stored = read_record(path, remedy="Remove it; digests are then taken again.", form=form) or {}
        self._files: dict[str, list[Any]] = {
            name: entry
            for name, entry in stored.get("files", {}).items()
            if isinstance(entry, list) and len(entry) == 4
        }
        facts: dict[str, Any] = stored.get("facts", {})
        # Facts have many forms, so damage is detected by a digest; damaged facts are discarded.
        is_intact = stored.get("facts_sha256") in (None, _digest_or_none(facts))
        self._facts = facts if is_intact else {}
        self._changed = not is_intact

    def of(self, path: Path) -> str:
        """Digest of one file; raises OSError if it cannot be read."""
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._files.get(str(path))
        if entry is not None and entry[:3] == state:
            return entry[3]
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._files[str(path)] = [*state, digest]
        self._changed = True
        return digest

    def is_unchanged(self, path: Path) -> bool | None:
        """Whether a file is unchanged since its digest was computed, without reading it; None without a digest."""
        entry = self._files.get(str(path))
        if entry is None:
            return None
        status = path.stat()
        return entry[:3] == [status.st_size, status.st_mtime_ns, status.st_ino]

    def is_intact(self, path: Path) -> bool:
        """Whether a file exists and is not known to have changed; does not read it."""
        return path.is_file() and self.is_unchanged(path) is not False

    def facts(self, digest: str) -> Any:
        """The facts stored for a content; None without any."""
        return self._facts.get(digest)

    def keep(self, digest: str, facts: Any) -> None:
        """Store JSON-ready facts about a content."""
        self._facts[digest] = facts
        self._changed = True

    def save(self) -> None:
        """Write new digests and facts to disk."""
        if self._changed:
            facts_sha256 = digest_of(self._facts)
            write_json(self.path, {"files": self._files, "facts": self._facts, "facts_sha256": facts_sha256})
            self._changed = False
