"""Checks of `debug` that are not commands: members, out-of-fold predictions, embeddings and BatchNorm statistics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.artifacts import open_array, read_arrays
from utils.core.config import Config
from utils.core.errors import UserError
from utils.core.results import Result
from utils.core.workspace import SPLITS, Workspace
from utils.networks import memory
from utils.networks.construction import NetworkSpec
from utils.predictions import catalog, extraction, image_splits, member_selection, streaming
from utils.predictions.store import Store, embeddings_name

logger = logging.getLogger("disease_pipeline")

N_SMOKE_IMAGES = 8
MIN_BATCH_SIZE = 4  # for estimating a variance
RESET_REMEDY = "Run `python ensemble_orchestrator.py debug --section reset --confirm`, then debug again"


def smoke(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Load each selected member, run it on a few val images and free it. Errors of a member are failures."""
    store = Store(config, workspace, catalog.load(workspace))
    device = streaming.resolve_device(config.device)
    images = store.images("val")
    images = images.take(range(min(N_SMOKE_IMAGES, len(images.paths))))
    lines, failures = [], []
    for member in member_selection.select(store.catalog, config):
        try:
            batches = streaming.stream(
                member.network(workspace),
                [images],
                batch_size=config.dataset.batch_size,
                device=device,
                image_cache=workspace.image_cache,
                val=store.images("val"),
            )
            outputs = [(batch.logits, batch.embeddings) for batch in batches]
        except UserError as error:
            failures.append(f"{member.name}: {error}")
            continue
        logits, embeddings = (np.concatenate(parts) for parts in zip(*outputs, strict=True))
        lines.append(
            f"{member.name}: logits {logits.shape} {_statistics(logits)}, embeddings {embeddings.shape} "
            f"{_statistics(embeddings)}, {member.img_size} px, on {device}"
        )
    return _result(lines, failures)


def kfold(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Read the out-of-fold predictions of each selected member and compare them with the train split."""
    store = Store(config, workspace, catalog.load(workspace))
    lines, failures = [], []
    for member in member_selection.select(store.catalog, config):
        try:
            rows = store.oof(member)
        except UserError as error:
            failures.append(f"{member.name}: {error}")
            continue
        if rows is None:
            command = catalog.kfold_command(workspace, [member])
            failures.append(f"No K-fold results for backbone {member.name}. Create them: {command}, or exclude it")
            continue
        accuracy = float((rows.logits.argmax(axis=1) == rows.labels).mean())
        lines.append(f"{member.name}: {len(rows.labels)} rows, logits {rows.logits.shape}, accuracy {accuracy:.4f}")
    return _result(lines, failures)


def extract_embeddings(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Extract logits and embeddings of each selected member on every split into the prediction store."""
    store = Store(config, workspace, catalog.load(workspace))
    members = member_selection.select(store.catalog, config)
    if force:
        for member in members:
            for split in SPLITS:
                (workspace.predictions(member.name, split) / "record.json").unlink(missing_ok=True)
    extraction.ensure(store, members, SPLITS)
    lines = []
    for member in members:
        for split in SPLITS:
            logits = store.rows(member, split).logits
            path = workspace.embeddings(member.name, embeddings_name(member, split))
            shape = open_array(path, remedy=RESET_REMEDY).shape if path.is_file() else "none"
            lines.append(f"{member.name} on {split}: logits {logits.shape} {_statistics(logits)}, embeddings {shape}")
    return _result(lines, [])


def recompute_bn(config: Config, workspace: Workspace, *, force: bool = False) -> Result:
    """Recompute the BatchNorm statistics of each selected member.

    Changed weights and statistics that are not finite are failures.
    """
    import torch

    from utils.networks import soups

    store = Store(config, workspace, catalog.load(workspace))
    train = store.images("train")
    size = min(max(config.dataset.batch_size, MIN_BATCH_SIZE), len(train.paths))
    order = np.random.default_rng(config.seed).permutation(len(train.paths))
    shuffled = train.take(order)
    lines, failures = [], []
    for member in member_selection.select(store.catalog, config):
        spec = member.network(workspace)
        pixels = image_splits.open_images(
            shuffled, spec.preprocessing, image_cache=workspace.image_cache, threads=config.dataset.num_workers
        )
        model = streaming.open_network(spec)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

        def batches(pixels: Any = pixels, spec: NetworkSpec = spec) -> Iterator[tuple[Any, Any]]:
            for start in range(0, len(order) - size + 1, size):
                crops = torch.from_numpy(pixels.crops(range(start, start + size)))
                images = image_splits.normalise(crops, spec.preprocessing)
                yield images, torch.from_numpy(shuffled.labels[start : start + size])

        layers = len(soups.batch_norms(model))
        n_batches = soups.recompute_bn_statistics(model, batches())
        after = model.state_dict()
        statistics = [name for name in after if name.endswith(soups.STATISTICS)]
        means = [name for name in statistics if name.endswith("mean")]
        largest_change = max((float((after[name] - before[name]).abs().max()) for name in means), default=0.0)
        changed = [name for name in after if name not in statistics and not torch.equal(after[name], before[name])]
        not_finite = [name for name in statistics if not torch.isfinite(after[name]).all()]
        if changed or not_finite:
            failures.append(f"{member.name}: {', '.join((changed + not_finite)[:3])}: changed or not finite")
        lines.append(
            f"{member.name}: {layers} BatchNorm layers, {n_batches} batches of {size}, means changed by up to "
            f"{largest_change:.4g}"
            if layers
            else f"{member.name}: no BatchNorm layers"
        )
        memory.safe_delete_model(model)
    return _result(lines, failures)


def describe_file(path: Path) -> str:
    """Describe a file for `--verbose`: shapes and statistics of arrays, keys of records."""
    try:
        if path.suffix == ".npy":
            array = open_array(path, remedy=RESET_REMEDY)
            return f"{path}: {array.dtype} {array.shape} {_statistics(array)}"
        if path.suffix == ".npz":
            arrays = read_arrays(path, remedy=RESET_REMEDY)
            parts = [f"{name} {array.dtype} {array.shape} {_statistics(array)}" for name, array in arrays.items()]
            return f"{path}: {'; '.join(parts)}"
        if path.suffix == ".json":
            record = json.loads(path.read_text(encoding="utf-8"))
            keys = ", ".join(sorted(record)[:12]) if isinstance(record, dict) else f"{len(record)} items"
            return f"{path}: {keys}"
    except (UserError, OSError, ValueError) as error:
        return f"{path}: {error}"
    return f"{path}: {path.stat().st_size} bytes"


def _statistics(array: np.ndarray) -> str:
    if not array.size or array.dtype.kind not in "fiub":
        return ""
    values = np.asarray(array, dtype=np.float64)
    return f"[{values.min():.4g} .. {values.mean():.4g} .. {values.max():.4g}]"


def _result(lines: list[str], failures: list[str]) -> Result:
    return Result("\n".join(lines), {"lines": lines}, failures)
