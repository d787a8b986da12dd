"""Embeddings of images by a frozen network, computed once and stored on disk by trunk, resize rule and image.

A pack is one file `<digest>.npz` in `<image cache>/embeddings/<key>/`: the images' content digests, uint8 (n, 32), and
their embeddings, float32 (n, D). Packs are immutable; new images go into a new pack.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import settings
from training.pretrained import Pretrained, create_pretrained
from training.timm_networks import embed
from utils import DEVICE, logger
from utils.datasets import DecodedDataset
from utils.files import atomic_path
from utils.threads import intra_op_threads

FORMAT = 1  # incremented whenever the embedding of the same network and image changes
BATCH = 1 if DEVICE.type == "cpu" else 32
"""On the CPU one image at a time: no slower on one core, and an embedding does not depend on the rest of its batch."""
PACK_ROWS = 256
LAYOUT = torch.channels_last  # a tenth faster for convolutions, measured with tf_efficientnet_lite0 on one core


def folder_of(network: Pretrained, view: int) -> Path:
    """Folder of the embeddings of one view of a network's images."""
    rule = {name: value for name, value in network.preprocessing.items() if name != "source"}
    parts = [FORMAT, network.architecture, network.trunk_sha256, rule, view, DEVICE.type]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return settings.IMAGE_CACHE_DIR / "embeddings" / key


def missing_contents(network: Pretrained, contents: Sequence[str]) -> list[str]:
    """Sorted content digests of the images that lack the embedding of at least one view."""
    missing: set[str] = set()
    for view in range(network.views):
        missing |= set(contents) - _read_packs(folder_of(network, view)).keys()
    return sorted(missing)


def embeddings_of(network: Pretrained, dataset: DecodedDataset) -> np.ndarray:
    """Embeddings of all views of a data set's rows, float32 (V, N, D); those not on disk yet are computed."""
    compute(network, dataset)
    views = []
    for view in range(network.views):
        stored = _read_packs(folder_of(network, view))
        views.append(np.stack([stored[content] for content in dataset.contents]))
    return np.stack(views)


def compute(network: Pretrained, dataset: DecodedDataset, shard: int = 0, shards: int = 1) -> int:
    """Compute and store the missing embeddings of one of `shards` parts of a data set; returns their number."""
    rows_of = {content: row for row, content in reversed(list(enumerate(dataset.contents)))}
    part = sorted(rows_of)[shard::shards]
    model: Any = None
    count = 0
    for view in range(network.views):
        folder = folder_of(network, view)
        stored = _read_packs(folder)
        missing = [content for content in part if content not in stored]
        count += len(missing)
        for start in range(0, len(missing), PACK_ROWS):
            batch = missing[start : start + PACK_ROWS]
            model = model or create_pretrained(network, len(dataset.classes)).to(DEVICE, memory_format=LAYOUT).eval()
            _write_pack(folder, batch, _run(model, dataset, [rows_of[content] for content in batch], view))
    return count


def _run(model: Any, dataset: DecodedDataset, rows: Sequence[int], view: int) -> np.ndarray:
    parts = []
    number = torch.get_num_threads() if DEVICE.type == "cpu" else None
    with torch.inference_mode(), intra_op_threads(number):
        for start in range(0, len(rows), BATCH):
            images = dataset.crops(rows[start : start + BATCH]).to(DEVICE, memory_format=LAYOUT)
            parts.append(embed(model, images.flip(-1) if view else images).float().cpu())
    return torch.cat(parts).numpy()


def _write_pack(folder: Path, contents: Sequence[str], embeddings: np.ndarray) -> None:
    name = hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
    digests = np.stack([np.frombuffer(bytes.fromhex(content), dtype=np.uint8) for content in contents])
    with atomic_path(folder / f"{name}.npz") as temporary:
        np.savez(temporary, contents=digests, embeddings=embeddings)


def _read_packs(folder: Path) -> dict[str, np.ndarray]:
    """{content digest: embedding (D,)} of all packs; a damaged pack is removed."""
    stored: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("[0-9a-f]*.npz")):
        try:
            with np.load(path, allow_pickle=False) as pack:
                digests, embeddings = pack["contents"], pack["embeddings"]
            stored |= {digest.tobytes().hex(): row for digest, row in zip(digests, embeddings, strict=True)}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            logger.warning("%s: damaged (%s); it is removed and made again", path, error)
            path.unlink(missing_ok=True)
    return stored
