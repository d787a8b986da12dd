"""The prediction store: logits, embeddings, labels and sample ids per member and split, on disk, keyed by digest.

What is on disk is memory-mapped; what is missing is streamed, one member at a time, all wanted splits in one pass.
Rows are matched by (split, sample id) and columns by class name, never by position.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils import base_back, catalog, estimates, inspection, out_of_fold, streaming
from utils.artifacts import (
    FileDigests,
    digest_of,
    open_array,
    read_arrays,
    read_json,
    replacing,
    write_array,
    write_arrays,
    write_json,
)
from utils.catalog import Catalog, Member
from utils.checkpoints import reading_ahead
from utils.config import Config
from utils.errors import UserError
from utils.streaming import ImageSplit
from utils.workspace import Workspace

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # raised whenever the same weights and images would give other arrays
CROSSFIT_FOLDS = 5
AGAIN = "Remove it, then run the command again"


@dataclass(frozen=True)
class MemberRows:
    """One member's outputs on rows of one split, in any order."""

    split: str
    classes: tuple[str, ...]
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`"""
    logits: np.ndarray
    """float32 (N, C)"""
    honest: np.ndarray
    """bool (N,): the network that answered has not seen the row"""


@dataclass(frozen=True)
class Rows:
    """The outputs of M members on the N rows that all of them have, members and rows sorted, classes in one order."""

    members: tuple[str, ...]
    classes: tuple[str, ...]
    split: np.ndarray
    """unicode (N,)"""
    sample_ids: np.ndarray
    """unicode (N,)"""
    labels: np.ndarray
    """int64 (N,)"""
    logits: np.ndarray
    """float32 (M, N, C)"""
    honest: np.ndarray
    """bool (N,): honest for every member"""
    inference: str = "full"
    """What answered on val and test: the members' full networks, or the mean of their fold networks (`folds`)"""

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows."""
        return replace(
            self,
            split=self.split[rows],
            sample_ids=self.sample_ids[rows],
            labels=self.labels[rows],
            logits=self.logits[:, rows],
            honest=self.honest[rows],
        )


class Store:
    """The prediction store of one workspace; opened once per command."""

    def __init__(self, config: Config, workspace: Workspace, found: Catalog) -> None:
        self.config = config
        self.workspace = workspace
        self.catalog = found
        self.digests = FileDigests(workspace.digests)
        self._images: dict[str, ImageSplit] = {}

    def images(self, split: str) -> ImageSplit:
        """The images of a split as they lie on disk now. Raises UserError when discovery saw others."""
        if split not in self._images:
            images = streaming.list_images(self.workspace.split_dir, split, self.digests)
            recorded = self.catalog.splits.get(split, {}).get("digest")
            if images.digest != recorded:
                raise UserError(
                    f"{self.workspace.split_dir / split}: the images have changed since discovery. Run "
                    "`python ensemble_orchestrator.py discover` again"
                )
            self._images[split] = images
        return self._images[split]

    def ensure(self, members: Sequence[Member], splits: Sequence[str]) -> None:
        """Stream what is missing of the given members and splits, one member after another."""
        missing = [(m, gaps) for m in members if (gaps := [s for s in splits if not self._is_stored(m, s)])]
        self.digests.save()
        if not missing:
            return
        device = streaming.resolve_device(self.config.device)
        threads = streaming.decoding_threads(self.config.dataset.num_workers)
        sizes = {member.img_size for member, _ in missing}
        if sizes != {self.config.dataset.img_size}:
            logger.warning(
                "dataset.img_size is %d; the checkpoints were trained at %s px, which is what is used",
                self.config.dataset.img_size,
                ", ".join(map(str, sorted(sizes))),
            )
        wanted = sorted({split for _, gaps in missing for split in gaps})
        cache = self.workspace.image_cache
        streaming.decode([self.images(split) for split in wanted], sorted(sizes), image_cache=cache, threads=threads)
        files = [member.network(self.workspace).checkpoint for member, _ in missing]
        expected = estimates.extraction(
            [path.stat().st_size for path in files if path.is_file()],
            sum(self.catalog.splits[split]["n"] for split in wanted),
            batch_size=self.config.dataset.batch_size,
            img_size=max(sizes),
            on_cuda=device != "cpu",
        )
        logger.info("streaming %d member(s) over %s: %s", len(missing), ", ".join(wanted), expected)
        start = time.monotonic()
        for number, (member, gaps) in enumerate(missing, start=1):
            catalog.check_current(self.workspace, member, self.digests)
            with reading_ahead(files[number] if number < len(files) else None):
                self._stream(member, gaps, device, threads)
            left = (time.monotonic() - start) / number * (len(missing) - number)
            logger.info("[%d/%d] streamed %s over %s; about %.0f s left", number, len(missing), member.name, gaps, left)
        outputs = {member.name: self.rows(member, "val") for member, gaps in missing if "val" in gaps}
        measured = {name: (rows.logits, rows.labels) for name, rows in outputs.items()}
        self.catalog = inspection.take_measurements(self.workspace, self.catalog, self.digests, measured)
        self.digests.save()

    def rows(self, member: Member, split: str) -> MemberRows:
        """One member's stored rows of a split, memory-mapped; they must have been ensured."""
        folder = self.workspace.predictions(member.name, split)
        arrays = {
            name: open_array(folder / f"{name}.npy", remedy=AGAIN)
            for name in ("sample_ids", "labels", "logits", "honest")
        }
        return MemberRows(split=split, classes=self.catalog.classes, **arrays)

    def key(self, member: Member, split: str) -> str:
        """What the stored arrays of a member and split depend on."""
        return digest_of([VERSION, member.digest, self.catalog.splits[split]["digest"], list(self.catalog.classes)])

    def oof(self, member: Member) -> MemberRows | None:
        """A member's out-of-fold rows of the train split, from the validated cache; None when it has none.

        Raises UserError for a file that does not fit the train split.
        """
        if member.oof is None:
            return None
        cache = self.workspace.oof(member.name)
        key = digest_of([VERSION, member.oof["sha256"], self.catalog.splits["train"]["digest"]])
        if cache.is_file():
            arrays = read_arrays(cache, remedy=AGAIN)
            if str(arrays.get("key")) == key:
                return _oof_rows(arrays, self.catalog.classes)
        path = self.workspace.base / member.oof["path"]
        if self.digests.of(path) != member.oof["sha256"]:
            raise UserError(f"{path}: changed since discovery. Run `python ensemble_orchestrator.py discover` again")
        arrays = out_of_fold.read(path, member.name, self.images("train"), self.catalog.classes).arrays()
        write_arrays(cache, arrays | {"key": np.array(key)})
        return _oof_rows(arrays, self.catalog.classes)

    def honest_parts(self, members: Sequence[Member]) -> dict[str, list[MemberRows]]:
        """{member: its honest rows}: out-of-fold on train where it has them, held out on val."""
        parts: dict[str, list[MemberRows]] = {}
        for member in members:
            oof = self.oof(member)
            parts[member.name] = [*([oof] if oof is not None else []), self.rows(member, "val")]
        return parts

    def _is_stored(self, member: Member, split: str) -> bool:
        folder = self.workspace.predictions(member.name, split)
        record = read_json(folder / "record.json", remedy=AGAIN)
        names = ("logits", "labels", "sample_ids", "honest")
        whole = all((folder / f"{name}.npy").is_file() for name in names)
        return (
            record is not None
            and record["key"] == self.key(member, split)
            and whole
            and (record.get("width") == 0 or self.workspace.embeddings(member.name, split).is_file())
        )

    def _stream(self, member: Member, splits: Sequence[str], device: str, threads: int) -> None:
        """Run one member; its arrays grow on disk under temporary names and appear when a split is complete."""
        images = [self.images(split) for split in splits]
        batch_size = self.config.dataset.batch_size
        batches = streaming.stream(
            member.network(self.workspace),
            images,
            batch_size=batch_size,
            device=device,
            image_cache=self.workspace.image_cache,
            decoding_threads=threads,
            val=self.images("val"),
        )
        order = [member.classes.index(name) for name in self.catalog.classes]
        current = next(batches)
        for split in images:
            start = time.monotonic()
            (self.workspace.predictions(member.name, split.split) / "record.json").unlink(missing_ok=True)
            with ExitStack() as stack:
                logits_path = self.workspace.predictions(member.name, split.split) / "logits.npy"
                logits = _growing(stack, logits_path, (len(split.paths), len(order)))
                width = current.embeddings.shape[1]
                place = self.workspace.embeddings(member.name, split.split)
                place.unlink(missing_ok=True)
                embeddings = _growing(stack, place, (len(split.paths), width)) if width else None
                while current is not None and current.split == split.split:
                    stop = current.start + len(current.logits)
                    logits[current.start : stop] = current.logits[:, order]
                    if embeddings is not None:
                        embeddings[current.start : stop] = current.embeddings
                    batch_size = current.batch_size
                    current = next(batches, None)  # type: ignore[assignment]
                logits.flush()
                if embeddings is not None:
                    embeddings.flush()
            facts = {"device": device, "batch_size": batch_size, "seconds": round(time.monotonic() - start, 3)}
            self._finish(member, split, facts | {"width": width})

    def _finish(self, member: Member, split: ImageSplit, facts: dict[str, Any]) -> None:
        """The rest of what belongs to one member and split, the record last; width 0: it has no embeddings."""
        folder = self.workspace.predictions(member.name, split.split)
        write_array(folder / "labels.npy", split.labels)
        write_array(folder / "sample_ids.npy", np.array(split.sample_ids))
        write_array(folder / "honest.npy", np.full(len(split.paths), split.split != "train"))
        record = {
            "key": self.key(member, split.split),
            "member": member.name,
            "split": split.split,
            "n": len(split.paths),
            "classes": list(self.catalog.classes),
            "member_digest": member.digest,
            "split_digest": split.digest,
            "img_size": member.img_size,
            **facts,
        }
        kind = "in_sample" if split.split == "train" else "held_out"
        place = self.workspace.embeddings_record(member.name, split.split)
        write_json(place, record | {"rows": kind, "sample_ids": list(split.sample_ids)})
        write_json(folder / "record.json", record)


def _growing(stack: ExitStack, path: Path, shape: tuple[int, int]) -> np.memmap:
    """A float32 array that is filled on disk and takes its name when the stack ends well."""
    temporary = stack.enter_context(replacing(path))
    return np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)


def _oof_rows(arrays: Mapping[str, np.ndarray], classes: tuple[str, ...]) -> MemberRows:
    return MemberRows(
        "train", classes, arrays["sample_ids"], arrays["labels"], arrays["logits"], np.ones(len(arrays["labels"]), bool)
    )


def align(parts: Mapping[str, Sequence[MemberRows]], classes: tuple[str, ...]) -> Rows:
    """Bring members together: {member: its rows of one or more splits} -> the rows that all members have.

    Members are ordered by name, rows by (split, sample id), columns by `classes`. Raises UserError for duplicate ids,
    other class sets, labels that disagree, logits that are not finite, or nothing in common; tells how many rows are
    left out.
    """
    members = tuple(sorted(parts))
    keyed = {member: _keyed(member, parts[member], classes) for member in members}
    common = set.intersection(*(set(rows) for rows, _, _ in keyed.values()))
    if not common:
        raise UserError(f"{', '.join(members)}: no row in common; were they run on the same split?")
    order = sorted(common)
    for member, (rows, _, _) in keyed.items():
        if len(rows) > len(order):
            logger.warning("%s: %d of %d rows are not shared by all members", member, len(rows) - len(order), len(rows))
    logits = np.empty((len(members), len(order), len(classes)), dtype=np.float32)
    labels = np.empty((len(members), len(order)), dtype=np.int64)
    honest = np.ones(len(order), dtype=bool)
    for index, member in enumerate(members):
        rows, own_logits, facts = keyed[member]
        places = [rows[key] for key in order]
        logits[index] = own_logits[places]
        labels[index], marks = facts[0][places], facts[1][places]
        honest &= marks
        bad = np.flatnonzero(~np.isfinite(logits[index]).all(axis=1))
        if bad.size:
            raise UserError(f"member {member}: {bad.size} row(s) with NaN or infinity, first {order[bad[0]][1]}")
        differing = np.flatnonzero(labels[index] != labels[0])
        if differing.size:
            raise UserError(
                f"members {members[0]} and {member}: {differing.size} label(s) disagree, first {order[differing[0]][1]}"
            )
    return Rows(
        members=members,
        classes=classes,
        split=np.array([split for split, _ in order]),
        sample_ids=np.array([sample_id for _, sample_id in order]),
        labels=labels[0],
        logits=logits,
        honest=honest,
    )


def _keyed(
    member: str, parts: Sequence[MemberRows], classes: tuple[str, ...]
) -> tuple[dict[tuple[str, str], int], np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """{(split, id): row}, logits and (labels, honest) of one member over its parts, columns in `classes` order."""
    logits, labels, honest = [], [], []
    keys: list[tuple[str, str]] = []
    for part in parts:
        if sorted(part.classes) != sorted(classes):
            raise UserError(f"member {member}: classes {', '.join(part.classes)}; expected {', '.join(classes)}")
        logits.append(np.asarray(part.logits)[:, [part.classes.index(name) for name in classes]])
        labels.append(np.array([classes.index(name) for name in part.classes])[np.asarray(part.labels)])
        honest.append(np.asarray(part.honest))
        keys += [(part.split, sample_id) for sample_id in part.sample_ids.tolist()]
    rows = {key: row for row, key in enumerate(keys)}
    if len(rows) < len(keys):
        seen: set[tuple[str, str]] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"member {member}: the sample id {'/'.join(twice)} occurs twice")
    return rows, np.concatenate(logits), (np.concatenate(labels), np.concatenate(honest))


def crossfit_folds(store: Store) -> dict[tuple[str, str], int]:
    """{(split, sample id): fold} over the train and val rows: the workspace's one assignment, made once and kept.

    Stratified and seeded; rows of one group (`dataset.group_regex`) or of equal content share a fold. Five folds, fewer
    where a class has fewer groups. Made anew when images, seed or group rule change.
    """
    rule, seed = store.config.dataset.group_regex, store.config.seed
    digests = [store.catalog.splits[split]["digest"] for split in ("train", "val")]
    key = digest_of([VERSION, digests, rule, seed])
    path = store.workspace.crossfit_folds
    if path.is_file():
        arrays = read_arrays(path, remedy=AGAIN)
        if str(arrays["key"]) == key:
            return _fold_table(arrays)
    dealing = base_back.bundled("samples")
    images = [store.images("train"), store.images("val")]
    labels = np.concatenate([split.labels for split in images])
    ids = [sample_id for split in images for sample_id in split.sample_ids]
    contents = [content for split in images for content in split.contents]
    groups = dealing.group_indices(ids, contents, rule)
    fewest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
    folds = min(CROSSFIT_FOLDS, fewest)
    if folds < 2:
        raise UserError(
            f"{store.workspace.split_dir}: a class has one group of images in train and val; cross-fitting needs two. "
            "Add images, or widen dataset.group_regex"
        )
    arrays = {
        "key": np.array(key),
        "split": np.concatenate([np.full(len(split.sample_ids), split.split) for split in images]),
        "sample_ids": np.array(ids),
        "fold": dealing.stratified_bins(labels, groups, [1 / folds] * folds, seed),
    }
    write_arrays(path, arrays)
    return _fold_table(arrays)


def _fold_table(arrays: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    names = zip(arrays["split"].tolist(), arrays["sample_ids"].tolist(), strict=True)
    return dict(zip(names, arrays["fold"].tolist(), strict=True))
