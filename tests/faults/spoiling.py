"""Ways to break a workspace, a configuration or a file of predictions: each takes the folder that it spoils."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from given_predictions import Arrays, changing, write

Spoil = Callable[[Path], object]
NAME = "CustomConvNeXt"
CANARY = "canary"


def nothing(folder: Path) -> None:
    """The command alone is the fault."""


def config(content: str | bytes) -> Spoil:
    """A configuration file of this content, as `given.yaml`."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / "given.yaml").write_bytes(raw)


def alias_bomb() -> str:
    """Nine levels of nine aliases each: 387 million values from 300 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


def text(relative_path: str, content: str | bytes) -> Spoil:
    """A file of the workspace with other content."""
    raw = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        (folder / relative_path).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative_path).write_bytes(raw)

    return spoil


def truncated(relative_path: str, fraction: float = 0.5) -> Spoil:
    """A file that ends too early."""

    def spoil(folder: Path) -> None:
        raw = (folder / relative_path).read_bytes()
        (folder / relative_path).write_bytes(raw[: int(len(raw) * fraction)])

    return spoil


def removed(relative_path: str) -> Spoil:
    """A file or folder that is not there."""

    def spoil(folder: Path) -> None:
        path = folder / relative_path
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def combined(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda folder: [spoil(folder) for spoil in spoils]


def record(relative_path: str, change: Callable[[Any], object]) -> Spoil:
    """A JSON record after `change(record)`."""

    def spoil(folder: Path) -> None:
        document = json.loads((folder / relative_path).read_text())
        change(document)
        (folder / relative_path).write_text(json.dumps(document))

    return spoil


def only_member(spoil: Spoil) -> Spoil:
    """One member left, and that spoilt: there is nothing to go on with."""

    def spoiling(folder: Path) -> None:
        for path in (folder / "checkpoints").glob("*.pth"):
            if path.name != f"{NAME}_final.pth":
                path.unlink()
        spoil(folder)

    return spoiling


def checkpoint(make: Callable[[Path], object]) -> Spoil:
    """The one checkpoint of a workspace made by `make(path)`."""
    return only_member(lambda folder: make(folder / "checkpoints" / f"{NAME}_final.pth"))


class Hostile:
    """An object whose unpickling runs what it likes."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(kind: str) -> Spoil:
    """A checkpoint that would leave a canary in the workspace if any of it ran."""

    def make(path: Path) -> None:
        import torch

        canary = path.parent.parent / CANARY
        if kind == "system":
            torch.save({"model_state_dict": Hostile(os.system, f"touch {canary}")}, path)
        elif kind == "eval":
            torch.save({"x": Hostile(eval, f"open({str(canary)!r}, 'w')")}, path)
        elif kind == "legacy":
            torch.save({"x": Hostile(os.system, f"touch {canary}")}, path, _use_new_zipfile_serialization=False)
        elif kind == "plain":
            path.write_bytes(pickle.dumps(Hostile(os.system, f"touch {canary}")))
        elif kind == "torchscript":
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))

    return checkpoint(make)


def weights(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """The weights of the one checkpoint changed."""

    def make(path: Path) -> None:
        import torch

        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return checkpoint(make)


def with_scalar_tensor(relative_path: str, name: str) -> Spoil:
    """One tensor of a safetensors file without any axis."""

    def spoil(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / relative_path)
        save_file(tensors | {name: np.array(1.0)}, folder / relative_path)

    return spoil


def with_nan(checkpoint: dict[str, Any]) -> None:
    for tensor in checkpoint["model_state_dict"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def another_architecture(folder: Path) -> None:
    """One family's weights under another's name."""
    source = (folder / "checkpoints" / "CustomResNetMish_final.pth").read_bytes()
    only_member(lambda folder: (folder / "checkpoints" / f"{NAME}_final.pth").write_bytes(source))(folder)


def png(width: int, height: int) -> bytes:
    """A PNG file that promises this many pixels and holds none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def image(content: bytes, split: str = "val") -> Spoil:
    """An image of a split replaced."""

    def spoil(folder: Path) -> None:
        sorted((folder / "split_dataset" / split).rglob("*.png"))[0].write_bytes(content)

    return spoil


def oof(change: Callable[[Arrays], Arrays]) -> Spoil:
    """The base pipeline's out-of-fold file of one member after `change`."""

    def spoil(folder: Path) -> None:
        path = folder / "kfold_results" / f"{NAME}_oof_predictions.npz"
        with np.load(path) as arrays:
            changed = dict(arrays)
        np.savez(path, **change(changed))

    return spoil


def import_file(stem: str = "oof", change: Callable[[Arrays], Arrays] = lambda arrays: arrays, **options: Any) -> Spoil:
    """Predictions of three members in `given/`, one file of one of them changed."""
    return lambda folder: write(folder / "given", change=changing("forest", stem, change), **options)


def raw_import_file(content: Callable[[Path], object], stem: str = "oof") -> Spoil:
    """Predictions of which one file is written by `content(path)`."""
    return combined(import_file(), lambda folder: content(folder / "given" / "forest" / f"{stem}.npz"))


def oversized_array(path: Path) -> None:
    """An archive whose array declares 80 TB."""
    header = np.lib.format.magic(1, 0)
    words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    words += b" " * (64 - (len(header) + 2 + len(words) + 1) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", header + struct.pack("<H", len(words)) + words)


def path_traversal(path: Path) -> None:
    """An archive with a name that leads out of it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"../../{CANARY}", b"out")


def understated_size(path: Path) -> None:
    """An archive of 2 GB of zeros in 2 MB, its header changed to promise a thousand times as much."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", bytes(1 << 20))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 2_000_000_000)
    path.write_bytes(raw)


def duplicate_entry(path: Path) -> None:
    """An archive in which two arrays have one name."""
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("labels.npy", b"")
