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


def bomb() -> str:
    """Nine levels of nine aliases each: 387 million values from 300 bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


def text(place: str, content: str | bytes) -> Spoil:
    """A file of the workspace with other content."""
    raw = content.encode() if isinstance(content, str) else content

    def spoil(folder: Path) -> None:
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(raw)

    return spoil


def cut(place: str, share: float = 0.5) -> Spoil:
    """A file that ends too early."""

    def spoil(folder: Path) -> None:
        raw = (folder / place).read_bytes()
        (folder / place).write_bytes(raw[: int(len(raw) * share)])

    return spoil


def gone(place: str) -> Spoil:
    """A file or folder that is not there."""

    def spoil(folder: Path) -> None:
        path = folder / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""
    return lambda folder: [spoil(folder) for spoil in spoils]


def record(place: str, change: Callable[[Any], object]) -> Spoil:
    """A JSON record after `change(record)`."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / place).read_text())
        change(found)
        (folder / place).write_text(json.dumps(found))

    return spoil


def alone(spoil: Spoil) -> Spoil:
    """One member left, and that spoilt: there is nothing to go on with."""

    def spoiling(folder: Path) -> None:
        for path in (folder / "checkpoints").glob("*.pth"):
            if path.name != f"{NAME}_final.pth":
                path.unlink()
        spoil(folder)

    return spoiling


def checkpoint(make: Callable[[Path], object]) -> Spoil:
    """The one checkpoint of a workspace made by `make(path)`."""
    return alone(lambda folder: make(folder / "checkpoints" / f"{NAME}_final.pth"))


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

        found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)

    return checkpoint(make)


def shapeless(place: str, name: str) -> Spoil:
    """One tensor of a safetensors file without any axis."""

    def spoil(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        found = load_file(folder / place)
        save_file(found | {name: np.array(1.0)}, folder / place)

    return spoil


def poisoned(found: dict[str, Any]) -> None:
    for tensor in found["model_state_dict"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def another_architecture(folder: Path) -> None:
    """One family's weights under another's name."""
    source = (folder / "checkpoints" / "CustomResNetMish_final.pth").read_bytes()
    alone(lambda place: (place / "checkpoints" / f"{NAME}_final.pth").write_bytes(source))(folder)


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
            found = dict(arrays)
        np.savez(path, **change(found))

    return spoil


def given(stem: str = "oof", change: Callable[[Arrays], Arrays] = lambda arrays: arrays, **options: Any) -> Spoil:
    """Predictions of three members in `given/`, one file of one of them changed."""
    return lambda folder: write(folder / "given", change=changing("forest", stem, change), **options)


def given_raw(content: Callable[[Path], object], stem: str = "oof") -> Spoil:
    """Predictions of which one file is written by `content(path)`."""
    return both(given(), lambda folder: content(folder / "given" / "forest" / f"{stem}.npz"))


def huge(path: Path) -> None:
    """An archive whose array declares 80 TB."""
    header = np.lib.format.magic(1, 0)
    words = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"
    words += b" " * (64 - (len(header) + 2 + len(words) + 1) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", header + struct.pack("<H", len(words)) + words)


def slipping(path: Path) -> None:
    """An archive with a name that leads out of it."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"../../{CANARY}", b"out")


def swollen(path: Path) -> None:
    """An archive of 2 GB of zeros in 2 MB, its header changed to promise a thousand times as much."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("logits.npy", bytes(1 << 20))
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 24 : at + 28] = struct.pack("<I", 2_000_000_000)
    path.write_bytes(raw)


def twice(path: Path) -> None:
    """An archive in which two arrays have one name."""
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("labels.npy", b"")
