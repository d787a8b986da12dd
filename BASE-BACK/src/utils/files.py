"""Atomic file writes: a killed process leaves the old file or none."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block succeeds and is removed when it raises.

    Raises OSError naming `path` when writing fails, for example on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: NumPy and others append theirs if it is missing.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:  # a signal may arrive as soon as the file exists
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # until now only its owner can read it
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # A failed write does not name the file, and torch's writer raises a RuntimeError that hides the cause.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or reason.filename is not None:
            raise
        raise OSError(reason.errno, reason.strerror or str(reason), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Write `record` as JSON with sorted keys, atomically."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, **kinds: type) -> Any:
    """Read the JSON object in `path`; None if there is no such file.

    `kinds` maps keys to the required types of their values, if present. Raises ValueError naming a damaged file.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON ({error}); remove the file and run the pipeline again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: damaged, it holds no object; remove the file and run the pipeline again")
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key, kind()), kind)]
    if wrong:
        raise ValueError(
            f"{path}: damaged, {wrong[0]} is no {kinds[wrong[0]].__name__}; remove the file and run the pipeline again"
        )
    return record


def compute_file_sha256(file_path: Path) -> str:
    """SHA-256 of a file's contents in lower-case hexadecimal."""
    with Path(file_path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
