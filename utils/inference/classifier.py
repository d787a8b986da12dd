"""An ensemble, or a single member, that answers for any image files: its networks streamed over one block at a time.

Decoded pixels of a block lie in a temporary folder that goes with it, so that memory and disk depend on the size of a
block and not on the number of images.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.building import ensembles
from utils.building.command_hints import build_command
from utils.building.ensembles import Ensemble
from utils.combiners.routing import SparseCombiner, run_sparse
from utils.core.errors import UserError, did_you_mean
from utils.networks.construction import NetworkSpec
from utils.numeric.diversity import mutual_information
from utils.numeric.metrics import softmax
from utils.predictions import catalog, fold_networks, image_splits, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN, Rows
from utils.predictions.store import Store
from utils.predictions.streaming import OutputBatch

SPLIT = "predict"  # what messages call images of no split
BLOCK_BYTES = 2**31  # of decoded pixels on disk
ARRAY_BYTES = 2**28  # of logits in memory
MIN_BLOCK, MAX_BLOCK = 64, 8192  # images of a block
ASPECT_RATIO = 4 / 3  # photographs are so much longer than high


@dataclass(frozen=True)
class BlockPredictions:
    """What is said of the images of one block."""

    readable: np.ndarray
    """int64 (R,): places of those that could be read"""
    probabilities: np.ndarray
    """float64 (R, C)"""
    disagreement: np.ndarray | None
    """float64 (R,): mutual information of the members that ran, in nats, NaN where fewer than two did; None for one"""
    problems: dict[int, str]
    """{place: why there is no answer}"""


class WorkspaceClassifier:
    """Answers by the members' networks in the workspace."""

    def __init__(self, store: Store, name: str) -> None:
        """Raises UserError for an unknown name, and for a member that is gone, changed or no network."""
        self.store, self.name = store, name
        saved = ensembles.names(store.workspace)
        self.ensemble: Ensemble | None = ensembles.load(store.workspace, name) if name in saved else None
        if self.ensemble is None and name not in store.catalog.members:
            known = [*saved, *store.catalog.members]
            raise UserError(
                f"--model-name {name}: neither an ensemble nor a member. Built so far: {', '.join(saved) or 'none'}; "
                f"members: {', '.join(store.catalog.members)}{did_you_mean(name, known)}"
            )
        self.inference = self.ensemble.inference if self.ensemble else fold_networks.FULL
        names = self.ensemble.members if self.ensemble else (name,)
        # Before the members, since it decides which of their networks are needed.
        self.reads_embeddings = bool(self.ensemble and self.ensemble.combiner.reads_embeddings)
        self.members = tuple(self._member(member) for member in names)
        self.classes = store.catalog.classes
        digest = self.ensemble.inputs_digest if self.ensemble else self.members[0].digest
        self.version = f"{name}@{digest[:12]}"
        """Name and digest: answers of two versions do not go into one file."""
        self.device = streaming.resolve_device(store.config.device)
        self.threads = image_splits.decoding_threads(store.config.dataset.num_workers)
        self.sizes = sorted({spec.img_size for member in self.members for spec in self._networks(member)})

    def _member(self, name: str) -> Member:
        """A member that can be run and is what the ensemble was built from."""
        member = self.store.catalog.members.get(name)
        again = f"build it again: {build_command(self.name)}"
        if member is None:
            raise UserError(
                f"{self.name}: its member {name} is not in the catalog. Put its checkpoint back and run discover, or "
                f"{again}"
            )
        if member.source == IMPORTED:
            raise UserError(
                f"{self.name}: its member {name} is known by imported predictions alone; there is no network to run. "
                "Name an ensemble of trained members"
            )
        if self.ensemble and name in fold_networks.missing_and_changed({name: member}, self.ensemble)[1]:
            raise UserError(f"{self.name}: was built from another checkpoint of {name} than the catalog holds; {again}")
        for stage in self._stages(member):
            catalog.check_current(self.store.workspace, member, self.store.digests, stage=stage)
        return member

    def _stages(self, member: Member) -> tuple[str | None, ...]:
        """Of the networks that are run: the member's own (None), its fold networks, or both where it takes both."""
        return fold_networks.answering(member, self.inference, embeddings=self.reads_embeddings)

    def _networks(self, member: Member) -> list[NetworkSpec]:
        return [member.network(self.store.workspace, stage=stage) for stage in self._stages(member)]

    @property
    def n_networks(self) -> int:
        """How many are run over every image."""
        return sum(len(self._stages(member)) for member in self.members)

    @property
    def block_size(self) -> int:
        """Images at a time, by the room that their pixels and logits take."""
        pixels = 3 * ASPECT_RATIO * sum((1.14 * size) ** 2 for size in self.sizes)
        logits = 4 * len(self.members) * len(self.classes)
        return int(min(MAX_BLOCK, max(MIN_BLOCK, min(BLOCK_BYTES / pixels, ARRAY_BYTES / logits))))

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Probabilities for image files; `step(images)` is called for every batch of every network."""
        contents, problems = _digests(paths)
        with tempfile.TemporaryDirectory(prefix="predict-") as folder:
            images = ImageSplit(
                split=SPLIT,
                classes=self.classes,
                sample_ids=tuple(map(str, paths)),
                labels=np.full(len(paths), UNKNOWN),
                paths=tuple(paths),
                contents=contents,
                digest="",
            )
            cache = Path(folder)
            there = images.take([place for place in range(len(paths)) if place not in problems])
            unread = image_splits.decode_readable(there, self.sizes, image_cache=cache, threads=self.threads)
            # A file is decoded once, whatever the number of its copies.
            reasons = {content: unread[path] for path, content in zip(paths, contents, strict=True) if path in unread}
            problems |= {place: reasons[content] for place, content in enumerate(contents) if content in reasons}
            kept = np.array([place for place in range(len(paths)) if place not in problems], dtype=np.int64)
            if not len(kept):
                return BlockPredictions(kept, np.empty((0, len(self.classes))), None, problems)
            found = self._answers(images.take(kept), cache, step)
        problems |= {int(kept[row]): reason for row, reason in found.problems.items()}
        return replace(found, readable=kept[found.readable], problems=problems)

    def _answers(self, images: ImageSplit, cache: Path, step: Callable[[int], None]) -> BlockPredictions:
        """Answers for readable images, one network in memory at a time; `readable` are rows of them.

        A row for which a network gives NaN or infinity is a problem. Zeros stand for it until then, so that the
        combiner answers the other rows.
        """
        problems: dict[int, str] = {}
        features: list[np.ndarray | None] = []

        def run(place: int, rows: np.ndarray) -> np.ndarray:
            member = self.members[place]
            logits, own = self._member_rows(member, images.take(rows), cache, step)
            for array in (logits, own):
                for row in () if array is None else np.flatnonzero(~np.isfinite(array).all(axis=1)):
                    array[row] = 0
                    problems.setdefault(int(rows[row]), f"{member.name} gives NaN or infinity for it")
            features.append(own)
            members[place, rows], ran[place, rows] = logits, True
            return logits

        everything = np.arange(len(images.paths))
        members = np.zeros((len(self.members), len(everything), len(self.classes)), dtype=np.float32)
        ran = np.zeros(members.shape[:2], dtype=bool)
        if self.ensemble and isinstance(self.ensemble.combiner, SparseCombiner):
            probabilities, _ = run_sparse(self.ensemble.combiner, run, members.shape)
        else:
            for place in range(len(self.members)):
                run(place, everything)
            rows = self._rows(images, members, features)
            probabilities = ensembles.predict(self.ensemble, rows) if self.ensemble else softmax(members[0])
        kept = np.array([row for row in everything if row not in problems], dtype=np.int64)
        disagreement = _disagreement(members, ran)[kept] if len(members) > 1 else None
        return BlockPredictions(kept, probabilities[kept], disagreement, problems)

    def _rows(self, images: ImageSplit, logits: np.ndarray, embeddings: Sequence[np.ndarray | None]) -> Rows:
        """All members' outputs on images, as an ensemble takes them."""
        rows = Rows(
            members=tuple(member.name for member in self.members),
            classes=self.classes,
            split=np.full(len(images.paths), SPLIT),
            sample_ids=np.array(images.sample_ids),
            labels=images.labels,
            logits=logits,
            out_of_sample=np.ones(len(images.paths), dtype=bool),
            inference=self.inference,
        )
        more: dict[str, Any] = {"embeddings": tuple(embeddings)} if self.reads_embeddings else {}
        return replace(rows, **more)

    def _member_rows(
        self, member: Member, images: ImageSplit, cache: Path, step: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (N, C) of what answers for a member, and the embeddings (N, D) of its full network where wanted.

        Fold networks answer together: the logarithm of the mean of their probabilities, as `fold_networks` stores it.
        """
        folds = self.inference == fold_networks.FOLDS
        full = np.empty((len(images.paths), len(self.classes)), dtype=np.float32)
        mean = fold_networks.FoldMean(*full.shape)
        features: list[np.ndarray] = []
        for stage in self._stages(member):
            for batch in self._batches(member, stage, images, cache):
                own = batch.logits[:, [member.classes.index(name) for name in self.classes]]
                if not folds:
                    full[batch.start : batch.start + len(own)] = own
                elif stage is not None:
                    mean.add(own, batch.start)
                if stage is None and self.reads_embeddings:
                    features.append(batch.embeddings)
                step(len(own))
        logits = mean.mean(len(fold_networks.stages(member))) if folds else full
        return logits, np.concatenate(features) if features else None

    def _batches(self, member: Member, stage: str | None, images: ImageSplit, cache: Path) -> Iterator[OutputBatch]:
        return streaming.stream(
            member.network(self.store.workspace, stage=stage),
            [images],
            batch_size=self.store.config.dataset.batch_size,
            device=self.device,
            image_cache=cache,
            decoding_threads=self.threads,
            val=self._val,
            must_be_finite=False,
        )

    @property
    def _val(self) -> ImageSplit | None:
        """On which surplus outputs of foreign networks are shown to be dead; None where it is not there any more."""
        try:
            return self.store.images("val")
        except UserError:
            return None


def _disagreement(logits: np.ndarray, ran: np.ndarray) -> np.ndarray:
    """Mutual information (N,) of the members (M, N, C) that ran, bool (M, N); NaN where fewer than two did."""
    found = np.full(ran.shape[1], np.nan)
    for those in np.unique(ran.T, axis=0):
        rows = (ran == those[:, None]).all(axis=0)
        if those.sum() > 1:
            found[rows] = mutual_information(softmax(logits[place][rows]) for place in np.flatnonzero(those))
    return found


def _digests(paths: Sequence[Path]) -> tuple[tuple[str, ...], dict[int, str]]:
    """SHA-256 of each file, and {place: why there is none}."""
    contents, problems = [], {}
    for place, path in enumerate(paths):
        try:
            with path.open("rb") as file:
                contents.append(hashlib.file_digest(file, "sha256").hexdigest())
        except (OSError, ValueError) as error:
            contents.append("")
            problems[place] = getattr(error, "strerror", None) or str(error)
    return tuple(contents), problems
