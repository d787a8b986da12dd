"""Checkpoint files of any origin: identified by their contents, read without executing code from them.

The first bytes determine the format: safetensors, or a torch file, which torch's restricted unpickler reads with a
short list of allowed types. No other reader is tried for a refused file.
"""

from __future__ import annotations

import logging
import pickle
import pickletools
import re
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError

logger = logging.getLogger("disease_pipeline")

BLOCK = 1 << 20
MOST_HEADER_BYTES = 100_000_000  # limit of the safetensors specification
LEAVE_OUT = "leave it out with backbones.exclude"
# Globals that every checkpoint of tensors refers to. Only for messages naming the others; torch decides what is read.
HARMLESS = re.compile(
    r"torch\.\w+|torch\._utils\._rebuild\w+|torch\.storage\.\w+|torch\.nn\.parameter\.Parameter"
    r"|torch\._tensor\._rebuild\w+|collections\.(OrderedDict|Counter|defaultdict)"
    r"|numpy\._?core\.multiarray\.scalar|numpy\.dtype|numpy\.dtypes\.(Float64|Float32|Int64)DType|_codecs\.encode"
    r"|(__builtin__|builtins)\.(set|bytearray|complex)"
)
TRAINING_KEYS = ("augment", "group_regex", "split_digest", "base_back")  # in the base pipeline's checkpoints
SAVE_WEIGHTS = 'torch.save({"model_state_dict": model.state_dict()}, FILE)'


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint's record to the CPU without executing code; tensors of a zip file stay memory-mapped.

    The record of a safetensors file is {name: tensor}. NumPy scalars are allowed, since real checkpoints hold them.
    Raises UserError, with a message for each case, for a file that is missing, empty, truncated, a TorchScript archive,
    a tar file of PyTorch before 0.1.10, not a checkpoint, or that refers to a global that is not allowed.
    """
    import torch

    form = _form(path)
    if form == "safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_allowed_globals()), warnings.catch_warnings():
            # Other pickle protocols need no warning: they are read as safely, or refused with a message.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            record = torch.load(path, map_location="cpu", weights_only=True, mmap=form == "zip")
    except pickle.UnpicklingError as error:
        raise _refusal(path, form, error) from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory. Free some, or {LEAVE_OUT}") from error
    # The restricted unpickler raises any of these for damaged files.
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, _first_line(error)) from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path}: holds a {type(record).__name__}; expected a dictionary with model_state_dict. Save it as "
            f"{SAVE_WEIGHTS}, or {LEAVE_OUT}"
        )
    return record


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory. Free some, or {LEAVE_OUT}") from error
    # The reader raises KeyError for a dtype that the installed torch lacks.
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(
            f"{path}: truncated or damaged, cannot be read as a safetensors file ({reason}). Copy it again, or "
            f"{LEAVE_OUT}"
        ) from error


def state_dict_of(record: dict[str, Any]) -> dict[str, Any]:
    """The state dict in a checkpoint's record: the entry with one of the usual names, or the record itself."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(record.get(key), dict):
            weights: dict[str, Any] = record[key]
            return weights
    return record


def training_metadata(path: Path) -> dict[str, str]:
    """Training metadata of a checkpoint that the catalog lacks: augmentation, group rule, split, BASE-BACK."""
    extra = read_checkpoint(path).get("extra")
    metadata = extra if isinstance(extra, dict) else {}
    return {name: metadata[name] for name in TRAINING_KEYS if isinstance(metadata.get(name), str)}


@contextmanager
def reading_ahead(path: Path | None) -> Iterator[None]:
    """Within the context, a thread reads `path` into the page cache, so that opening it later needs no disk access.

    The thread uses one megabyte of memory and ends with the context.
    """
    if path is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_read_through, args=(path, stop), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _read_through(path: Path, stop: threading.Event) -> None:
    block = bytearray(BLOCK)
    try:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set() and file.readinto(block):
                pass
    except OSError as error:
        # Opening the file later raises an error with a remedy; prefetching is optional.
        logger.debug("%s: not read ahead (%s)", path, error)


def _form(path: Path) -> str:
    """`safetensors`, `zip` or `pickle`, by the file's first bytes. Raises UserError for any other format."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
        if not head:
            raise UserError(f"{path}: empty; expected a checkpoint. Copy or train it again, or {LEAVE_OUT}")
        if head.startswith(b"PK\x03\x04"):
            return _zip_form(path, size)
        if _is_tar(path):
            raise UserError(
                f"{path}: a tar file as PyTorch before 0.1.10 wrote it, which cannot be read without running what it "
                f"holds; expected a checkpoint of today. Save it again as {SAVE_WEIGHTS}, or {LEAVE_OUT}"
            )
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({_first_line(error)}). Copy or train it again, or {LEAVE_OUT}"
        ) from error
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself. Fetch it: git lfs pull")
    return "safetensors" if _is_safetensors(path, head) else "pickle"


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file starts with the length of a JSON header and the header, or has the suffix `.safetensors`."""
    length = int.from_bytes(head[:8], "little")
    return path.suffix == ".safetensors" or (head[8:9] == b"{" and length <= MOST_HEADER_BYTES)


def _is_tar(path: Path) -> bool:
    # Not tarfile.is_tarfile, which also tests for compressed archives by reading whole files.
    with path.open("rb") as file:
        block = file.read(512)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _zip_form(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(path, f"its table of contents is missing after {size} bytes, so the end was cut off") from error
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        raise UserError(
            f"{path}: a TorchScript archive, which holds a program; expected weights. Save them with "
            f'torch.save({{"model_state_dict": torch.jit.load(FILE).state_dict()}}, NEW), or {LEAVE_OUT}'
        )
    if "data.pkl" not in inside:
        raise UserError(
            f"{path}: a zip file without data.pkl (it holds {', '.join(sorted(names)[:3]) or 'nothing'}), so no "
            f"PyTorch checkpoint. Save one as {SAVE_WEIGHTS}, or {LEAVE_OUT}"
        )
    return "zip"


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: truncated or damaged, cannot be read as a checkpoint ({reason}). Copy or train it again, or "
        f"{LEAVE_OUT}"
    )


def _refusal(path: Path, form: str, error: Exception) -> UserError:
    """The error for a file that the restricted unpickler refused."""
    refused = [name for name in _globals_in(path, form) if not HARMLESS.fullmatch(name)]
    if not refused and (match := re.search(r"GLOBAL (\S+) was not an allowed global", str(error))):
        refused = [match[1]]
    if refused:
        names = ", ".join(refused)
        return UserError(
            f"{path}: refused, since loading it could run code: it asks for {names}; expected a checkpoint of tensors "
            f"and plain values. Save it again as {SAVE_WEIGHTS}, or {LEAVE_OUT}"
        )
    if "pickle data was truncated" in str(error):
        return _damaged(path, _first_line(error))
    with path.open("rb") as file:
        head = file.read(8)
    return UserError(
        f"{path}: refused, not a checkpoint that PyTorch's restricted reader knows (it begins with {head!r}); expected "
        f"a file made by {SAVE_WEIGHTS}. Save it again, or {LEAVE_OUT}"
    )


def _globals_in(path: Path, form: str) -> list[str]:
    """Names of the globals in a file's pickles, by disassembly; nothing is imported or called."""
    with path.open("rb") as file:
        if form == "zip":
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
                return _globals_of_pickle(archive.open(name))
        names: list[str] = []
        # A legacy checkpoint is a sequence of pickles, followed by the bytes of its tensors.
        for _ in range(5):
            names += [name for name in _globals_of_pickle(file) if name not in names]
        return names


def _globals_of_pickle(file: Any) -> list[str]:
    names: list[str] = []
    strings: list[str] = []
    memo: dict[int, str] = {}
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif "UNICODE" in operation.name or "STRING" in operation.name:
                strings.append(str(argument))
            elif operation.name == "MEMOIZE" and strings:
                memo[len(memo)] = strings[-1]
            elif operation.name in ("BINGET", "LONG_BINGET", "GET") and argument in memo:
                strings.append(memo[argument])
    except ValueError as error:
        logger.debug("disassembly ended early: %s", error)
    return list(dict.fromkeys(names))


def _dtype_kinds() -> list[Any]:
    return [np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]


def _allowed_globals() -> list[Any]:
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    # Files written with NumPy 1 refer to the same function by its former module.
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *_dtype_kinds()]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
