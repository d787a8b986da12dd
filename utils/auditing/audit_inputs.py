"""Inputs of an audit: images of the splits, recorded groups, stored embeddings and the ranking of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import base_back
from utils.core.artifacts import FileDigests, digest_of, read_record
from utils.core.config import Config
from utils.core.errors import ConfigError, UserError
from utils.core.workspace import SPLITS, Workspace
from utils.evaluation.evaluation_records import RANKING
from utils.predictions import catalog, image_splits
from utils.predictions.store import Store

logger = logging.getLogger("disease_pipeline")

VERSION = 2  # incremented whenever the record for the same images changes


@dataclass(frozen=True)
class AuditInputs:
    """N images of all splits that exist, in their order."""

    classes: tuple[str, ...]
    """Classes of all splits; unlike in `discover`, splits may lack some"""
    splits: tuple[str, ...]
    """(N,), split of each image"""
    sample_ids: tuple[str, ...]
    """(N,)"""
    labels: np.ndarray
    """int64 (N,), indices into `classes`"""
    paths: tuple[Path, ...]
    """(N,)"""
    contents: tuple[str, ...]
    """SHA-256 (N,)"""
    groups: np.ndarray
    """int64 (N,): equal contents, recorded groups and those of `dataset.group_regex`"""
    split_digests: dict[str, str]
    """{split: digest} in the catalog's format"""
    store: Store | None
    """None without a catalog of these images"""
    ranking: dict[str, Any] | None
    """Ranking on the test split"""
    digest: str
    """Digest of everything that the record depends on"""

    @property
    def names(self) -> list[str]:
        """`split/sample id` of each image."""
        return [f"{split}/{sample_id}" for split, sample_id in zip(self.splits, self.sample_ids, strict=True)]


def gather(config: Config, workspace: Workspace) -> AuditInputs:
    """Read the inputs of an audit. Raises UserError without images, and for an empty class folder."""
    digests = FileDigests(workspace.digests)
    folders = [split for split in SPLITS if any(path.is_dir() for path in (workspace.split_dir / split).glob("[!.]*"))]
    listed = [image_splits.list_images(workspace.split_dir, split, digests) for split in folders]
    digests.save()
    classes = tuple(dict.fromkeys(name for images in listed for name in images.classes))
    splits = tuple(images.split for images in listed for _ in images.sample_ids)
    sample_ids = tuple(sample_id for images in listed for sample_id in images.sample_ids)
    contents = tuple(content for images in listed for content in images.contents)
    labels = [np.array([classes.index(name) for name in images.classes])[images.labels] for images in listed]
    groups = _groups(config, workspace, splits, sample_ids, contents)
    split_digests = {images.split: images.digest for images in listed}
    store = _store(config, workspace, split_digests)
    ranking = read_record(workspace.ranking("test"), remedy="Remove it, then evaluate again", form=RANKING)
    ranking = ranking if store is not None else None
    depends = [split_digests, groups.tolist(), config.seed, ranking and ranking["inputs_digest"]]
    return AuditInputs(
        classes,
        splits,
        sample_ids,
        np.concatenate([np.zeros(0, dtype=np.int64), *labels]),
        tuple(path for images in listed for path in images.paths),
        contents,
        groups,
        split_digests,
        store,
        ranking,
        digest_of([VERSION, *depends]),
    )


def _groups(
    config: Config, workspace: Workspace, splits: Sequence[str], sample_ids: Sequence[str], contents: Sequence[str]
) -> np.ndarray:
    samples = base_back.load_bundled("samples")
    recorded = samples.recorded_groups(workspace.split_dir)
    names = [recorded.get(split, {}).get(sample_id) for split, sample_id in zip(splits, sample_ids, strict=True)]
    try:
        groups: np.ndarray = samples.group_indices(sample_ids, contents, config.dataset.group_regex, names)
    except base_back.load_bundled("patterns").PatternError as error:
        raise ConfigError(f"dataset.group_regex: {error}") from error
    return groups


def _store(config: Config, workspace: Workspace, split_digests: dict[str, str]) -> Store | None:
    """The prediction store, if the catalog lists these images, else None."""
    if not workspace.catalog.is_file():
        return None
    try:
        listed = catalog.read(workspace)
    except UserError as error:
        logger.warning("%s; the audit looks at images alone", error)
        return None
    if {split: facts.get("digest") for split, facts in listed.splits.items()} != split_digests:
        logger.warning("the images have changed since discovery; the audit looks at images alone")
        return None
    return Store(config, workspace, listed)


def _embedded(store: Store, splits: Sequence[str]) -> list[tuple[Any, str]]:
    """(member, split) pairs of the member whose stored embeddings cover most splits; ties are broken by name."""
    best: list[tuple[Any, str]] = []
    for name in sorted(store.catalog.members):
        member = store.catalog.members[name]
        if not member.usable:
            continue
        parts = [(member, split) for split in splits if store.is_stored(member, split)]
        if len(parts) > len(best) and not store.lacks_embeddings(member):
            best = parts
    return best


def embeddings(inputs: AuditInputs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stored embeddings (n, D) of one network with the indices (n,) of their images; empty if there are none."""
    if inputs.store is None:
        return []
    index_of = {name: row for row, name in enumerate(inputs.names)}
    values, rows = [], []
    for member, split in _embedded(inputs.store, list(inputs.split_digests)):
        try:
            part = inputs.store.rows(member, split, embeddings=True)
        except (UserError, OSError):
            continue  # a network without embeddings
        assert part.embeddings is not None
        values.append(np.asarray(part.embeddings))
        rows += [index_of[f"{split}/{sample_id}"] for sample_id in part.sample_ids.tolist()]
    return [(np.concatenate(values), np.array(rows))] if values else []
