"""Lists the images of a folder of class folders and assigns them to splits and folds.

Images are sorted, named by their path and identified by their content. Reads no settings, so that other programs can
list and assign images with the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import read_json
from .patterns import captured

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MANIFEST = "split_manifest.json"
"""File beside train, val and test that records the images and their splits."""
TIE = 1e-9
"""Differences in urgency below this, per row of a group, are rounding errors."""
RECORD = "image_set.json"
"""File beside train, val and test of a split from a CSV manifest: ordered `classes`, `groups` {split: {id: group}}."""


@dataclass(frozen=True)
class Sample:
    """One image file of a class folder."""

    path: Path
    """Path of the file."""
    sample_id: str
    """Path relative to the root, with `/`: `canker/canker_1.jpg`."""
    label: int
    """Index of its class folder in the sorted order, or in the recorded order of the split."""
    group: str | None = None
    """Name of its group as recorded by the split; images of one group are never separated."""


def class_folders(root: Path) -> list[str]:
    """Sorted names of the class folders directly below `root`; empty if `root` does not exist."""
    if not root.is_dir():
        return []
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan(root: Path) -> tuple[list[str], list[Sample]]:
    """Classes and samples below `root`, one level deep, sorted by class and file name.

    With a RECORD beside the split, classes have its order. Raises FileNotFoundError if `root` does not exist, and
    ValueError for a class folder without images, for a RECORD of other classes, and for broken links of a recorded
    split.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected one folder per class with images in it")
    record = _record(root.parent)
    classes = _in_order(class_folders(root), record, root)
    groups = record["groups"].get(root.name, {})
    is_recorded = (root.parent / MANIFEST).is_file()
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        files = image_names(root / name)
        if is_recorded:
            _require_linked(root / name, files)
        if not files:
            raise ValueError(
                f"{root / name}: the class folder holds no image ({', '.join(SUFFIXES)}); add some, or move it away"
            )
        ids = [f"{name}/{file}" for file in files]
        samples += [Sample(root / i, i, label, groups.get(i)) for i in ids]
    return classes, samples


def image_names(folder: Path) -> list[str]:
    """Sorted names of the image files directly in `folder`."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _require_linked(folder: Path, files: Sequence[str]) -> None:
    """Raise ValueError for broken links in a class folder of a split, which `files` does not list."""
    listed = set(files)
    others = sorted(path for path in folder.iterdir() if path.name not in listed)
    broken = [path for path in others if path.suffix.lower() in SUFFIXES and path.is_symlink() and not path.exists()]
    if broken:
        raise ValueError(
            f"{broken[0]}: a link to {broken[0].readlink()}, which does not exist ({len(broken)} such link(s) in the "
            "folder); put the images back, or move the split folder away to split again"
        )


def recorded_groups(split_dir: Path) -> dict[str, dict[str, str]]:
    """{split: {sample id: group}} as recorded by the split; empty without recorded groups."""
    groups: dict[str, dict[str, str]] = _record(split_dir)["groups"]
    return groups


def _record(split_dir: Path) -> dict[str, Any]:
    path = split_dir / RECORD
    record = read_json(path)
    if record is None:
        return {"classes": None, "groups": {}}
    if not isinstance(record, dict) or record.keys() < {"classes", "groups"}:
        raise ValueError(f"{path}: expected the keys classes and groups; move the split folder away to split again")
    return record


def _in_order(folders: list[str], record: Mapping[str, Any], root: Path) -> list[str]:
    """The class folders in the recorded order, if there is one."""
    classes: list[str] | None = record["classes"]
    if classes is None or not folders:
        return folders
    if sorted(classes) != folders:
        raise ValueError(
            f"{root}: class folders {', '.join(folders)}; {RECORD} lists {', '.join(classes)}. Move the split folder "
            "away to split again"
        )
    return classes


def content_digests(samples: Sequence[Sample], known_digests: Mapping[str, Sequence] | None = None) -> dict[str, list]:
    """`{sample id: [size in bytes, modification time in ns, SHA-256]}` of the samples' files.

    A digest in `known_digests` is reused if size and modification time are unchanged.
    """
    digests: dict[str, list] = {}
    for sample in samples:
        status = sample.path.stat()
        entry = (known_digests or {}).get(sample.sample_id)
        if entry and entry[0] == status.st_size and entry[1] == status.st_mtime_ns:
            digests[sample.sample_id] = list(entry)
        else:
            content = hashlib.sha256(sample.path.read_bytes()).hexdigest()
            digests[sample.sample_id] = [status.st_size, status.st_mtime_ns, content]
    return digests


def digest_of_contents(contents: Mapping[str, str]) -> str:
    """One digest of {sample id: SHA-256 of the file}, independent of the order."""
    lines = "".join(f"{sample_id}\0{contents[sample_id]}\n" for sample_id in sorted(contents))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def group_indices(
    sample_ids: Sequence[str],
    contents: Sequence[str],
    group_regex: str | None,
    names: Sequence[str | None] | None = None,
) -> np.ndarray:
    """Group of each row, int64 (N,): rows with equal content or a common group name share a group.

    The group names of a row are the capture of `group_regex` in its file name and its entry in `names`, the recorded
    groups; a file with neither is a group by itself. Raises ValueError for an expression that takes too long to match.
    """
    parent = list(range(len(sample_ids)))

    def root_of(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    file_names = [sample_id.rsplit("/", 1)[-1] for sample_id in sample_ids]
    captures = captured(group_regex, file_names) if group_regex else [None] * len(file_names)
    for index, (group, content) in enumerate(zip(captures, contents, strict=True)):
        keys = [("content", content)]
        if group is not None:
            keys.append(("group", group))
        if names is not None and (name := names[index]) is not None:
            keys.append(("recorded", name))
        for key in keys:
            other = first.setdefault(key, index)
            low, high = sorted((root_of(index), root_of(other)))
            parent[high] = low
    roots = [root_of(index) for index in range(len(parent))]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def stratified_bins(
    labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int, *, rare: bool = False
) -> np.ndarray:
    """Bin of each row, int64 (N,): whole groups, with each class distributed over the bins by `shares`, which sum to 1.

    Large groups are assigned first, each to the bin that lacks its classes most; ties are broken by a seeded shuffle.
    With single-image groups every class meets its rounded shares exactly. With `rare`, for classes with fewer groups
    than bins, shares are not rounded, and ties between bins go to the one with the fewest rows: with rounding, all
    such classes would go to the first bins.
    """
    classes = int(labels.max()) + 1
    per_class = np.bincount(labels, minlength=classes)
    if rare:
        targets = np.outer(shares, per_class)
    else:
        targets = np.stack([_whole_shares(int(count), shares) for count in per_class], axis=1).astype(float)
    members = np.zeros((int(groups.max()) + 1, classes))
    np.add.at(members, (groups, labels), 1)
    order = np.random.default_rng(seed).permutation(len(members))
    order = order[np.argsort(-members[order].sum(axis=1), kind="stable")]
    missing = targets.copy()  # (bins, C)
    filled = np.zeros(len(shares))
    bin_of_group = np.empty(len(members), dtype=np.int64)
    for group in order:
        counts = members[group]
        urgency = (missing / np.maximum(targets, 1)) @ counts
        if rare:
            is_most_urgent = urgency >= urgency.max() - TIE * counts.sum()
            target = int(np.argmin(np.where(is_most_urgent, filled / shares, np.inf)))
        else:
            target = int(np.argmax(urgency))
        bin_of_group[group] = target
        missing[target] -= counts
        filled[target] += counts.sum()
    return bin_of_group[groups]


def _whole_shares(count: int, shares: Sequence[float]) -> np.ndarray:
    """Divide `count` rows by `shares` with the largest remainder method; each bin gets at least one row if possible."""
    exact = np.asarray(shares) * count
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: count - counts.sum()]:
        counts[index] += 1
    while count >= len(shares) and counts.min() == 0:
        counts[np.argmin(counts)] += 1
        counts[np.argmax(counts)] -= 1
    return counts
