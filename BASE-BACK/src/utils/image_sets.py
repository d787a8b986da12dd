"""Image sets in three layouts: class folders, folders train, val and test, or a CSV manifest.

All are read as an `ImageSet`. Reads no settings and writes no files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from .image_manifest import SPLIT_NAMES, ManifestRow, read_manifest_file
from .samples import Sample, class_folders, image_names, scan

EXPECTED = (
    "Expected a folder with one folder of images per class, a folder with train, val and test of such folders, or a "
    "CSV manifest (file_name,label[,split][,group])"
)
CLASS_FOLDERS, SPLIT_FOLDERS, MANIFEST = "class folders", "split folders", "manifest"
"""The layouts of image sets."""
LONGEST_NAME = 200  # bytes of a file name derived from a path


class ImageSetError(ValueError):
    """A folder or file has none of the layouts of an image set."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, sorted by class and name, with the splits and groups of their source."""

    layout: str
    """CLASS_FOLDERS, SPLIT_FOLDERS or MANIFEST."""
    classes: list[str]
    samples: list[Sample]
    """Samples with ids `<class>/<file name>`, which may repeat in different splits."""
    names: list[str]
    """Path of each image relative to the source's folder."""
    splits: list[str | None]
    """train, val or test for each image; None if the source has no splits."""
    lines: list[int] | None = None
    """Line number of each image in its manifest."""
    is_ordered: bool = False
    """Whether the order of `classes` differs from the sorted one."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how the source was read."""

    def named_samples(self) -> list[Sample]:
        """The samples with the unique names of the source as ids."""
        return [replace(sample, sample_id=name) for sample, name in zip(self.samples, self.names, strict=True)]

    def take(self, rows: Sequence[int]) -> ImageSet:
        """The images at `rows`."""
        return replace(
            self,
            samples=[self.samples[row] for row in rows],
            names=[self.names[row] for row in rows],
            splits=[self.splits[row] for row in rows],
            lines=None if self.lines is None else [self.lines[row] for row in rows],
        )

    def assignment_digest(self) -> str:
        """Digest of labels, splits, groups and the order of classes, which do not depend on the files' contents."""
        rows = [
            (name, self.classes[sample.label], split, sample.group)
            for name, sample, split in zip(self.names, self.samples, self.splits, strict=True)
        ]
        return hashlib.sha256(repr((self.classes, rows)).encode("utf-8", "surrogateescape")).hexdigest()


def open_image_set(source: Path, *, fewest_classes: int = 2) -> ImageSet:
    """List the images of a folder or of a CSV manifest.

    Training needs two classes; a set that is only scored may have one (`fewest_classes`). Raises FileNotFoundError for
    a source that does not exist, and `ImageSetError` or `ManifestError`, both ValueErrors, for one that is not an image
    set; the message names an image set nearby, if there is one.
    """
    if source.is_file():
        return _of_manifest(source, fewest_classes)
    if not source.is_dir():
        near = get_close_matches(source.name, _entries(source.parent), n=1)
        hint = f"; did you mean {source.parent / near[0]}?" if near else "."
        raise FileNotFoundError(f"{source}: no such folder or file{hint} {EXPECTED}")
    folders = _split_folders(source)
    if folders is not None:
        return _of_split_folders(source, folders)
    return _of_class_folders(source, fewest_classes)


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


# class folders -------------------------------------------------------------------------------------------------------


def _of_class_folders(source: Path, fewest_classes: int) -> ImageSet:
    folders = class_folders(source)
    empty = [name for name in folders if not image_names(source / name)]
    if len(empty) == len(folders):
        raise ImageSetError(f"{source}: {_contents(source, folders)}{_near_image_set(source, folders)} {EXPECTED}")
    if len(folders) < fewest_classes:
        raise ImageSetError(
            f"{source}: found one class only ({folders[0]!r}); expected one folder per class and at least two classes"
        )
    for name in empty:
        if (count := _class_count(source / name)) > 1:
            raise ImageSetError(
                f"{source}: its folder {name} holds no image itself, but class folders; did you mean {source / name} "
                f"({count} class folders)?"
            )
    if empty and (below := class_folders(source / empty[0])) and image_names(source / empty[0] / below[0]):
        raise ImageSetError(
            f"{source / empty[0]}: the class folder holds no image itself; images are in {below[0]} below it. Expected "
            "the images of a class directly in its folder: move them up"
        )
    classes, samples = scan(source)
    return ImageSet(CLASS_FOLDERS, classes, samples, [s.sample_id for s in samples], [None] * len(samples))


def _contents(folder: Path, folders: Sequence[str]) -> str:
    if folders:
        names = f"{', '.join(folders[:5])}{', ...' if folders[5:] else ''}"
        return f"no image in its {len(folders)} folder{'' if len(folders) == 1 else 's'} ({names})"
    images = len(image_names(folder))
    return (
        f"{images} image{'' if images == 1 else 's'} and no class folder"
        if images
        else "neither class folder nor image"
    )


def _near_image_set(source: Path, folders: Sequence[str]) -> str:
    """A hint to an image set one or two levels below `source`, to a manifest in it, or to the folder above."""
    try:
        below = [source / name for name in folders]
        below += [path / name for path in below for name in class_folders(path)]
        counted = [(path, _class_count(path)) for path in below]
        counted = [(path, count) for path, count in counted if count > 1]
    except OSError:  # a folder without read permission
        counted = []
    if counted:
        path, count = max(counted, key=lambda entry: entry[1])
        return f"; did you mean {path} ({count} class folders)?"
    manifests = sorted(source.glob("*.csv"))
    if manifests:
        return f"; did you mean the manifest {manifests[0]}?"
    if image_names(source) and (count := _class_count(source.parent)) > 1:
        return f"; did you mean {source.parent} ({count} class folders)?"
    return "."


def _class_count(folder: Path) -> int:
    return sum(bool(image_names(folder / name)) for name in class_folders(folder))


# folders train, val and test -----------------------------------------------------------------------------------------


def _split_folders(source: Path) -> dict[str, Path] | None:
    """{split: its folder}; None if `source` has no folder `train` of class folders.

    A folder `train` with images directly in it is a class of that name.
    """
    folders: dict[str, Path] = {}
    for name in class_folders(source):
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            continue
        if split in folders:
            raise ImageSetError(
                f"{source}: both {folders[split].name} and {name} stand for {split}; expected one of them"
            )
        folders[split] = source / name
    train = folders.get("train")
    if train is None or image_names(train) or not class_folders(train):
        return None
    return folders


def _of_split_folders(source: Path, folders: dict[str, Path]) -> ImageSet:
    listed = {}
    for split, folder in folders.items():
        if not class_folders(folder):
            raise ImageSetError(
                f"{folder}: {len(image_names(folder))} image(s) and no class folder; expected the class folders of "
                f"{folders['train'].name}. Sort its images into class folders, or move {folder.name} away to have "
                f"{split} made from train"
            )
        listed[split] = scan(folder)
    classes = listed["train"][0]
    for split, (names, _) in listed.items():
        for name in sorted({*names} ^ {*classes}):
            holder, lacking = ("train", split) if name in classes else (split, "train")
            near = get_close_matches(name, listed[lacking][0], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ImageSetError(
                f"{folders[holder] / name}: class {name!r} is in {folders[holder].name} and not in "
                f"{folders[lacking].name}{hint}; expected the same classes in all. Rename or add a folder, or move "
                f"{folders[split].name} away to have {split} made from train"
            )
    if len(classes) < 2:
        raise ImageSetError(f"{folders['train']}: found one class only ({classes[0]!r}); expected at least two")
    samples = [sample for _, part in listed.values() for sample in part]
    names = [f"{folders[split].name}/{s.sample_id}" for split, (_, part) in listed.items() for s in part]
    splits: list[str | None] = [split for split, (_, part) in listed.items() for _ in part]
    others = [name for name in class_folders(source) if source / name not in folders.values()]
    notes = [f"{source}: left out, since they are no split: {', '.join(others)}"] if others else []
    return ImageSet(SPLIT_FOLDERS, classes, samples, names, splits, notes=tuple(notes))


# a manifest ----------------------------------------------------------------------------------------------------------


def _of_manifest(source: Path, fewest_classes: int) -> ImageSet:
    if source.suffix.lower() != ".csv":
        advice = " Unpack it first." if source.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") else ""
        raise ImageSetError(f"{source}: a file that is no CSV manifest.{advice} {EXPECTED}")
    manifest = read_manifest_file(source, fewest_classes=fewest_classes)
    label_of = {name: label for label, name in enumerate(manifest.classes)}
    ids = _sample_ids(manifest.rows)
    order = sorted(range(len(ids)), key=lambda row: (label_of[manifest.rows[row].label], ids[row]))
    rows = [manifest.rows[index] for index in order]
    samples = [
        Sample(source.parent / row.file_name, ids[index], label_of[row.label], row.group)
        for index, row in zip(order, rows, strict=True)
    ]
    notes = []
    if manifest.ignored:
        notes.append(
            f"{source}: ignored columns: {', '.join(manifest.ignored)}. Given splits belong in a column split, names "
            "of groups of images that belong together in a column group"
        )
    return ImageSet(
        MANIFEST,
        list(manifest.classes),
        samples,
        names=[row.file_name for row in rows],
        splits=[row.split for row in rows],
        lines=[row.line for row in rows],
        is_ordered=list(manifest.classes) != sorted(manifest.classes),
        notes=tuple(notes),
    )


def _sample_ids(rows: Sequence[ManifestRow]) -> list[str]:
    """`<label>/<file name>` of each row; the folder is included if the name occurs in several folders."""
    plain = [f"{row.label}/{PurePosixPath(row.file_name).name}" for row in rows]
    count = Counter(name.casefold() for name in plain)
    ids = [
        name if count[name.casefold()] == 1 else f"{row.label}/{_joined(row.file_name)}"
        for name, row in zip(plain, rows, strict=True)
    ]
    count = Counter(name.casefold() for name in ids)
    return [
        name if count[name.casefold()] == 1 else f"{row.label}/{_digested(row.file_name)}"
        for name, row in zip(ids, rows, strict=True)
    ]


def _joined(file_name: str) -> str:
    path = PurePosixPath(file_name)
    joined = "__".join([path.stem, *path.parent.parts]) + path.suffix
    return joined if len(joined.encode()) <= LONGEST_NAME else _digested(file_name)


def _digested(file_name: str) -> str:
    path = PurePosixPath(file_name)
    digest = hashlib.sha256(file_name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{path.stem[:40]}__{digest}{path.suffix}"
