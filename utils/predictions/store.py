"""The prediction store: logits, embeddings, labels and sample ids per member and split, on disk, keyed by digest.

Arrays are read as memory maps. `extraction` computes missing ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import (
    FileDigests,
    digest_of,
    read_arrays,
    write_array,
    write_arrays,
    write_json,
)
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.links import remove_file, require_unlinked
from utils.core.parsed_files import array_once, record_once
from utils.core.workspace import SPLITS, Workspace
from utils.predictions import image_splits, out_of_fold, training_data
from utils.predictions.catalog import IMPORTED, Catalog, Member, Problem, kfold_remedy
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import MemberRows, Samples, collect_samples

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # incremented whenever the arrays for the same weights and images change
IN_SAMPLE_TRAIN = "train_in_sample"
ARRAYS = ("logits", "labels", "sample_ids", "honest")
IMPORT = "python ensemble_orchestrator.py import-predictions --from DIR"
OUTDATED = "imported_outdated"
AGAIN = "Remove it, then run the command again"


class Store:
    """The prediction store of one workspace; opened once per command."""

    def __init__(
        self, config: Config, workspace: Workspace, catalog: Catalog, digests: FileDigests | None = None
    ) -> None:
        self.config = config
        self.workspace = workspace
        self.catalog = catalog
        self.digests = digests or FileDigests(workspace.digests)
        self._images: dict[str, ImageSplit] = {}
        self.warned_sizes: set[int] = set()
        """Image sizes that have been logged in a warning."""
        self._samples: dict[str, Samples] = {}
        self._oof_at_hand: dict[str, dict[str, np.ndarray]] = {}

    def with_catalog(self, catalog: Catalog) -> Store:
        """The store for another catalog of the same workspace; shares digests and image lists that are still valid."""
        store = copy(self)
        store.catalog = catalog
        if catalog.splits != self.catalog.splits:
            store._images = {}
        if catalog.imported() != self.catalog.imported():
            store._samples, store._oof_at_hand = {}, {}
        return store

    def with_config(self, config: Config) -> Store:
        """The store with another configuration of the same workspace."""
        store = copy(self)
        store.config = config
        return store

    def with_images(self, images: ImageSplit) -> Store:
        """The store with an additional split of images outside the workspace, which the catalog file does not list."""
        store = copy(self)
        facts = {"n": len(images.paths), "digest": images.digest}
        store.catalog = replace(self.catalog, splits={**self.catalog.splits, images.split: facts})
        store._images = {**self._images, images.split: images}
        return store

    def images(self, split: str) -> ImageSplit:
        """The images of a split. Raises UserError if they have changed since discovery, or there are none."""
        if not self.catalog.has_images:
            raise UserError(f"{self.workspace.split_dir}: no images, and this needs some; all members are imported")
        if split not in self._images:
            images = image_splits.list_images(self.workspace.split_dir, split, self.digests)
            recorded = self.catalog.splits.get(split, {}).get("digest")
            if images.digest != recorded:
                raise UserError(
                    f"{self.workspace.split_dir / split}: the images have changed since discovery. Run "
                    "`python ensemble_orchestrator.py discover` again"
                )
            self._images[split] = images
        return self._images[split]

    def samples(self, split: str) -> Samples:
        """The samples of a split: its images or, without images, the rows of imported members."""
        if self.catalog.has_images:
            images = self.images(split)
            return Samples(split, images.sample_ids, images.labels, images.contents)
        if split not in self._samples:
            self._samples[split] = collect_samples(split, self.catalog.classes, self.imported_rows(split))
        return self._samples[split]

    def splits(self) -> dict[str, dict[str, Any]]:
        """The splits of a catalog without images, {split: {n, digest, ...}}, from the rows of its imported members."""
        return {split: split_facts(self.catalog.classes, self.samples(split)) for split in SPLITS}

    def imported_rows(self, split: str) -> dict[str, list[MemberRows]]:
        """{imported member: its rows of a split}; for train, both in-sample and out-of-fold rows."""
        parts: dict[str, list[MemberRows]] = {}
        for name, member in self.catalog.imported().items():
            arrays = self._oof_arrays(member) if split == "train" else None
            parts[name] = [self.rows(member, split)] if self.is_available(member, split) else []
            if arrays is not None:
                parts[name].append(_oof_rows(arrays, self.catalog.classes))
                self._oof_at_hand[name] = arrays  # cached, since the out-of-sample rows are usually read next
        return parts

    def is_available(self, member: Member, split: str) -> bool:
        """Whether a member has predictions for a split or a network to compute them."""
        return member.source != IMPORTED or self._record(member, split) is not None

    def is_stored(self, member: Member, split: str) -> bool:
        """Whether a member's arrays of a split are complete and match the catalog."""
        folder = self.workspace.predictions(member.name, split)
        record = self._record(member, split)
        return (
            record is not None
            and record["key"] == self.key(member, split)
            and all((folder / f"{name}.npy").is_file() for name in ARRAYS)
            and (
                record.get("width") == 0
                or self.workspace.embeddings(member.name, embeddings_name(member, split)).is_file()
            )
        )

    def rows(self, member: Member, split: str, *, embeddings: bool = False) -> MemberRows:
        """One member's stored rows of a split, memory-mapped; for networks `extraction.ensure` must have run.

        Raises UserError for an imported member whose files lack the split or have it for other images, and for a member
        without embeddings if `embeddings` are requested.
        """
        if member.source == IMPORTED and not self.is_stored(member, split):
            is_outdated = self.is_available(member, split)
            reason = "those imported are of other images or classes" if is_outdated else "none are imported"
            alternative = ", or use --split val" if split == "test" else ""
            remedy = f"Write DIR/{member.name}/{split}.npz and import it{alternative}: {IMPORT}"
            raise UserError(f"member {member.name}: no predictions for {split}; {reason}. {remedy}")
        folder = self.workspace.predictions(member.name, split)
        arrays = {name: array_once(folder / f"{name}.npy", remedy=AGAIN) for name in ARRAYS}
        out_of_sample = arrays.pop("honest")
        if member.source != IMPORTED:
            out_of_sample = self._is_unseen(arrays["sample_ids"], training_data.fitted_rows(self, member, split))
        rows = MemberRows(split=split, classes=self.catalog.classes, out_of_sample=out_of_sample, **arrays)
        return replace(rows, embeddings=self._embeddings(member, rows)) if embeddings else rows

    def _embeddings(self, member: Member, rows: MemberRows) -> np.ndarray:
        """The stored embeddings (N, D) of a member's rows. Raises UserError if they are missing or do not match."""
        split = rows.split
        name = embeddings_name(member, split)
        path = self.workspace.embeddings(member.name, name)
        if not path.is_file():
            raise UserError(
                f"member {member.name}: no embeddings for {split}. "
                + (
                    f"Write them as `embeddings` (N, D) into DIR/{member.name}/{split}.npz and import it: {IMPORT}"
                    if member.source == IMPORTED
                    else "Its network has no last linear layer; leave it out with backbones.exclude"
                )
            )
        record = record_once(self.workspace.embeddings_record(member.name, name), remedy=AGAIN) or {}
        embeddings: np.ndarray = array_once(path, remedy=AGAIN)
        reason = "of another checkpoint, other classes or other images than the catalog holds"
        if record.get("key") == self.key(member, split):
            if embeddings.ndim == 2 and len(embeddings) == len(rows.sample_ids):
                return embeddings
            reason = f"of shape {embeddings.shape} for {len(rows.sample_ids)} rows"
        folder = self.workspace.predictions(member.name, split)
        raise UserError(f"{path}: embeddings {reason}. Remove the folder {folder}, then run the command again")

    def lacks_embeddings(self, member: Member) -> bool:
        """Whether a member has no embeddings; False if its val rows are not stored yet."""
        record = self._record(member, "val")
        return record is not None and record.get("key") == self.key(member, "val") and record.get("width") == 0

    def key(self, member: Member, split: str) -> str:
        """Digest of everything that the stored arrays of a member and split depend on."""
        return digest_of([VERSION, member.digest, self._images_digest(split), list(self.catalog.classes)])

    def oof(self, member: Member, *, embeddings: bool = False) -> MemberRows | None:
        """A member's out-of-fold rows of the train split, from the validated cache; None if it has none.

        With `embeddings`, those of an imported member's `oof.npz`, if any, are included. Raises UserError for a file
        that does not match the train split.
        """
        arrays = self._oof_arrays(member)
        if arrays is None:
            return None
        rows = _oof_rows(arrays, self.catalog.classes)
        return replace(rows, embeddings=arrays.get("embeddings")) if embeddings else rows

    def has_oof_embeddings(self, member: Member) -> bool:
        """Whether an imported member's `oof.npz` had embeddings."""
        arrays = self._oof_arrays(member)
        return arrays is not None and "embeddings" in arrays

    def _oof_arrays(self, member: Member) -> dict[str, np.ndarray] | None:
        if member.oof is None:
            return None
        if member.name in self._oof_at_hand:
            return self._oof_at_hand.pop(member.name)
        cache = self.workspace.oof(member.name)
        arrays = self._cached_oof(member)
        if arrays is not None:
            return arrays
        if member.source == IMPORTED:
            reason = "not the out-of-fold predictions that were imported for these images"
            raise UserError(f"{cache}: {reason}. Import them again: {IMPORT}")
        path = self.workspace.base / member.oof["path"]
        if self.digests.of(path) != member.oof["sha256"]:
            raise UserError(f"{path}: changed since discovery. Run `python ensemble_orchestrator.py discover` again")
        remedy = kfold_remedy(self.workspace, member)
        oof = out_of_fold.read(path, member.name, self.images("train"), self.catalog.classes, remedy=remedy)
        arrays = oof.arrays()
        write_arrays(cache, arrays | {"key": np.array(self._oof_key(member.oof))})
        return arrays

    def out_of_sample_parts(self, members: Sequence[Member]) -> dict[str, list[MemberRows]]:
        """{member: its out-of-sample rows}: out-of-fold rows of train and rows of val that it was not trained on.

        Without out-of-fold rows, train rows that the full network was not trained on replace them. An imported member
        with out-of-fold rows may lack rows of val. A member that was trained on all rows has none.
        """
        return {member.name: self._out_of_sample_rows(member) for member in members}

    def _out_of_sample_rows(self, member: Member) -> list[MemberRows]:
        parts = []
        oof = self.oof(member)
        if oof is not None:
            pretraining_ids = training_data.pretraining_rows(self, member)
            parts.append(replace(oof, out_of_sample=self._is_unseen(oof.sample_ids, pretraining_ids)))
        elif training_data.predicts_unseen_train_rows(self, member):
            parts.append(self.rows(member, "train"))
        if oof is None or self.is_available(member, "val"):
            parts.append(self.rows(member, "val"))
        unseen = (part if part.out_of_sample.all() else part.take(part.out_of_sample) for part in parts)
        return [part for part in unseen if len(part.sample_ids)]

    @staticmethod
    def _is_unseen(sample_ids: np.ndarray, trained_ids: frozenset[str]) -> np.ndarray:
        """bool (N,): whether each sample is not in `trained_ids`."""
        if not trained_ids:
            return np.ones(len(sample_ids), dtype=bool)
        return np.array([sample_id not in trained_ids for sample_id in sample_ids.tolist()], dtype=bool)

    def outdated_parts(self, member: Member) -> list[str]:
        """Splits for which an imported member's rows do not match the images, classes or contents in the catalog."""
        outdated = [split for split in SPLITS if self.is_available(member, split) and not self.is_stored(member, split)]
        return outdated + (["out-of-fold"] if member.oof is not None and self._cached_oof(member) is None else [])

    def write_imported(self, member: Member, rows: MemberRows, embeddings: np.ndarray | None) -> None:
        """Store rows of an imported member, sorted by id, and their embeddings (N, D); the record is written last."""
        folder = self.workspace.predictions(member.name, rows.split)
        remove_file(folder / "record.json")
        write_array(folder / "logits.npy", rows.logits)
        if embeddings is not None:
            write_array(self.workspace.embeddings(member.name, rows.split), embeddings)
        samples = Samples(rows.split, tuple(rows.sample_ids.tolist()), rows.labels, None)
        self.complete_rows(member, samples, {"width": 0 if embeddings is None else embeddings.shape[1]})

    def write_imported_oof(self, name: str, oof: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Store the arrays of an imported member's out-of-fold rows; `oof` is their entry in the catalog."""
        write_arrays(self.workspace.oof(name), {**arrays, "key": np.array(self._oof_key(oof))})

    def remove_member(self, name: str) -> None:
        """Remove everything stored for a member, records first. Raises UserError for files behind a symbolic link."""
        for path in self._files(name):
            remove_file(path)

    def require_own_files(self, name: str) -> None:
        """Raise UserError if a folder of the member is behind a symbolic link, since its files must not be changed."""
        for path in self._files(name):
            require_unlinked(path)

    def _files(self, name: str) -> list[Path]:
        """Paths of all files that may be stored for a member, records before the files that they describe."""
        files = []
        splits = (*SPLITS, *self.workspace.external_splits(name))
        for split in splits:
            folder = self.workspace.predictions(name, split)
            files += [folder / "record.json", *(folder / f"{array}.npy" for array in ARRAYS)]
        for stem in (*splits, IN_SAMPLE_TRAIN):
            files += [self.workspace.embeddings_record(name, stem), self.workspace.embeddings(name, stem)]
        return [*files, self.workspace.oof(name)]

    def _images_digest(self, split: str) -> str | None:
        return self.catalog.splits[split]["digest"] if self.catalog.has_images else None

    def _cached_oof(self, member: Member) -> dict[str, np.ndarray] | None:
        cache = self.workspace.oof(member.name)
        if member.oof is None or not cache.is_file():
            return None
        arrays = read_arrays(cache, remedy=AGAIN)
        return arrays if str(arrays.get("key")) == self._oof_key(member.oof) else None

    def _oof_key(self, oof: Mapping[str, Any]) -> str:
        return digest_of([VERSION, oof["sha256"], self._images_digest("train")])

    def _record(self, member: Member, split: str) -> dict[str, Any] | None:
        return record_once(self.workspace.predictions(member.name, split) / "record.json", remedy=AGAIN)

    def complete_rows(self, member: Member, samples: Samples, facts: dict[str, Any]) -> None:
        """Write the files beside a member's logits of one split: labels, sample ids and, last, the record.

        `facts` are further entries of the record, among them `width`, the width D of the embeddings, 0 without any.
        """
        split = samples.split
        folder = self.workspace.predictions(member.name, split)
        write_array(folder / "labels.npy", samples.labels)
        write_array(folder / "sample_ids.npy", np.array(samples.sample_ids))
        write_array(folder / "honest.npy", np.full(len(samples.sample_ids), split != "train"))
        record = {
            "key": self.key(member, split),
            "member": member.name,
            "split": split,
            "n": len(samples.sample_ids),
            "classes": list(self.catalog.classes),
            "member_digest": member.digest,
            "split_digest": self.catalog.splits[split]["digest"],
            "img_size": member.img_size,
            **facts,
        }
        kind = "in_sample" if split == "train" else "held_out"
        embeddings_record = self.workspace.embeddings_record(member.name, embeddings_name(member, split))
        write_json(embeddings_record, record | {"rows": kind, "sample_ids": list(samples.sample_ids)})
        write_json(folder / "record.json", record)


def embeddings_name(member: Member, split: str) -> str:
    """File name of the embeddings of a split by a member's full network.

    For a network with fold networks, `train` is the name of the out-of-fold embeddings, so its in-sample embeddings
    have another name; an imported member has one network.
    """
    return IN_SAMPLE_TRAIN if split == "train" and member.source != IMPORTED else split


def _oof_rows(arrays: Mapping[str, np.ndarray], classes: tuple[str, ...]) -> MemberRows:
    return MemberRows(
        "train",
        classes,
        arrays["sample_ids"],
        arrays["labels"],
        arrays["logits"],
        np.ones(len(arrays["labels"]), bool),
        fold=arrays["fold"],
    )


def split_facts(classes: tuple[str, ...], samples: Samples) -> dict[str, Any]:
    """The catalog's entry of a split whose samples come only from imported members."""
    digest = digest_of([list(classes), list(samples.sample_ids), samples.labels.tolist()])
    return {"n": len(samples.sample_ids), "digest": digest, "images": False}


def with_imported(config: Config, workspace: Workspace, scanned: Catalog, earlier: Catalog) -> Catalog:
    """The `scanned` catalog with the imported members of an `earlier` one and their problems.

    A member whose rows belong to other images or classes than those of the scan is kept, but cannot be used. A member
    with the name of a trained one is omitted. Both are reported as problems.
    """
    imported = earlier.imported()
    joined = replace(scanned, members={**imported, **scanned.members}, problems=())
    store = Store(config, workspace, joined)
    members, problems = dict(joined.members), list(scanned.problems)
    for name, member in imported.items():
        if name in scanned.members:
            message = "a network has the name of these imported predictions, which are left out"
            problems.append(Problem("imported_name", "error", name, message, "import them under another name"))
            continue
        problems += [problem for problem in earlier.problems if problem.member == name and problem.code != OUTDATED]
        outdated = store.outdated_parts(member)
        if outdated:
            message = f"imported for other images or classes: {', '.join(outdated)}"
            problems.append(Problem(OUTDATED, "error", name, message, f"import it again: {IMPORT}"))
        members[name] = replace(member, usable=not outdated)
    return replace(joined, members=members, problems=tuple(problems))
