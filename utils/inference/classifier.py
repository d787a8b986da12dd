"""Predictions of an ensemble or a single member for image files, block by block.

The decoded pixels of a block are in a temporary folder that is removed afterwards, so memory and disk space depend on
the size of a block, not on the number of images.
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
from utils.core.errors import UserError
from utils.core.regular_files import open_regular
from utils.evaluation import recommended_names
from utils.numeric.diversity import mutual_information
from utils.numeric.metrics import softmax
from utils.predictions import catalog, fold_networks, image_splits, streaming
from utils.predictions.catalog import IMPORTED, Member
from utils.predictions.image_splits import ImageSplit
from utils.predictions.rows import UNKNOWN, Rows
from utils.predictions.store import Store
from utils.predictions.streaming import OutputBatch

SPLIT = "predict"  # name in messages for images without a split
BLOCK_BYTES = 2**31  # limit of decoded pixels on disk
ARRAY_BYTES = 2**28  # limit of logits in memory
MIN_BLOCK, MAX_BLOCK = 64, 8192  # images per block
ASPECT_RATIO = 4 / 3  # assumed ratio of longer to shorter side


@dataclass(frozen=True)
class BlockPredictions:
    """Predictions for the images of one block."""

    readable: np.ndarray
    """int64 (R,): indices of the images with a prediction"""
    probabilities: np.ndarray
    """float64 (R, C)"""
    disagreement: np.ndarray | None
    """float64 (R,): mutual information in nats of the members that ran; NaN for fewer than two, None for one member"""
    problems: dict[int, str]
    """{index: reason} of the images without a prediction"""


class WorkspaceClassifier:
    """Predicts with the members' networks in the workspace."""

    def __init__(self, store: Store, name: str) -> None:
        """Load an ensemble or a member.

        Raises UserError for an unknown name, and for a member that is missing, has changed or has no network.
        """
        self.store, self.name = store, name
        saved = ensembles.names(store.workspace)
        self.ensemble: Ensemble | None = ensembles.load(store.workspace, name) if name in saved else None
        if self.ensemble is None and name not in store.catalog.members:
            raise recommended_names.unknown_name(name, saved, store.catalog.members)
        self.inference = self.ensemble.inference if self.ensemble else fold_networks.FULL
        names = self.ensemble.members if self.ensemble else (name,)
        # Set before the members, since it determines which of their networks are needed.
        self.reads_embeddings = bool(self.ensemble and self.ensemble.combiner.reads_embeddings)
        self.members = tuple(self._member(member) for member in names)
        self.classes = store.catalog.classes
        digest = self.ensemble.inputs_digest if self.ensemble else self.members[0].digest
        self.version = f"{name}@{digest[:12]}"
        """Name and digest; a file contains predictions of one version only."""
        self.device = streaming.resolve_device(store.config.device)
        self.n_threads = image_splits.decoding_threads(store.config.dataset.num_workers)
        self.preprocessings = list(dict.fromkeys(member.image_preprocessing for member in self.members))

    def _member(self, name: str) -> Member:
        """The member. Raises UserError if it cannot be run or has changed since the ensemble was built."""
        member = self.store.catalog.members.get(name)
        remedy = f"build it again: {build_command(self.name)}"
        if member is None:
            raise UserError(
                f"{self.name}: its member {name} is not in the catalog. Restore its checkpoint and run discover, or "
                f"{remedy}"
            )
        if member.source == IMPORTED:
            raise UserError(
                f"{self.name}: its member {name} has imported predictions and no network to run. Name an ensemble of "
                "trained members"
            )
        if self.ensemble and name in fold_networks.missing_and_changed({name: member}, self.ensemble)[1]:
            raise UserError(f"{self.name}: the checkpoint of {name} has changed since it was built; {remedy}")
        for stage in self._stages(member):
            catalog.check_current(self.store.workspace, member, self.store.digests, stage=stage)
        return member

    def _stages(self, member: Member) -> tuple[str | None, ...]:
        """Stages of the networks to run: the full network (None), the fold networks, or both."""
        return fold_networks.answering(member, self.inference, embeddings=self.reads_embeddings)

    @property
    def n_networks(self) -> int:
        """Number of networks that run on every image."""
        return sum(len(self._stages(member)) for member in self.members)

    @property
    def block_size(self) -> int:
        """Number of images per block, which limits the size of their pixels and logits."""
        rules = {preprocessing.resizing().key: preprocessing for preprocessing in self.preprocessings}
        pixels = 3 * ASPECT_RATIO * sum(preprocessing.resized**2 for preprocessing in rules.values())
        logits = 4 * len(self.members) * len(self.classes)
        return int(min(MAX_BLOCK, max(MIN_BLOCK, min(BLOCK_BYTES / pixels, ARRAY_BYTES / logits))))

    def predict_block(self, paths: Sequence[Path], step: Callable[[int], None]) -> BlockPredictions:
        """Predict image files; `step(n_images)` is called after every batch of every network."""
        contents, problems = content_digests(paths)
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
            existing = images.take([index for index in range(len(paths)) if index not in problems])
            unread = image_splits.decode_readable(
                existing, self.preprocessings, image_cache=cache, threads=self.n_threads
            )
            # Of files with equal content, one is decoded, so a reason applies to all of them.
            reasons = {content: unread[path] for path, content in zip(paths, contents, strict=True) if path in unread}
            problems |= {index: reasons[content] for index, content in enumerate(contents) if content in reasons}
            readable = np.array([index for index in range(len(paths)) if index not in problems], dtype=np.int64)
            if not len(readable):
                return BlockPredictions(readable, np.empty((0, len(self.classes))), None, problems)
            predictions = self._predict_readable(images.take(readable), cache, step)
        problems |= {int(readable[row]): reason for row, reason in predictions.problems.items()}
        return replace(predictions, readable=readable[predictions.readable], problems=problems)

    def _predict_readable(self, images: ImageSplit, cache: Path, step: Callable[[int], None]) -> BlockPredictions:
        """Predict decoded images, with one network in memory at a time; indices are those of `images`.

        A row with NaN or infinite outputs of a network is a problem. Its outputs are replaced by zeros, so that the
        combiner can predict the other rows.
        """
        problems: dict[int, str] = {}
        embeddings: list[np.ndarray | None] = []

        def run_member(index: int, rows: np.ndarray) -> np.ndarray:
            member = self.members[index]
            logits, features = self.run_networks(member, images.take(rows), cache, step)
            for array in (logits, features):
                if array is None:
                    continue
                for row in np.flatnonzero(~np.isfinite(array).all(axis=1)):
                    array[row] = 0
                    problems.setdefault(int(rows[row]), f"{member.name} gives NaN or infinity for it")
            embeddings.append(features)
            member_logits[index, rows], has_run[index, rows] = logits, True
            return logits

        all_rows = np.arange(len(images.paths))
        member_logits = np.zeros((len(self.members), len(all_rows), len(self.classes)), dtype=np.float32)
        has_run = np.zeros(member_logits.shape[:2], dtype=bool)
        if self.ensemble and isinstance(self.ensemble.combiner, SparseCombiner):
            probabilities, _ = run_sparse(self.ensemble.combiner, run_member, member_logits.shape)
        else:
            for index in range(len(self.members)):
                run_member(index, all_rows)
            rows = self._rows(images, member_logits, embeddings)
            probabilities = ensembles.predict(self.ensemble, rows) if self.ensemble else softmax(member_logits[0])
        valid = np.array([row for row in all_rows if row not in problems], dtype=np.int64)
        disagreement = _disagreement(member_logits, has_run)[valid] if len(member_logits) > 1 else None
        return BlockPredictions(valid, probabilities[valid], disagreement, problems)

    def _rows(self, images: ImageSplit, logits: np.ndarray, embeddings: Sequence[np.ndarray | None]) -> Rows:
        """Outputs of all members on images, the input of an ensemble."""
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
        fields: dict[str, Any] = {"embeddings": tuple(embeddings)} if self.reads_embeddings else {}
        return replace(rows, **fields)

    def run_networks(
        self, member: Member, images: ImageSplit, cache: Path, step: Callable[[int], None]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits (N, C) of a member, and the embeddings (N, D) of its full network if the combiner uses them.

        Logits of fold networks are the logarithm of the mean of their probabilities, as in `fold_networks`.
        """
        uses_folds = self.inference == fold_networks.FOLDS
        full = np.empty((len(images.paths), len(self.classes)), dtype=np.float32)
        mean = fold_networks.FoldMean(*full.shape)
        features: list[np.ndarray] = []
        for stage in self._stages(member):
            for batch in self._batches(member, stage, images, cache):
                logits = batch.logits[:, [member.classes.index(name) for name in self.classes]]
                if not uses_folds:
                    full[batch.start : batch.start + len(logits)] = logits
                elif stage is not None:
                    mean.add(logits, batch.start)
                if stage is None and self.reads_embeddings:
                    features.append(batch.embeddings)
                step(len(logits))
        logits = mean.mean(len(fold_networks.stages(member))) if uses_folds else full
        return logits, np.concatenate(features) if features else None

    def _batches(self, member: Member, stage: str | None, images: ImageSplit, cache: Path) -> Iterator[OutputBatch]:
        return streaming.stream(
            member.network(self.store.workspace, stage=stage),
            [images],
            batch_size=self.store.config.dataset.batch_size,
            device=self.device,
            image_cache=cache,
            decoding_threads=self.n_threads,
            val=self._val_images,
            must_be_finite=False,
        )

    @property
    def _val_images(self) -> ImageSplit | None:
        """The val split, for checking that extra outputs of external networks are never predicted; None if missing."""
        try:
            return self.store.images("val")
        except UserError:
            return None


def _disagreement(member_logits: np.ndarray, has_run: np.ndarray) -> np.ndarray:
    """Mutual information (N,) of the members (M, N, C) that ran, bool (M, N); NaN if fewer than two did."""
    disagreement = np.full(has_run.shape[1], np.nan)
    for members in np.unique(has_run.T, axis=0):
        rows = (has_run == members[:, None]).all(axis=0)
        if members.sum() > 1:
            probabilities = (softmax(member_logits[index][rows]) for index in np.flatnonzero(members))
            disagreement[rows] = mutual_information(probabilities)
    return disagreement


def content_digests(paths: Sequence[Path]) -> tuple[tuple[str, ...], dict[int, str]]:
    """SHA-256 of each file, and {index: reason} of files that cannot be read."""
    contents, problems = [], {}
    for index, path in enumerate(paths):
        try:
            with open_regular(path) as file:
                contents.append(hashlib.file_digest(file, "sha256").hexdigest())
        except (OSError, ValueError) as error:
            contents.append("")
            problems[index] = getattr(error, "strerror", None) or str(error)
    return tuple(contents), problems
