"""Writing files so that a killed process leaves the old file or none."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not.

    Raises OSError that names `path` where the disk takes no more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The ending stays last: numpy and others add one of their own where it is missing.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would hide the file from colleagues
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # A failed write names no file; torch's writer then adds an error of its own, which says nothing of the disk.
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
    """The record (an object) in `path`; None when there is no such file.

    `kinds` {key: type of its value, where it is there}. Raises ValueError that names a damaged file.
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
    """SHA-256 of a file's bytes in lower-case hexadecimal."""
    with Path(file_path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
