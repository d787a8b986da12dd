"""Images past networks: one network resident at a time, its logits and embeddings handed on batch by batch.

The pixels come from the decoded-image cache, so that any number of networks costs one decode.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import base_back
from utils.artifacts import FileDigests, digest_of
from utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger("disease_pipeline")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSplit:
    """The labelled images of one split, sorted by sample id."""

    split: str
    classes: tuple[str, ...]
    sample_ids: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,)"""
    paths: tuple[Path, ...]
    contents: tuple[str, ...]
    """SHA-256 of each file."""
    digest: str
    """Of ids, labels and contents."""


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build one trained network and to prepare its images."""

    architecture: str
    checkpoint: Path
    size: str
    img_size: int
    classes: tuple[str, ...]
    """In the order of the network's outputs."""


@dataclass(frozen=True)
class Batch:
    """Outputs for consecutive rows of one split."""

    split: str
    start: int
    logits: np.ndarray
    """float32 (B, C)"""
    embeddings: np.ndarray
    """float32 (B, D)"""


def list_images(split_dir: Path, split: str, digests: FileDigests) -> ImageSplit:
    """The images of one split with their content digests. Raises UserError for a missing split or an empty class."""
    samples_module = base_back.bundled("samples")
    try:
        classes, samples = samples_module.scan(split_dir / split)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"{error}. Split the images first: python {_shown(base_back.locate())}/src/main.py --stages split"
        ) from error
    contents = [digests.of(sample.path) for sample in samples]
    labels = np.array([sample.label for sample in samples], dtype=np.int64)
    ids = [sample.sample_id for sample in samples]
    return ImageSplit(
        split=split,
        classes=tuple(classes),
        sample_ids=tuple(ids),
        labels=labels,
        paths=tuple(sample.path for sample in samples),
        contents=tuple(contents),
        digest=digest_of([classes, ids, contents]),
    )


def _shown(path: Path) -> str:
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's record, on the CPU, with nothing executed from it.

    NumPy's scalars are allowed, since real checkpoints hold them. Raises UserError for a file that is missing, damaged
    or asks for anything else; there is no second, less careful try.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if _is_zip(path) else []
        raise UserError(
            f"{path}: refused, since loading it could run code ({', '.join(wanted) or str(error).splitlines()[0]}); "
            "expected a checkpoint of tensors and plain values. Save it again as a state dictionary, or leave the "
            "member out with backbones.exclude"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]}). Train the backbone again, or "
            "leave it out with backbones.exclude"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds a {type(record).__name__}; expected a dictionary with model_state_dict")
    return record


def _allowed_globals() -> list[Any]:
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    kinds = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]


def _is_zip(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def weights_of(record: dict[str, Any]) -> dict[str, Any]:
    """The state dictionary in a checkpoint's record: under its usual names, or the record itself."""
    for key in ("model_state_dict", "state_dict"):
        if isinstance(record.get(key), dict):
            return record[key]
    return record


def open_network(spec: NetworkSpec) -> nn.Module:
    """Build the network and load its weights, in evaluation mode on the CPU. Raises UserError when they do not fit."""
    models = base_back.load("models")
    weights = weights_of(read_checkpoint(spec.checkpoint))
    options = {"size": spec.size, "img_size": spec.img_size} if _takes_size(models) else {}
    model = models.create_custom_backbone_safe(spec.architecture, len(spec.classes), **options)
    if model is None:
        reason = getattr(models.create_custom_backbone_safe, "last_error", None) or "see the log above"
        raise UserError(f"{spec.checkpoint}: the network {spec.architecture} cannot be built ({reason})")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{spec.checkpoint}: the weights do not fit {spec.architecture} ({spec.size}, {spec.img_size} px, "
            f"{len(spec.classes)} classes): {first}. Train the backbone again, or leave it out with backbones.exclude"
        ) from error
    return model.eval()


def _takes_size(models: Any) -> bool:
    import inspect

    return "size" in inspect.signature(models.create_custom_backbone_safe).parameters


def stream(
    spec: NetworkSpec,
    splits: Sequence[ImageSplit],
    *,
    batch_size: int,
    device: str,
    image_cache: Path,
    decoding_threads: int = 1,
) -> Iterator[Batch]:
    """Logits and embeddings of one network over the given splits, batch by batch, in the order of the rows.

    The network is gone from memory when the iterator ends. Raises UserError for unreadable images, weights that do not
    fit, or logits that are not finite (named by image).
    """
    import torch

    decoder = base_back.bundled("image_cache")
    model = open_network(spec).to(device)
    on_cuda = torch.device(device).type == "cuda"
    try:
        for images in splits:
            try:
                pixels = decoder.open_images(
                    images.paths,
                    images.contents,
                    decoder.resized_side(spec.img_size),
                    image_cache,
                    threads=decoding_threads,
                )
            except decoder.UnreadableImages as error:
                raise UserError(f"{error}. Remove or replace the files, then run discover again") from error
            for start in range(0, len(images.paths), batch_size):
                rows = range(start, min(start + batch_size, len(images.paths)))
                batch = normalise(torch.from_numpy(pixels.centre_crops(rows, spec.img_size)).to(device))
                precision = torch.autocast("cuda", dtype=torch.bfloat16) if on_cuda else nullcontext()
                with torch.inference_mode(), precision:
                    logits, embeddings = logits_and_embeddings(model, batch)
                found = Batch(images.split, start, logits.float().cpu().numpy(), embeddings.float().cpu().numpy())
                _check_finite(spec, images, found)
                yield found
    finally:
        safe_delete_model(model)
        cleanup_memory()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), as the base pipeline's evaluation transform ends."""
    import torch

    mean, std = (torch.tensor(values, device=pixels.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def logits_and_embeddings(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and the input of the last layer (B, D), from one forward pass."""
    embeddings = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    return model.get_classifier()(embeddings), embeddings  # type: ignore[operator]


def _check_finite(spec: NetworkSpec, images: ImageSplit, batch: Batch) -> None:
    bad = np.flatnonzero(~np.isfinite(batch.logits).all(axis=1))
    if bad.size:
        first = images.sample_ids[batch.start + int(bad[0])]
        raise UserError(
            f"{spec.checkpoint}: {bad.size} of {len(batch.logits)} rows of a batch have NaN or infinite logits, first "
            f"{images.split}/{first}. Train the backbone again, or leave it out with backbones.exclude"
        )


def resolve_device(wanted: str) -> str:
    """`cuda`, `cuda:N`, `cpu` or `auto` -> a device that this machine has; says so when it is not the one wanted."""
    if wanted == "cpu":
        return wanted
    import torch

    if torch.cuda.is_available():
        device = "cuda:0" if wanted in ("auto", "cuda") else wanted
        if int(device.split(":")[1]) >= torch.cuda.device_count():
            raise UserError(f"device {wanted}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        return device
    if wanted != "auto":
        logger.warning("device %s: no CUDA device here, the CPU is used", wanted)
    return "cpu"


def decoding_threads(wanted: int) -> int:
    """`dataset.num_workers`, one at the least and no more than the cores; says so when it is cut."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cores:
        logger.warning("dataset.num_workers is %d; this machine has %d cores, which is what is used", wanted, cores)
    return max(1, min(wanted, cores))


def safe_delete_model(model: nn.Module) -> None:
    """Free a network's parameters and buffers at once, even where something still refers to it."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def cleanup_memory() -> None:
    """Collect garbage and give the CUDA cache back, between any two networks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
