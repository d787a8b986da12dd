"""Whether two workspaces hold the same, by the rule of docs/contract.md: bytes, less what was measured."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

MEASURED = ("latency_ms", "seconds", "created", "versions", "export_timestamp")
"""Keys of records that no two runs share."""
WITH_TIMES = ("export_status.json", "metadata.json")
"""Records of an export that hold such keys, so that their checksums differ as well."""
OF_THE_RUN = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:]+\+00:00|\b(?:[0-9a-f]{12}|[0-9a-f]{64})\b|(?<=dataset\.num_workers=)\d+"
    r"|(?<=<td>)\d+\.\d+ / \d+\.\d+"
)
"""What the report says of its own making: times, digests of records with times in them, how images were read, and the
milliseconds that sparse ensembles were measured to take."""
LEFT_OUT = ("debug_logs", "image_cache", "debug_tmp")
"""Folders of messages and of decoded pixels, which are made anew at need."""
REMEMBERED = ("ensembles/digests.json", "ensembles/latency.json")
"""Inodes and times of files; latencies, with which both runs have to begin."""


def content(workspace: Path, ignored: Collection[str] = ()) -> dict[str, str]:
    """{path: what must be equal} of every file of a workspace; `ignored` are further keys of records."""
    found = {}
    for path in sorted(workspace.rglob("*")):
        name = path.relative_to(workspace).as_posix()
        if path.is_dir() or name.split("/")[0] in LEFT_OUT or name in REMEMBERED or path.name.startswith(".lock."):
            continue  # a lock under a temporary name may be somebody's who waits; clean removes it after an hour
        if path.suffix == ".json":
            record = _less(json.loads(path.read_text()), str(workspace), {*MEASURED, *ignored})
            if path.name == "checksums.json":
                record = {file: digest for file, digest in record.items() if file not in WITH_TIMES}
            found[name] = json.dumps(record, sort_keys=True)
        elif path.suffix == ".html":
            page = path.read_text(encoding="utf-8").replace(str(workspace), "")
            found[name] = OF_THE_RUN.sub(
                "", page.replace(f"<h1>{workspace.name}:", "<h1>")
            )  # of a project without a name
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(one: Path, other: Path, ignored: Collection[str] = ()) -> list[str]:
    """Names of files that differ or are in one workspace alone; `ignored` are further keys of records."""
    first, second = content(one, ignored), content(other, ignored)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def unfinished(workspace: Path) -> list[str]:
    """Files under temporary names, less those that may be of a process that asks for the lock."""
    return [path.name for path in workspace.rglob(".*partial*") if not path.name.startswith(".lock.")]


def _less(value: Any, place: str, ignored: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _less(item, place, ignored) for key, item in value.items() if key not in ignored}
    if isinstance(value, list):
        return [_less(item, place, ignored) for item in value]
    return value.replace(place, "") if isinstance(value, str) else value
