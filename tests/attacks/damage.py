"""Ways in which a JSON record that this project reads back can be damaged, generated from what the record holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

EXPORT = "deployment_models/soft_voting_ensemble"
WHOLE = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[1]",
    "a number": b"3",
    "text": b'"x"',
    "true": b"true",
    "no keys": b"{}",
    "half": None,
    "depth": b"[" * 100_000,
    "Latin-1": '{"caf\xe9": 1}'.encode("latin-1"),
    "bytes": bytes(range(256)),
    "numbers of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
"""{damage: content of the file}; None is half of what it held."""
OTHERS: tuple[Any, ...] = (
    None,
    7,
    -1.5,
    True,
    "x",
    [],
    [1],
    [[]],
    {},
    {"x": 1},
    {"x": None},
    {"x": []},
    {"x": {}},
    "\x1b[2J",
)
"""Values of which one takes the place of another."""


def whole_files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """{damage: content} of a whole file."""
    for name, other in WHOLE.items():
        yield name, content[: len(content) // 2] if other is None else other


def values(content: bytes, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` records of which one value, at any depth, was replaced or removed; seeded."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        record = json.loads(content)
        places = list(_places(record))
        if not places:
            return
        # A long list is one place among many, not most of them.
        parents = {}
        for holder, key, where in places:
            parents.setdefault(id(holder), []).append((holder, key, where))
        among = list(parents.values())
        group = among[rng.integers(len(among))]
        holder, key, where = group[rng.integers(len(group))]
        choice = int(rng.integers(len(OTHERS) + 1))
        if choice == len(OTHERS):
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(OTHERS[choice]))
        yield f"{where} {'removed' if choice == len(OTHERS) else f'= {OTHERS[choice]!r}'}", json.dumps(record).encode()


def _places(value: Any, where: str = "") -> Iterator[tuple[Any, Any, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key, f"{where}/{key}"
        yield from _places(item, f"{where}/{key}")


def records_of(workspace: Path) -> list[str]:
    """All JSON records below a workspace, without those of images."""
    paths = sorted(path for path in workspace.rglob("*.json") if "image_cache" not in path.parts)
    return [path.relative_to(workspace).as_posix() for path in paths]


def export_by_hand(workspace: Path) -> None:
    """What the records of an export say; its one file is no program and is never opened."""
    folder = workspace / EXPORT
    (folder / "checkpoint").mkdir(parents=True)
    file = folder / "checkpoint" / "soft_voting_ensemble.pth"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    parity = {"rows": 8, "tolerance": 1e-4, "max_abs_diff": 1e-7, "label_flips": 0}
    entry = {"status": "ok", "files": {"checkpoint/soft_voting_ensemble.pth": digest}, "parity": parity}
    entry |= {"size_mb": 0.1, "latency_ms": 1.5, "threads": 1, "reason": None, "source_digest": "0" * 64}
    training = {"ensemble": "soft_voting_ensemble", "jumps": False, "outputs": ["probabilities"]}
    records = {
        "export_status.json": {"checkpoint": entry, "onnx": {"status": "skipped", "reason": "no tools"}},
        "metadata.json": {"training": training | {"input": {"kind": "float-nchw"}}, "architecture": "x"},
        "class_mapping.json": {"0": "ant", "1": "bee", "2": "cat"},
    }
    for name, record in records.items():
        (folder / name).write_text(json.dumps(record))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    (folder / "checksums.json").write_text(json.dumps(sums))
    (workspace / "ensembles" / "exported_files.json").write_text(json.dumps({"files": {digest: file.name}}))
